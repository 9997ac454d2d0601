"""What every command shares: options, where output goes, progress, sizes in words."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import rich.console
import rich.table
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fewbit.errors import RecipeError

if TYPE_CHECKING:
    import torch

    from fewbit.checkpoint import Checkpoint

SCHEMA = 1
"""Version of the JSON that ``--json`` prints."""
FULL = (errno.ENOSPC, errno.EDQUOT)
"""How a write to a disk fails that is full, or of which this user may have no more."""


class Settings:
    """What -q, -v and --seed said.

    Attributes:
        log: Where what is for the user goes instead of standard error, if that is to be a log.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget the last command."""
        self.quiet, self.verbose, self.seed = False, False, 0
        self.log: logging.Logger | None = None


settings = Settings()


def grow_memory() -> None:
    """Let a GPU's allocator make its pieces of memory larger instead of adding more, before torch is loaded.

    The layers of a compression take and free what fits no hole of the layer before.
    """
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def _set_quiet(value: bool) -> bool:
    settings.quiet = value
    return value


def _set_verbose(value: bool) -> bool:
    settings.verbose = value
    return value


def _set_seed(value: int) -> int:
    settings.seed = value
    return value


ModelArgument = Annotated[str, typer.Argument(metavar="DIR", help="Model directory, or a Hub id.")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="cpu or cuda:N [default: a GPU if there is one]")]
SeedOption = Annotated[
    int, typer.Option("--seed", callback=_set_seed, min=0, max=2**63 - 1, help="Of everything drawn at random.")
]
QuietOption = Annotated[bool, typer.Option("-q", "--quiet", callback=_set_quiet, help="Only the result.")]
VerboseOption = Annotated[
    bool, typer.Option("-v", "--verbose", callback=_set_verbose, is_eager=True, help="Tracebacks, and more words.")
]
EngineOption = Annotated[
    str | None,
    typer.Option("--for", metavar="ENGINE", help="In the format that this engine loads (a wrong name lists them)."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
BackendOption = Annotated[str, typer.Option("--backend", help="Kernel to use for every linear.")]
ExactOption = Annotated[
    bool, typer.Option("--exact", help="Products of floats, inputs rounded only where the format says so.")
]


def backend_of(backend: str, exact: bool) -> str:
    """What --backend and --exact say together, as `fewbit.model.load` takes it."""
    if exact and backend not in ("auto", "exact"):
        raise RecipeError(f"--exact chooses among kernels and --backend {backend} names one; give only one of them")
    return "exact" if exact else backend


def device_of(text: str | None) -> torch.device:
    """The device asked for, else a GPU if there is one, else the CPU."""
    import torch

    from fewbit.ops.device import device_named, make_current

    torch.manual_seed(settings.seed)
    device = device_named(text or "auto")
    make_current(device)
    return device


def open_model(model: str) -> Checkpoint:
    """The checkpoint a user means by a directory or a Hub id."""
    from fewbit.checkpoint import locate, open_checkpoint

    return open_checkpoint(locate(model))


def note(text: str) -> None:
    """A line for the user that is not the result."""
    if settings.quiet:
        return
    if settings.log is not None:
        settings.log.info("%s", text)
    else:
        tell(text)


def tell(text: str) -> None:
    """A line on standard error. Where that goes to a full disk the line is lost, and the work goes on."""
    try:
        print(text, file=sys.stderr)
    except OSError as error:
        if error.errno not in FULL:
            raise


def print_json(command: str, fields: Any) -> None:
    """The one JSON object of a command."""
    if dataclasses.is_dataclass(fields) and not isinstance(fields, type):
        fields = dataclasses.asdict(fields)
    print(json.dumps({"schema": SCHEMA, "command": command, **fields}, default=str))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """A table on stdout: the first column to the left, numbers to the right."""
    made = rich.table.Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        made.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        made.add_row(*row)
    _stdout().print(made)


def pairs(rows: Sequence[tuple[str, str]]) -> None:
    """Names and values on stdout."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def _stdout() -> rich.console.Console:
    # a table must not be cut to some terminal's width when it goes into a file
    return rich.console.Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160, highlight=False)


@contextmanager
def progress() -> Iterator[ProgressBars]:
    """Bars on stderr for whatever takes more than two seconds."""
    bars = ProgressBars()
    try:
        yield bars
    finally:
        bars.close()


class ProgressBars:
    """Bars with the time left, shown once the work has taken two seconds; call with (stage, done, total).

    A stage of which less is done than before has begun anew, say for another model, and its time left with it.
    Where stderr is no terminal, a line every ten seconds takes their place.
    """

    PATIENCE_S = 2.0
    LINE_S = 10.0

    def __init__(self) -> None:
        self._start = self._said = time.monotonic()
        self._bars: Progress | None = None
        self._tasks: dict[str, Any] = {}
        self._first: dict[str, tuple[float, int]] = {}
        self._last: dict[str, int] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show how far a stage is."""
        if done < self._last.get(stage, done):
            del self._first[stage]
            if self._bars is not None and stage in self._tasks:
                self._bars.reset(self._tasks[stage])
        self._last[stage] = done
        began, known = self._first.setdefault(stage, (time.monotonic(), done))
        if settings.quiet or time.monotonic() - self._start < self.PATIENCE_S:
            return
        if not sys.stderr.isatty():
            if time.monotonic() - self._said > self.LINE_S:
                self._said = time.monotonic()
                # what was known when the stage began took no time
                left = (self._said - began) / (done - known) * (total - done) if done > known else None
                rest = "" if left is None else f", about {left:.0f} s left"
                note(f"{stage}: {done} of {total} after {self._said - self._start:.0f} s{rest}")
            return
        if self._bars is None:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bars = Progress(*columns, console=rich.console.Console(stderr=True), transient=True)
            self._bars.start()
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total)
        self._bars.update(self._tasks[stage], completed=done, total=total)

    def close(self) -> None:
        """Take the bars away."""
        if self._bars is not None:
            self._bars.stop()


def size(count: float) -> str:
    """Bytes in words, powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    raise AssertionError


def read_windows(
    path: Path, folder: Traversable, length: int, count: int | None, stride: int | None = None
) -> list[list[int]]:
    """Windows of a data file, cut with the tokenizer of a folder."""
    from fewbit.text.tokenizer import Tokenizer
    from fewbit.text.windows import read_documents, windows

    return windows(read_documents(path), Tokenizer.load(folder), length, count, stride)

"""Several models measured side by side: a process for each, its rows kept in a folder as they end.

A process of its own gives each model the same machine (the second one in a process was seen to run at lower clocks),
and takes nobody with it when it runs out of memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fewbit.errors import JournalError, RequestError
from fewbit.measure.runfolder import Row, RunFolder

Tell = Callable[[str], None]
_STOP_S = 20


@dataclass(frozen=True)
class Entry:
    """One model of a comparison.

    Attributes:
        label: what the table calls it.
        speed: its rows of `bench offline`, and what is known of each before it is measured.
        command: that measures those rows, without the rows' own options.
        quality: its row of `eval`; None: there is no text to predict.
        evaluate: the command that measures that.
    """

    label: str
    speed: Mapping[Row, Mapping[str, Any]]
    command: Sequence[str]
    quality: Row | None = None
    evaluate: Sequence[str] = ()


@dataclass
class Comparison:
    """What is known of an entry.

    Attributes:
        cells: of `bench offline`, by batch, prompt and answer.
        quality: the object of `eval`; empty: nothing is known.
    """

    label: str
    cells: list[dict[str, Any]] = field(default_factory=list)
    quality: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """How a process ended: its status, stdout, and the last line of its stderr."""

    status: int
    out: str
    last: str


def child(arguments: Sequence[str], tell: Tell) -> Ended:
    """Run a command of fewbit in a process that ends with this one; its words on stderr are passed on."""
    with tempfile.TemporaryFile("w+", encoding="utf8") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "fewbit.cli.child", *arguments],
            stdin=subprocess.PIPE, stdout=out, stderr=subprocess.PIPE, text=True, encoding="utf8", errors="replace",
            start_new_session=True,
        )  # fmt: skip  # a session of its own: Ctrl-C comes here alone, and here it is passed on
        assert process.stderr is not None
        last = ""
        try:
            for line in process.stderr:
                if line.strip():
                    last = line.strip()
                    tell(last)
            status = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(_STOP_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            for pipe in (process.stdin, process.stderr):
                if pipe is not None:
                    pipe.close()
        out.seek(0)
        return Ended(status, out.read(), last.removeprefix("fewbit: "))


def missing(entry: Entry, folder: RunFolder, retry: bool) -> list[Row]:
    """Rows of an entry's speed that have to be measured; with `retry` also those that failed."""
    found = []
    for row in entry.speed:
        known = folder.read(row)
        if known is None or (retry and "failed" in known["cells"][0]):
            found.append(row)
    return found


def measure_speed(entry: Entry, folder: RunFolder, retry: bool, tell: Tell) -> None:
    """Have every row of an entry in the folder, as figures or as the reason why there are none.

    A process that is killed fails the row it was at, and the next goes on behind that.
    """
    for row in missing(entry, folder, retry):
        folder.forget(row)  # it failed in an earlier run
    while todo := missing(entry, folder, retry=False):
        ended = child(entry.command, tell)
        left = missing(entry, folder, retry=False)
        if len(left) == len(todo) and not ended.status:
            raise RequestError(f"{entry.label}: bench offline ended well and left no row in {folder.path}")
        if ended.status:
            for row in left if ended.status == 2 else left[:1]:
                folder.write(row, {"cells": [dict(entry.speed[row]) | {"failed": _reason(ended)}]})


def measure_quality(entry: Entry, folder: RunFolder, retry: bool, tell: Tell) -> None:
    """Have an entry's row of `eval` in the folder.

    Raises:
        JournalError: its answers are in use by another process, or of something else; no row is written.
    """
    if entry.quality is None:
        return
    known = folder.read(entry.quality)
    if known is not None and not (retry and "failed" in known):
        return
    ended = child(entry.evaluate, tell)
    words = {"label": entry.label}
    if ended.status == JournalError.STATUS:  # says nothing of the model: asked again next time
        raise JournalError(f"{entry.label}: {ended.last}")
    if ended.status:
        folder.write(entry.quality, words | {"failed": _reason(ended)})
    else:
        found = json.loads(ended.out)
        folder.write(entry.quality, words | {k: v for k, v in found.items() if k not in ("schema", "command")})


def _reason(ended: Ended) -> str:
    if ended.status in (1, 2) and ended.last:
        return ended.last
    killed = f"was killed by signal {-ended.status}" if ended.status < 0 else f"ended with status {ended.status}"
    hint = "; out of memory?" if ended.status == -9 else ""
    return f"the process {killed}{hint}{f' after: {ended.last}' if ended.last else ''}"


def known(entry: Entry, folder: RunFolder) -> Comparison:
    """What the folder holds of an entry."""
    found = Comparison(entry.label)
    for row in entry.speed:
        if (one := folder.read(row)) is not None:
            found.cells.append(one["cells"][0])
    if entry.quality is not None:
        found.quality = folder.read(entry.quality) or {}
    return found


def left_out(entries: Sequence[Entry], folder: RunFolder) -> Counter[str]:
    """Rows that the folder holds of other devices than this comparison's: how many of each."""
    here = {row.key["device"] for entry in entries for row in entry.speed}
    rows = [one for command in ("bench offline", "eval") for one in folder.rows(command)]
    devices = ((one.get("key") or {}).get("device") for one in rows)
    return Counter(device for device in devices if device is not None and device not in here)


def speed_up(cell: Mapping[str, Any], base: Comparison) -> float | None:
    """Tokens/s over those of the base in the same cell; None: one of them failed."""
    for other in base.cells:
        if all(other[k] == cell[k] for k in ("batch", "input", "output")):
            if "failed" in other or "failed" in cell:
                return None
            return float(cell["tokens_per_s"] / other["tokens_per_s"])
    return None

"""The command that measures what a model knows: eval."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewbit.cli.common import (
    SCHEMA,
    DeviceOption,
    JsonOption,
    QuietOption,
    SeedOption,
    VerboseOption,
    device_of,
    note,
    open_model,
    print_json,
    progress,
    read_windows,
)
from fewbit.cli.load import KEY
from fewbit.cli.scores import show
from fewbit.errors import RequestError

if TYPE_CHECKING:
    from fewbit.measure.quality import Quality
    from fewbit.measure.tasks.needle import Needle
    from fewbit.measure.tasks.run import Result
    from fewbit.measure.tasks.source import Asked, Source
    from fewbit.measure.tasks.suite import Suite
    from fewbit.measure.tasks.task import Item

RESULT_SCHEMA = 1
"""Version of the fields that `eval` writes, within the JSON that `--json` prints."""


def evaluate(
    model: Annotated[str, typer.Argument(metavar="DIR|URL", help="Model directory, Hub id, or URL of a server.")],
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", help="Text to predict: .txt or .jsonl, also .gz. With --tasks: the folder of their data."
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", "--against", metavar="DIR|URL", help="The model to hold it against.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", help="By commas: perplexity, mmlu, gauntlet, needle, code, lm-eval:NAME, FILE.yaml."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option("--text", help="With --tasks: text for perplexity, and to hide needles in.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="RUNDIR", help="Folder of answers; a stopped run goes on there."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Questions of each task, drawn by --seed.")
    ] = None,
    scorer: Annotated[
        str, typer.Option("--scorer", help="Of mmlu and needle: loglikelihood or generate.")
    ] = "loglikelihood",
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens of a window.")] = 512,
    stride: Annotated[
        int | None, typer.Option("--stride", min=1, help="Tokens from window to window: they slide [default: --length]")
    ] = None,
    windows: Annotated[int | None, typer.Option("--windows", min=1, help="Use the first N windows only.")] = None,
    needle_lengths: Annotated[
        str | None,
        typer.Option(
            "--needle-lengths", help="Tokens of its texts [default: of 512,1024,2048,4096 what the model takes]"
        ),
    ] = None,
    needle_depths: Annotated[
        str, typer.Option("--needle-depths", help="Where needles lie, in percent, by commas.")
    ] = "0,25,50,75,100",
    allow_code: Annotated[
        bool, typer.Option("--allow-code-execution", help="Run the programs that the model writes (task code).")
    ] = False,
    allow_unconfined: Annotated[
        bool,
        typer.Option("--allow-unconfined-code", help="Run them where nothing keeps them from your files and network."),
    ] = False,
    include: Annotated[
        Path | None, typer.Option("--lm-eval-path", metavar="FOLDER", help="More task descriptions for lm-eval.")
    ] = None,
    at_once: Annotated[int, typer.Option("--at-once", min=1, help="Questions under way at a time.")] = 64,
    max_batch: Annotated[
        int | None, typer.Option("--max-batch", min=1, help="Sequences at a time in the engine.")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option("--max-model-len", min=2, help="Longest sequence [default: the model's, up to 8192]")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", metavar="DIR", help="For a URL: the model's directory.")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--model", help="For a URL: the model's name [default: its first]")
    ] = None,
    json: JsonOption = False,
    device: DeviceOption = None,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """What a model knows, alone and against its base: perplexity and KL divergence of a text, scores of tasks.

    A base gives every score an interval of the difference, flips and recovery. $OPENAI_API_KEY is sent where it is set.
    """
    from fewbit.measure.runfolder import write_object
    from fewbit.measure.tasks.source import Source
    from fewbit.measure.tasks.suite import check_scorer, suite_of

    where = str(device_of(device))
    source = Source(model, where, max_batch, max_model_len, tokenizer, name, os.environ.get(KEY))
    other = None if base is None else replace(source, model=base)
    names = ["perplexity"] if tasks is None else [part.strip() for part in tasks.split(",")]
    if tasks is None:
        if text is not None and data is not None:
            raise RequestError("--data and --text both name a text; --text is for use with --tasks, give one of them")
        text, data = text or data, None
        about_tasks = {
            "--limit": limit, "--needle-lengths": needle_lengths, "--allow-code-execution": allow_code,
            "--allow-unconfined-code": allow_unconfined, "--lm-eval-path": include,
        }  # fmt: skip
        for option, given in about_tasks.items():
            if given:
                raise RequestError(f"{option} is about tasks; give --tasks as well, or leave it out")
    suite = suite_of(
        names, data, scorer=check_scorer(scorer), text=text, needle=_needle(needle_lengths, needle_depths), seed=seed,
        allow_code=allow_code, allow_unconfined=allow_unconfined,
    )  # fmt: skip
    if suite.perplexity and text is None:
        raise RequestError("no text to predict: give it with --data FILE, or with --tasks perplexity --text FILE")
    for option, given in (("--tokenizer", tokenizer), ("--model", name)):
        if given is not None and not any(one.remote for one in (source, other) if one):
            raise RequestError(f"{option} is for a server; {model} is a directory, leave it out")
    job = _Job(
        suite, source, other, output, limit, seed, at_once, include, _Text(text, length, stride, windows, where)
    )  # fmt: skip
    try:
        with progress() as bars:
            made = {"result_schema": RESULT_SCHEMA, **_settings(job, scorer)} | job.run(bars)
    except KeyboardInterrupt:
        if output is None:
            note("nothing was kept; with -o RUNDIR every answer is, and the same command goes on")
        raise
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        write_object(output / "eval.json", {"schema": SCHEMA, "command": "eval", **made})
        note(f"written to {output / 'eval.json'}")
    if json:
        print_json("eval", made)
    else:
        show(made)


@dataclass(frozen=True)
class _Text:
    """A text and how it is cut."""

    path: Path | None
    length: int
    stride: int | None
    count: int | None
    device: str

    @property
    def overlap(self) -> int:
        return 0 if self.stride is None else self.length - self.stride

    def windows(self, folder: Traversable) -> list[list[int]]:
        assert self.path is not None
        return read_windows(self.path, folder, self.length, self.count, self.stride)


@dataclass(frozen=True)
class _Job:
    """Everything that is to be measured, of whom."""

    suite: Suite
    source: Source
    base: Source | None
    output: Path | None
    limit: int | None
    seed: int
    at_once: int
    include: Path | None
    text: _Text

    def run(self, bars: Any) -> dict[str, Any]:
        """The fields of the JSON object that were measured."""
        from fewbit.measure.tasks.harness import harness_report
        from fewbit.measure.tasks.suite import report

        made: dict[str, Any] = {}
        items: dict[str, list[Item]] = {}
        windows: list[list[int]] = []
        by_layer = self.suite.perplexity and not self._mixed
        asking = bool(self.suite.entries) or self._asked_elsewhere
        if asking:
            self._check(items)
        if by_layer:
            made |= flat(self._by_layer(bars))
        if not asking:
            return made
        mine = asyncio.run(self._ask("model", self.source, items, windows, bars))
        other = None if self.base is None else asyncio.run(self._ask("base", self.base, items, windows, bars))
        if self.suite.perplexity and not by_layer:
            from fewbit.measure.tasks.predict import predicted

            made |= flat(predicted(windows, self.text.overlap, mine.losses, None if other is None else other.losses))
        if self.suite.entries:
            made |= report(self.suite, mine.results, None if other is None else other.results, self.seed)
        if self.suite.harness:
            made["lm_eval"] = harness_report(mine.harness, None if other is None else other.harness, self.seed)
        return made

    def _check(self, items: dict[str, list[Item]]) -> None:
        """Whether both can be asked everything, before one answers for hours."""
        from fewbit.measure.tasks.harness import check_harness
        from fewbit.measure.tasks.source import known
        from fewbit.measure.tasks.suite import check_all

        if self.suite.harness:
            check_harness(self.suite.harness, self.include)
        for source in (self.source, self.base):
            if source is not None:
                check_all(self.suite, asyncio.run(known(source)), self.limit, self.seed, items)

    def _by_layer(self, bars: Any) -> Quality:
        import torch

        from fewbit.measure import quality
        from fewbit.measure.journal import Journal, digest
        from fewbit.measure.machine import versions
        from fewbit.measure.runfolder import identity

        checkpoint = open_model(self.source.model)
        against = None if self.base is None else open_model(self.base.model)
        cut = self.text.windows(checkpoint.folder)
        device, journal = torch.device(self.text.device), None
        if self.output is not None:
            held = {"model": identity(checkpoint), "base": against and identity(against)}
            settings = {**held, **versions(device), "windows": digest(cut), "overlap": self.text.overlap}
            journal = Journal(self.output / "text.jsonl", settings, quality.JOURNALLED)
        with nullcontext() if journal is None else journal:
            return quality.evaluate(checkpoint, against, cut, device, bars, self.text.overlap, journal=journal)

    async def _ask(
        self, which: str, source: Source, items: dict[str, list[Item]], windows: list[list[int]], bars: Any
    ) -> _Answers:
        from fewbit.measure.tasks.harness import run_harness
        from fewbit.measure.tasks.predict import losses
        from fewbit.measure.tasks.source import opened
        from fewbit.measure.tasks.suite import ask_all

        def told(stage: str, done: int, total: int) -> None:
            bars(f"{which}, {stage}" if self.base is not None else stage, done, total)

        limits: dict[str, Any] = {"at_once": self.at_once, "progress": told}
        found = _Answers({}, {}, [])
        async with opened(source) as asked:
            with self._journalled(which, asked) as kept:
                if self.suite.perplexity and self._mixed:
                    if not windows:
                        windows += await asyncio.to_thread(self.text.windows, asked.folder)
                    found.losses = await losses(kept, windows, self.text.overlap, **limits)
                if self.suite.harness:
                    found.harness = await run_harness(
                        self.suite.harness, kept, include=self.include, limit=self.limit, seed=self.seed, **limits
                    )
            found.results = await ask_all(
                self.suite, asked, folder=None if self.output is None else self.output / which, limit=self.limit,
                seed=self.seed, items=items, **limits,
            )  # fmt: skip
        return found

    @contextmanager
    def _journalled(self, which: str, asked: Asked) -> Iterator[Asked]:
        """Who is asked, with a journal of what no task of ours keeps: windows of a text, and questions of lm-eval."""
        from fewbit.measure.journal import Journal
        from fewbit.measure.tasks.answer import JournalledAnswerer

        if self.output is None or not self._asked_elsewhere:
            yield asked
            return
        with Journal(self.output / f"{which}.jsonl", asked.key, JournalledAnswerer.NAMES) as journal:
            yield replace(asked, answerer=JournalledAnswerer(asked.answerer, journal))

    @property
    def _asked_elsewhere(self) -> bool:
        """Whether a model is asked what no task of ours asks: windows of a text, or what lm-eval wants."""
        return bool(self.suite.harness) or (self.suite.perplexity and self._mixed)

    @property
    def _mixed(self) -> bool:
        """Whether a server is among those who are measured: a text is then predicted by asking."""
        return any(one.remote for one in (self.source, self.base) if one)


@dataclass
class _Answers:
    """What one model said."""

    results: dict[str, Result]
    harness: dict[str, Any]
    losses: list[Any]


def flat(found: Quality) -> dict[str, Any]:
    """Figures as ``name``, ``name_err``, ``name_low`` and ``name_high``; those that need a base are absent without."""
    from fewbit.measure.quality import Estimate

    fields: dict[str, Any] = {}
    for name, value in vars(found).items():
        if isinstance(value, Estimate):
            fields |= {name: value.value, f"{name}_err": value.error, f"{name}_low": value.low}
            fields[f"{name}_high"] = value.high
        elif value is not None:
            fields[name] = value
    return fields


def _settings(job: _Job, scorer: str) -> dict[str, Any]:
    """What the figures depend on."""
    from fewbit.measure.rows import file_hash
    from fewbit.version import __version__

    made: dict[str, Any] = {
        "fewbit": __version__, "model": job.source.model, "base": job.base and job.base.model,
        "device": None if job.source.remote else job.source.device, "seed": job.seed, "limit": job.limit,
        "scorer": scorer,
    }  # fmt: skip
    if job.suite.perplexity and job.text.path is not None:
        file = job.text.path
        made["text"] = {
            "path": str(file), "sha256": file_hash(file) if file.is_file() else None, "length": job.text.length,
            "stride": job.text.stride or job.text.length,
        }  # fmt: skip
    return made


def _needle(lengths: str | None, depths: str) -> Needle:
    from fewbit.measure.tasks.needle import Needle

    wanted = None if lengths is None else _numbers("--needle-lengths", lengths)
    return Needle(wanted, _numbers("--needle-depths", depths))


def _numbers(option: str, text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise RequestError(f"{option} {text}: expected whole numbers by commas")
    return tuple(map(int, parts))

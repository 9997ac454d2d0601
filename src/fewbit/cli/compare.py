"""compare: what several models, or several formats of one shape, cost and gain; the table that papers print."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewbit.cli.common import (
    DeviceOption,
    JsonOption,
    QuietOption,
    SeedOption,
    VerboseOption,
    device_of,
    note,
    print_json,
    size,
    table,
)
from fewbit.cli.offline import (
    BatchOption,
    HeadOption,
    InputOption,
    KVOption,
    OutputOption,
    RetryOption,
    RunsOption,
    Subject,
    cells_of,
    peak_words,
    row_of,
    subject_of,
)
from fewbit.errors import RequestError

if TYPE_CHECKING:
    import torch

    from fewbit.measure.compare import Comparison, Entry

QUALITY = ["perplexity", "KL", "top-1 as base", "score", "of the base"]
NONE = "none"
"""The recipe that leaves a shape as it is: the base."""


def compare(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="[BASE A B ...]", help="Model directories; the first is the base.")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option("--config", help="In their place: random weights of a built-in shape, or of a config.json."),
    ] = None,
    recipes: Annotated[
        str | None, typer.Option("--recipes", help="Formats of random weights, by commas; the base is BF16.")
    ] = None,
    kv: KVOption = None,
    head: HeadOption = None,
    batch: BatchOption = "1,32",
    input_tokens: InputOption = "2048",
    output_tokens: OutputOption = "512",
    runs: RunsOption = 3,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", help="Text to predict, .txt or .jsonl (.gz): adds columns of quality. With --tasks their folder."
        ),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option("--tasks", help="Tasks by commas, as eval knows them: adds their mean score.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option("--text", help="With --tasks: text for perplexity, and to hide needles in.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="With --tasks: questions of each.")] = None,
    allow_code: Annotated[
        bool, typer.Option("--allow-code-execution", help="Run the programs that the models write (task code).")
    ] = False,
    allow_unconfined: Annotated[
        bool,
        typer.Option("--allow-unconfined-code", help="Run them where nothing keeps them from your files and network."),
    ] = False,
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens of a window of that text.")] = 512,
    windows: Annotated[int | None, typer.Option("--windows", min=1, help="Use the first N windows only.")] = None,
    run_dir: Annotated[
        Path, typer.Option("--run-dir", help="Where every row is kept; a stopped run goes on from there.")
    ] = Path("compare"),
    retry: RetryOption = False,
    json: JsonOption = False,
    device: DeviceOption = None,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Memory, speed and quality of several models beside a base: one process each, one line for each row.

    --kv and --head are of all but the base. A row that fails is a line with the reason.
    """
    from fewbit.measure import compare as room
    from fewbit.measure.runfolder import RunFolder

    _check(models, config, recipes, kv, head, data, tasks)
    for option, given in (("--text", text), ("--limit", limit)):
        if given and tasks is None:
            raise RequestError(f"{option} is about tasks; give --tasks as well")
    questions = {} if tasks is None else _questions(tasks, data, text, seed, allow_code, allow_unconfined)
    where = device_of(device)
    sizes = (batch, input_tokens, output_tokens)
    entries = _entries(where, models or [], config, recipes, kv, head, sizes, runs, seed, run_dir)
    if data is not None or tasks is not None:
        asked = [("--data", data), ("--tasks", tasks), ("--text", text), ("--limit", limit), ("--length", length)]
        asked += [("--windows", windows), ("--seed", seed if tasks else None)]
        flags = [("--allow-code-execution", allow_code), ("--allow-unconfined-code", allow_unconfined)]
        allowed = [option for option, given in flags if given]
        entries = _with_quality(entries, models or [], asked, where, questions, run_dir, allowed)
    folder = RunFolder(run_dir)
    total = sum(len(entry.speed) + (entry.quality is not None) for entry in entries)
    try:
        for number, entry in enumerate(entries):
            done = len(entry.speed) - len(room.missing(entry, folder, retry))
            note(f"{entry.label} ({number + 1} of {len(entries)}): {done} of {len(entry.speed)} rows are in {run_dir}")
            room.measure_speed(entry, folder, retry, _tell(entry.label))
        for entry in entries:
            room.measure_quality(entry, folder, retry, _tell(entry.label))
    except KeyboardInterrupt:
        there = sum(len(found.cells) + bool(found.quality) for found in (room.known(e, folder) for e in entries))
        note(f"stopped with {there} of {total} rows in {run_dir}; the same command goes on from there")
        raise
    found = [room.known(entry, folder) for entry in entries]
    judged = any(one.quality and "failed" not in one.quality for one in found)
    if not judged and all("failed" in cell for one in found for cell in one.cells):
        raise RequestError(f"every row failed: {found[0].cells[0]['failed']}")
    others = room.left_out(entries, folder)
    if json:
        fields = {"base": found[0].label, "models": [vars(one) for one in found], "left_out": others}
        return print_json("compare", fields)
    _print(found)
    for other, count in others.items():
        print(f"left out: {count} rows of {other}, which fewbit report shows")
    note(f"every row is in {run_dir}; fewbit report {run_dir} draws them")
    return None


def _check(
    models: Sequence[str] | None, config: str | None, recipes: str | None, kv: str | None, head: str | None,
    data: Path | None, tasks: str | None,
) -> None:  # fmt: skip
    if (not models) == (config is None):
        raise RequestError("give directories, the base first, or --config with --recipes for random weights")
    if config is not None and recipes is None:
        raise RequestError("--config needs --recipes: the formats to compare; for example fp8,int4")
    if models and len(models) < 2:
        raise RequestError(f"{models[0]} alone: expected a base and one directory or more to compare with it")
    for option, given in (("--recipes", recipes), ("--kv", kv), ("--head", head)):
        if models and given:
            raise RequestError(f"{option} is for random weights (--config); a directory's formats are its own")
    if (data is not None or tasks is not None) and config is not None:
        raise RequestError("--data and --tasks: random weights predict nothing; give directories")
    if data is not None and not (data.is_file() or (tasks and data.is_dir())):
        raise RequestError(f"--data {data}: no such file")


def _questions(
    tasks: str, data: Path | None, text: Path | None, seed: int, allow_code: bool, allow_unconfined: bool
) -> dict[str, str]:
    """What decides the questions of each task, as a hash; what `eval` would refuse is refused before anything runs."""
    from fewbit.measure.journal import digest
    from fewbit.measure.tasks.suite import suite_of

    if text is not None and not text.is_file():
        raise RequestError(f"--text {text}: no such file")
    names = [part.strip() for part in tasks.split(",")]
    suite = suite_of(names, data, text=text, seed=seed, allow_code=allow_code, allow_unconfined=allow_unconfined)
    if suite.harness:
        raise RequestError(
            f"--tasks lm-eval:{suite.harness[0]}: compare has no column for tasks of lm-eval; "
            "fewbit eval --against shows them"
        )
    if suite.perplexity and text is None:
        raise RequestError("--tasks perplexity: no text to predict; give it with --text FILE")
    try:
        made = {entry.name: [entry.task.fingerprint(), entry.about] for entry in suite.entries}
    except OSError as error:
        raise RequestError(f"--tasks {tasks}: {error.filename} cannot be read ({error.strerror})") from None
    return {name: digest(what) for name, what in made.items()}


def _entries(
    device: torch.device, models: Sequence[str], config: str | None, recipes: str | None, kv: str | None,
    head: str | None, sizes: tuple[str, str, str], runs: int, seed: int, run_dir: Path,
) -> list[Entry]:  # fmt: skip
    from fewbit.measure.compare import Entry

    cells = cells_of(*sizes)
    found: list[Entry] = []

    def add(label: str, subject: Subject, *words: str) -> None:
        rows = {}
        for cell in cells:
            known = {"batch": cell.batch, "input": cell.prompt, "output": cell.output, "devices": 1, "seed": seed}
            rows[row_of(subject, cell, str(device), runs, seed)] = dict(subject.words) | known
        options = ("--batch", sizes[0], "--input", sizes[1], "--output", sizes[2], "--runs", str(runs))
        rest = ("--seed", str(seed), "--device", str(device), "--run-dir", str(run_dir), "--json")
        found.append(Entry(label, rows, ("bench", "offline", *words, *options, *rest)))

    names = Counter(Path(model).resolve().name for model in models)
    for model in models:
        name = Path(model).resolve().name
        add(name if names[name] == 1 else model, subject_of(device, model, None, None, None, None), model)
    if config is not None and recipes is not None:
        wanted = [name for name in recipes.split(",") if name != NONE]
        if not wanted or not all(wanted) or len(set(wanted)) < len(wanted):
            raise RequestError(f"--recipes {recipes}: expected recipes by commas, each once; for example fp8,int4")
        add("BF16", subject_of(device, None, config, None, None, None), "--config", config)
        for name in wanted:
            options = [("--kv", kv), ("--head", head)]
            given = [word for option, value in options if value for word in (option, value)]
            label = f"{name}{f', {kv} K/V' if kv else ''}{f', {head} head' if head else ''}"
            subject = subject_of(device, None, config, name, kv, head)
            add(label, subject, "--config", config, "--recipe", name, *given)
    return found


def _with_quality(
    entries: Sequence[Entry], models: Sequence[str], asked: Sequence[tuple[str, Any]], device: torch.device,
    questions: Mapping[str, str], run_dir: Path, allowed: Sequence[str],
) -> list[Entry]:  # fmt: skip
    """Entries with a row of `eval`; `asked`: its options, None where they are not given; `questions`: of its tasks."""
    from dataclasses import replace

    from fewbit.measure.machine import versions
    from fewbit.measure.rows import file_hash
    from fewbit.measure.runfolder import Row

    held = [next(iter(entry.speed)).key["model"] for entry in entries]
    ran_with, made = versions(device), []
    options = {option: str(value) for option, value in asked if value is not None}
    digests = {option: file_hash(Path(given)) for option, given in options.items() if Path(given).is_file()}
    for number, (entry, model) in enumerate(zip(entries, models, strict=True)):
        against = ["--against", models[0]] if number else []
        key = {
            "model": held[number], "against": held[0] if number else None, **ran_with, "questions": questions,
            **{option.lstrip("-"): digests.get(option, given) for option, given in options.items()},
        }  # fmt: skip
        given = [word for pair in options.items() for word in pair]
        row = Row("eval", entry.label, key)
        kept = run_dir / ".answers" / Path(row.file).stem  # hidden, since the row says all that a report needs
        words = ["eval", model, *against, *given, *allowed, "--device", str(device), "--json", "-o", str(kept)]
        made.append(replace(entry, quality=row, evaluate=words))
    return made


def _tell(label: str) -> Any:
    return lambda text: note(f"{label}: {text}")


def _print(found: Sequence[Comparison]) -> None:
    from fewbit.measure.compare import speed_up

    base, cells = found[0], [cell for one in found for cell in one.cells]
    shapes = {(c["input"], c["output"]) for c in cells}
    measured = any(one.quality for one in found)
    columns = ["format", "bits", "GPUs", "batch", *(["input + output"] * (len(shapes) > 1)), "memory", "tok/s"]
    columns += ["speed-up", "TTFT ms", "TPOT ms", "MBU", *(QUALITY * measured)]
    rows, failures = [], []
    for one in found:
        quality = _quality(one.quality)
        for c in one.cells:
            where = f"{c['batch']} x {c['input']} + {c['output']}"
            if "failed" in c:
                failures.append(f"failed: {one.label}, {where}: {c['failed']}")
                continue
            gained = speed_up(c, base)
            row = [one.label, f"{c['bits_per_weight']:.2f}", _devices(c), str(c["batch"])]
            row += [f"{c['input']} + {c['output']}"] * (len(shapes) > 1)
            row += [size(c["peak_bytes"]), f"{c['tokens_per_s']:.1f}", "" if gained is None else f"{gained:.2f}"]
            row += [f"{c['first_token_s'] * 1e3:.1f}", f"{c['per_token_s'] * 1e3:.2f}", f"{c['mbu']:.1%}"]
            rows.append(row + quality * measured)
            quality = [""] * len(QUALITY)  # the first row of a model has it
        if any(quality):
            rows.append([one.label, *[""] * (len(columns) - 1 - len(quality)), *quality])
        if "failed" in one.quality:
            failures.append(f"failed: {one.label}, quality: {one.quality['failed']}")
    table(columns, rows)
    for text in failures:
        print(text)
    good = [c for c in cells if "failed" not in c]
    if len(shapes) == 1:
        print(f"prompts of {cells[0]['input']} tokens, answers of {cells[0]['output']}, the median of the runs")
    for words in dict.fromkeys(peak_words(c) for c in good if c["peak"] != "measured"):
        print(words)
    if any(c["peak"] == "measured" for c in good):
        print("MBU is of the bandwidth that a copy or a sum reached in the same process")


def _devices(cell: Mapping[str, Any]) -> str:
    return "0" if cell["environment"]["device"].startswith("CPU") else str(cell["devices"])


def _quality(found: Mapping[str, Any]) -> list[str]:
    """Perplexity, KL divergence and agreement with their standard errors; the tasks' score, and what of the base's."""
    cells = [""] * len(QUALITY)
    if found.get("perplexity") is not None:
        cells[0] = f"{found['perplexity']:.3f} ± {found['perplexity_err']:.3f}"
    if found.get("kl_mean") is not None:
        cells[1] = f"{found['kl_mean']:.4f} ± {found['kl_mean_err']:.4f}"
        cells[2] = f"{found['top1_agreement']:.1%} ± {found['top1_agreement_err']:.1%}"
    if tasks := list((found.get("tasks") or {}).values()):
        cells[3] = f"{sum(t['accuracy'] for t in tasks) / len(tasks):.1%}"
        beside = [t["paired"] for t in tasks if t.get("paired") and t["paired"]["recovery"] is not None]
        if beside:
            cells[4] = "{:.1%} ({:.1%} to {:.1%})".format(*_recovery(beside))
            cells[4] += f", {len(beside)} of {len(tasks)} tasks" if len(beside) < len(tasks) else ""
    return cells


def _recovery(tasks: Sequence[Mapping[str, float]]) -> tuple[float, float, float]:
    """The mean recovery of tasks, and an interval.

    Of several tasks that of each is squared, added and its root taken, below and above by themselves (MOVER: Zou and
    Donner, Statistics in Medicine 27, 2008).
    """
    mean = sum(t["recovery"] for t in tasks) / len(tasks)
    below = math.hypot(*(t["recovery"] - t["recovery_low"] for t in tasks)) / len(tasks)
    above = math.hypot(*(t["recovery_high"] - t["recovery"] for t in tasks)) / len(tasks)
    return mean, mean - below, mean + above

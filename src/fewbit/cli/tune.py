"""The command that chooses: tune."""

from __future__ import annotations

import json as json_
import random
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewbit.cli.common import (
    SCHEMA,
    DeviceOption,
    JsonOption,
    ModelArgument,
    QuietOption,
    SeedOption,
    VerboseOption,
    device_of,
    note,
    open_model,
    print_json,
    progress,
    table,
)
from fewbit.errors import RecipeError, UnsupportedError

if TYPE_CHECKING:
    from fewbit.checkpoint import Checkpoint
    from fewbit.measure.tune import Goal, Outcome, Row


def tune(
    model: ModelArgument,
    target: Annotated[
        str,
        typer.Option("--target", help="Bounds by commas: 'recovery>=0.99, ttft_ms<=200' (a wrong name lists them)."),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write the best checkpoint to.")],
    minimize: Annotated[
        str | None, typer.Option("--minimize", help="What is to be least [default: time_per_token_ms]")
    ] = None,
    maximize: Annotated[str | None, typer.Option("--maximize", help="Or what is to be most.")] = None,
    recipes: Annotated[
        str | None, typer.Option("--recipes", help="Recipes to try, by commas: built-in, files, or tune's own.")
    ] = None,
    kv: Annotated[
        str | None,
        typer.Option("--kv", help="Formats of K and V to try, by commas; none: as it is."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Text to judge by [default: the end of the shipped text]")
    ] = None,
    windows: Annotated[int, typer.Option("--windows", min=2, help="Windows to judge by.")] = 48,
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens of a window.")] = 256,
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", help="By commas, for score and score_recovery: mmlu, gauntlet, FILE.yaml."),
    ] = None,
    task_data: Annotated[
        Path | None, typer.Option("--task-data", metavar="FOLDER", help="Where mmlu and gauntlet lie.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Questions of each task.")] = None,
    calib: Annotated[list[str] | None, typer.Option("--calib", help="Calibration data, as for compress.")] = None,
    calib_windows: Annotated[
        int | None, typer.Option("--calib-windows", min=1, help="Windows to calibrate on.")
    ] = None,
    calib_length: Annotated[int | None, typer.Option("--calib-length", min=1, help="Tokens of each.")] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Speed: sequences at a time.")] = 1,
    prompt: Annotated[int, typer.Option("--prompt", min=1, help="Speed: tokens of each prompt.")] = 128,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Speed: tokens of each answer.")] = 64,
    runs: Annotated[int, typer.Option("--runs", min=1, help="Speed: runs that are counted.")] = 3,
    budget: Annotated[
        float | None, typer.Option("--budget", metavar="MINUTES", help="Stop after so long, with what is known.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option("--run", help="Folder of the search, to go on from [default: OUTPUT.tune]")
    ] = None,
    exhaustive: Annotated[bool, typer.Option("--exhaustive", help="Drop no candidate early.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a folder that is not empty.")] = False,
    json: JsonOption = False,
    device: DeviceOption = None,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Find the recipe that meets targets of quality and speed on this machine and is best in one figure."""
    from fewbit.checkpoint import check_target
    from fewbit.measure import tune as room
    from fewbit.measure.journal import Journal, digest
    from fewbit.measure.machine import versions
    from fewbit.measure.runfolder import identity
    from fewbit.measure.tasks.source import Source

    goal = room.read_goal(target, minimize, maximize)
    if goal.asks and tasks is None:
        raise RecipeError("score and score_recovery are of tasks; say of which: --tasks FILE.yaml")
    for option, given in (("--tasks", tasks), ("--task-data", task_data), ("--limit", limit)):
        if given is not None and not goal.asks:
            raise RecipeError(f"{option} is for a goal that names score or score_recovery; name one, or leave it out")
    if budget is not None and not budget > 0:
        raise RecipeError(f"--budget {budget:g}: expected minutes above 0")
    calibration = _calibration(calib, calib_windows, calib_length)
    tried = room.candidates(
        room.names() if recipes is None else recipes.split(","),
        room.kv_names() if kv is None else kv.split(","),
        calibration,
    )
    where = device_of(device)
    checkpoint = open_model(model)
    check_target(output, force, checkpoint.path)
    _check(checkpoint, prompt + tokens, length)
    cut = _windows(checkpoint, data, windows, length, calibration, seed)
    asked = None
    if tasks is not None:
        names = tuple(name.strip() for name in tasks.split(","))
        asked = room.questions(names, task_data, Source(str(checkpoint.path), str(where)), limit, seed)
    folder = run or output.absolute().parent / f"{output.name}.tune"
    settings = {
        **(ran_with := versions(where)), "model": f"{checkpoint.path.resolve()} {identity(checkpoint)}",
        "target": ", ".join(map(str, goal.targets)), "objective": goal.objective.name,
        "candidates": ", ".join(c.name for c in tried), "recipes": digest([c.text for c in tried]),
        "device": f"{where} {ran_with['device']}", "windows": windows, "length": length, "seed": seed,
        "data": f"{data or 'the shipped text'} {digest(cut)}", "batch": batch, "prompt": prompt, "tokens": tokens,
        "runs": runs, "exhaustive": exhaustive, "tasks": asked and f"{tasks} {asked.about}",
    }  # fmt: skip
    if folder.is_file():
        raise RecipeError(f"--run {folder} is a file; expected the folder of a search, or a new one")
    if folder.resolve().is_relative_to(output.resolve()):
        raise RecipeError(
            f"--run {folder} lies in -o {output}, which the best checkpoint replaces; give a folder outside"
        )
    deadline = None if budget is None else time.monotonic() + budget * 60
    protocol = room.Protocol(checkpoint.path, str(where), batch, prompt, tokens, runs)
    note(f"{len(tried)} candidates for the {goal}; the search is kept in {folder}")
    with Journal(folder / "journal.jsonl", settings, room.JOURNALLED, "--run") as journal:
        if len(journal):
            note(f"going on after {len(journal)} measurements of an earlier run")
        workers = room.Workers(protocol, folder, cut, deadline, progress, asked)
        weights = asked.weights if asked else ()
        search = room.Search(tried, goal, workers, journal, len(cut), weights, exhaustive=exhaustive, tell=note)
        outcome = search.run()
        _write_result(folder, goal, outcome)
        if outcome.best is not None:
            workers.deadline = None
            workers.deliver(search.candidates[outcome.best], output, force)
    fields = {
        "goal": str(goal),
        "windows": len(cut),
        "questions": len(asked or ()),
        "output": str(output),
        "run": str(folder),
        **asdict(outcome),
    }
    if outcome.best is None:
        fields["output"] = None
    if json:
        print_json("tune", fields)
    else:
        _show(goal, outcome, len(cut))
    if not outcome.whole:
        note(f"--budget {budget:g}: the time was up before the search ended; the same command goes on")
    if outcome.best is None:
        raise UnsupportedError(_nobody(goal, outcome))
    if not json:
        _show_best(goal, outcome, output)


def _calibration(calib: list[str] | None, count: int | None, length: int | None) -> dict[str, Any]:
    """The keys of a recipe's ``calib`` that the command line sets."""
    from fewbit.compress.recipe import source_of

    for text in calib or ():
        source_of(text, "--calib")
    given = {"samples": count, "length": length, "data": calib}
    return {key: value for key, value in given.items() if value}


def _check(checkpoint: Checkpoint, sequence: int, length: int) -> None:
    if checkpoint.quant or checkpoint.kv:
        raise UnsupportedError(
            f"{checkpoint.path} is already quantized ({checkpoint.format}); start from the original weights"
        )
    context = checkpoint.spec.context
    for option, size in (("--prompt and --tokens together", sequence), ("--length", length)):
        if size > context:
            raise RecipeError(f"{option}: {size} tokens exceed the {context} positions the model was made for")


def _windows(
    checkpoint: Checkpoint, data: Path | None, count: int, length: int, calibration: dict[str, Any], seed: int
) -> list[list[int]]:
    """Windows to judge by, in a random order: what is seen first is then a sample of all."""
    from fewbit.compress.data import shipped_text
    from fewbit.compress.recipe import Calibration
    from fewbit.text.tokenizer import Tokenizer
    from fewbit.text.windows import read_documents, windows

    tokenizer = Tokenizer.load(checkpoint.folder)
    found = windows(read_documents(data or shipped_text()), tokenizer, length, count if data else None)
    if data is None:
        usual = Calibration()
        read = calibration.get("samples", usual.samples) * calibration.get("length", usual.length)
        if "data" not in calibration and (len(found) - count) * length < read:
            raise RecipeError(
                f"the shipped text has no {count} windows of {length} tokens that calibration on {read} tokens leaves; "
                "give --data, or fewer --windows"
            )
        found = found[-count:]
    if len(found) < count:
        raise RecipeError(f"the data hold {len(found)} windows of {length} tokens, asked for {count}; see --windows")
    if min(map(len, found)) < 2:
        raise RecipeError(f"a window of {data} holds less than two tokens, so there is nothing to predict")
    random.Random(seed).shuffle(found)
    return found


def _write_result(folder: Path, goal: Goal, outcome: Outcome) -> None:
    whole = {"schema": SCHEMA, "command": "tune", "goal": str(goal), **asdict(outcome)}
    (folder / "result.json").write_text(json_.dumps(whole, indent=1) + "\n", "utf8")


_COLUMNS = (
    ("bits", "bits_per_weight", ".2f"),
    ("GB", "memory_gb", ".3g"),
    ("TTFT ms", "ttft_ms", ".4g"),
    ("ms/token", "time_per_token_ms", ".4g"),
    ("tokens/s", "tokens_per_s", ".4g"),
    ("recovery", "recovery", ".4f"),
    ("KL", "kl", ".4f"),
    ("top-1", "top1", ".3f"),
    ("score", "score", ".4f"),
    ("of base", "score_recovery", ".4f"),
)


def _show(goal: Goal, outcome: Outcome, total: int) -> None:
    rows = [
        _line(outcome.base, goal, ""),
        *(_line(row, goal, _remark(row, goal, outcome, total)) for row in outcome.rows),
    ]
    table(["candidate", *(title for title, _, _ in _columns(goal)), "windows", ""], rows)


def _columns(goal: Goal) -> tuple[tuple[str, str, str], ...]:
    """Title, figure and format; of tasks only where the goal is about them."""
    return _COLUMNS if goal.asks else _COLUMNS[:-2]


def _line(row: Row, goal: Goal, remark: str) -> tuple[str, ...]:
    figures = (f"{row.figures[name]:{fmt}}" if name in row.figures else "" for _, name, fmt in _columns(goal))
    return row.name, *figures, str(len(row.windows) or ""), remark


def _remark(row: Row, goal: Goal, outcome: Outcome, total: int) -> str:
    if row.failed:
        return f"cannot be: {row.out}"
    if row.out is not None:
        return row.out
    if not row.windows:
        return "not reached"
    missed = goal.missed(row.figures)
    words = ["misses " + ", ".join(map(str, missed))] if missed else []
    words += ["best"] if row.name == outcome.best else ["on the front"] if row.name in outcome.front else []
    words += [f"{len(row.windows)} of {total} windows"] if len(row.windows) < total else []
    return "; ".join(words)


def _nobody(goal: Goal, outcome: Outcome) -> str:
    if not outcome.nearest:
        return "no candidate could be measured; nothing was written"
    said = []
    for name in outcome.nearest:
        row = outcome.row(name)
        missed = ", ".join(f"{t.figure.name} {row.figures[t.figure.name]:.4g}" for t in goal.missed(row.figures))
        said.append(f"{name} ({missed or 'not measured to the end'})")
    if not outcome.whole and not any(row.windows for row in outcome.rows):
        return (
            f"the budget ended before any quality was measured; nothing was written, nearest so far: {', '.join(said)}"
        )
    return f"no candidate meets {', '.join(map(str, goal.targets))}; nothing was written. Nearest: {', '.join(said)}"


def _show_best(goal: Goal, outcome: Outcome, output: Path) -> None:
    assert outcome.best is not None
    name, axes = goal.objective.name, goal.axes
    best = outcome.row(outcome.best)
    print()
    print(f"the front over {', '.join(axis.name for axis in axes)}: {', '.join(outcome.front)}")
    print(f"best: {best.name}, {', '.join(f'{axis.name} {best.figures[axis.name]:.4g}' for axis in axes)}")
    print(
        f"written: {output}; its recipe.yaml makes it again: fewbit compress MODEL --recipe {output}/recipe.yaml -o DIR"
    )
    base = outcome.base.figures
    if name in base and goal.objective.cost(base[name]) < goal.objective.cost(best.figures[name]):
        note(f"the model as it was is better here: {name} {base[name]:.4g}")
    if close := _close(goal, outcome):
        note(close)


def _close(goal: Goal, outcome: Outcome) -> str | None:
    """That the next one may be as fast as the best, as far as runs of a model agree; None: it is not."""
    assert outcome.best is not None
    name, best = goal.objective.name, outcome.row(outcome.best)
    others = [row for row in outcome.rows if row is not best and row.out is None and name in row.figures]
    others = [row for row in others if not goal.missed(row.figures)]
    if goal.objective.kind != "speed" or not others:
        return None
    second = min(others, key=lambda row: goal.objective.cost(row.figures[name]))
    gap = abs(second.figures[name] / best.figures[name] - 1)
    speeds = [(row.figures["slowest_tokens_per_s"], row.figures["fastest_tokens_per_s"]) for row in (best, second)]
    spread = max(fastest / slowest - 1 for slowest, fastest in speeds)
    words = f"{second.name} differs from it by {gap:.1%} in {name}; "
    if not spread:
        return f"{words}one run of each does not say whether that is more than chance, see --runs"
    return f"{words}tokens/s of one model differed by up to {spread:.1%} between runs" if gap < spread else None

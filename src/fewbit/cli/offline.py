"""bench offline: the speed of static batches, in every combination of batch, prompt and answer that is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
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
    open_model,
    print_json,
    size,
    table,
)
from fewbit.errors import FewbitError, RequestError

if TYPE_CHECKING:
    import torch

    from fewbit.checkpoint import Checkpoint
    from fewbit.compress.recipe import Recipe
    from fewbit.measure.offline import Bench, Cell
    from fewbit.measure.runfolder import Row, RunFolder

BatchOption = Annotated[str, typer.Option("--batch", help="Sequences at a time; several by commas.")]
InputOption = Annotated[str, typer.Option("--input", help="Tokens of each prompt; several by commas.")]
OutputOption = Annotated[str, typer.Option("--output", help="Tokens of each answer; several by commas.")]
RunsOption = Annotated[int, typer.Option("--runs", min=1, help="Runs that are counted.")]
KVOption = Annotated[str | None, typer.Option("--kv", help="Format of K and V: fp8, int8.")]
HeadOption = Annotated[
    str | None, typer.Option("--head", help="Format of the head's weights: fp8, int4 [default: as the model]")
]
RetryOption = Annotated[bool, typer.Option("--retry", help="Measure rows again that failed in an earlier run.")]


@dataclass(frozen=True)
class Subject:
    """What is measured: a model directory, or a shape with random weights.

    Attributes:
        checkpoint: it.
        shape: config.json and recipe of random weights; None: a directory's own weights.
        key: of it in a row's key.
        words: of it in a row's object.
    """

    checkpoint: Checkpoint
    shape: tuple[dict[str, Any], Recipe] | None
    key: Mapping[str, Any]
    words: Mapping[str, Any]


def offline(
    model: Annotated[str | None, typer.Argument(metavar="[DIR]", help="Model directory, or a Hub id.")] = None,
    config: Annotated[
        str | None,
        typer.Option("--config", help="Random weights of a built-in shape, or of a folder or file with a config.json."),
    ] = None,
    recipe: Annotated[str | None, typer.Option("--recipe", help="Recipe of random weights; none: BF16.")] = None,
    kv: KVOption = None,
    head: HeadOption = None,
    batch: BatchOption = "1",
    input_tokens: InputOption = "2048",
    output_tokens: OutputOption = "512",
    runs: RunsOption = 3,
    profile: Annotated[
        bool, typer.Option("--profile", help="On a GPU also the time of each kernel in a decode step.")
    ] = False,
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", help="Keep each row here as it ends, and skip those that are here.")
    ] = None,
    retry: RetryOption = False,
    json: JsonOption = False,
    device: DeviceOption = None,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Speed of static batches through the engine: tokens/s, TTFT, TPOT, MBU, MFU, memory.

    Every combination of --batch, --input and --output is a row. One that fails is a row with the reason.
    """
    from fewbit.measure.runfolder import RunFolder

    if (model is None) == (config is None):
        raise RequestError(
            "give what is to be measured: a model directory, or --config for random weights; one of them"
        )
    if retry and run_dir is None:
        raise RequestError("--retry is about the rows of a folder; give --run-dir as well")
    where = device_of(device)
    cells = cells_of(batch, input_tokens, output_tokens)
    subject = subject_of(where, model, config, recipe, kv, head)
    folder = RunFolder(run_dir) if run_dir else None
    rows = [row_of(subject, cell, str(where), runs, seed) for cell in cells]
    found: dict[Cell, dict[str, Any]] = {}
    for cell, row in zip(cells, rows, strict=True):
        known = folder.read(row) if folder else None
        if known and not (retry and "failed" in known["cells"][0]):
            found[cell] = known["cells"][0]
    if found:
        note(f"{len(found)} of {len(cells)} rows are in {run_dir} already")
    todo = {cell: row for cell, row in zip(cells, rows, strict=True) if cell not in found}
    for cell, made in measured(subject, where, todo, folder, runs, seed, profile):
        found[cell] = made
        if not json and (len(cells) > 1 or "failed" not in made):
            _print(cell, made, first=len(found) == 1)
    ordered = [found[cell] for cell in cells]
    if all("failed" in made for made in ordered):
        raise RequestError(ordered[0]["failed"])
    if json:
        print_json("bench offline", {"cells": ordered})
    elif len(cells) > 1 or not todo:
        print(end="\n" if todo else "")
        print_cells(ordered)


def measured(
    subject: Subject, device: torch.device, todo: Mapping[Cell, Row], folder: RunFolder | None, runs: int, seed: int,
    profile: bool,
) -> Any:  # fmt: skip
    """Measure cells one after another and keep each; yields a cell and its object."""
    from torch import OutOfMemoryError

    from fewbit.measure.machine import machine

    bench: Bench | None = None
    hopeless: str | None = None
    for cell, row in todo.items():
        made: dict[str, Any] = dict(subject.words)
        made |= {"batch": cell.batch, "input": cell.prompt, "output": cell.output, "devices": 1, "seed": seed}
        try:
            if hopeless is None and bench is None:
                bench = _bench(subject, device, list(todo))
            if bench is not None:
                made |= asdict(bench.run(cell, runs, seed, profile))
            else:
                made["failed"] = hopeless
        except (FewbitError, OutOfMemoryError, MemoryError) as error:
            made["failed"] = " ".join(str(error).split()) or type(error).__name__
            hopeless = made["failed"] if bench is None else None
        made["environment"] = machine(device)
        if folder:
            folder.write(row, {"cells": [made]})
        yield cell, made


def _bench(subject: Subject, device: torch.device, cells: Sequence[Cell]) -> Bench:
    from fewbit.measure.offline import Bench

    return Bench(subject.checkpoint, device, cells, shape=subject.shape, tell=note)


def subject_of(
    device: torch.device, model: str | None, config: str | None, recipe: str | None, kv: str | None, head: str | None
) -> Subject:
    """What a user means by a directory, or by a shape, a recipe and formats of K and V and of the head.

    Raises:
        RequestError: options that say nothing about a directory.
    """
    if model is not None:
        for option, given in (("--recipe", recipe), ("--kv", kv), ("--head", head)):
            if given:
                raise RequestError(f"{option} is for random weights (--config); a directory's formats are its own")
        from fewbit.measure.runfolder import identity

        checkpoint = open_model(model)
        label = checkpoint.path.resolve().name
        words = {"model": label, "config": None, "recipe": None, "kv": None, "head": None, "path": str(model)}
        return Subject(checkpoint, None, {"model": identity(checkpoint)}, words)
    from fewbit.compress.recipe import AS_IT_WAS, read_recipe
    from fewbit.measure.dummy import dummy_checkpoint

    assert config is not None
    shape = shape_of(config)
    chosen = (read_recipe(recipe) if recipe else AS_IT_WAS).with_kv(kv).with_head(head)
    words = {"model": None, "config": config, "recipe": recipe and chosen.name, "kv": kv, "head": head}
    key = {"config": shape, "recipe": chosen.text if recipe else None, "kv": kv, "head": head}
    return Subject(dummy_checkpoint(shape, chosen, device), (shape, chosen), key, words)


def row_of(subject: Subject, cell: Cell, device: str, runs: int, seed: int) -> Row:
    """The row of a cell."""
    from fewbit.measure.machine import versions
    from fewbit.measure.runfolder import Row
    from fewbit.ops.device import device_named

    name = "-".join(str(subject.words[k]) for k in ("model", "config", "recipe", "kv", "head") if subject.words[k])
    key = {**subject.key, **asdict(cell), "runs": runs, "seed": seed, **versions(device_named(device))}
    return Row("bench offline", f"{name} b{cell.batch} {cell.prompt}+{cell.output}", key)


def shape_of(config: str) -> dict[str, Any]:
    """The config.json of a built-in shape, a folder or a file."""
    from fewbit.checkpoint.files import read_json
    from fewbit.measure.dummy import shape_named

    path = Path(config)
    file = path / "config.json" if path.is_dir() else path
    return read_json(file) if path.exists() else shape_named(config)


def cells_of(batch: str, prompt: str, output: str) -> list[Cell]:
    """Every combination, each once.

    Raises:
        RequestError: no list of numbers.
    """
    from fewbit.measure.offline import Cell

    lists = (_numbers("--input", prompt, 1), _numbers("--output", output, 2), _numbers("--batch", batch, 1))
    return [Cell(b, i, o) for i, o, b in product(*lists)]


def _numbers(option: str, text: str, least: int) -> list[int]:
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and int(part) >= least for part in parts):
        raise RequestError(f"{option} {text}: expected numbers from {least} on, by commas; for example 8,32")
    return list(dict.fromkeys(map(int, parts)))


def print_cells(cells: Sequence[Mapping[str, Any]]) -> None:
    """A line a row, and the reasons of those that failed."""
    columns = ["batch x input + output", "tok/s", "TTFT ms", "TPOT ms", "MBU", "MFU", "memory"]
    good = [c for c in cells if "failed" not in c]
    if good:
        table(
            columns,
            [
                (
                    f"{c['batch']} x {c['input']} + {c['output']}", f"{c['tokens_per_s']:.1f}",
                    f"{c['first_token_s'] * 1e3:.1f}", f"{c['per_token_s'] * 1e3:.3f}", f"{c['mbu']:.1%}",
                    f"{c['mfu']:.1%}", size(c["peak_bytes"]),
                )
                for c in good
            ],
        )  # fmt: skip
        for words in dict.fromkeys(peak_words(c) for c in good):
            print(words)
    for c in cells:
        if "failed" in c:
            print(f"failed: {c['batch']} x {c['input']} + {c['output']}: {c['failed']}")


def peak_words(cell: Mapping[str, Any]) -> str:
    """Of which peaks MBU and MFU are shares."""
    whose = cell["peak"].replace("vendor: ", "the vendor's of ")
    memory, flops = cell["peak_bytes_per_s"] / 1e12, cell["peak_flops_per_s"] / 1e12
    if whose == "measured":
        whose = "measured here"
        return f"MBU and MFU are of {memory * 1e3:.1f} GB/s and {flops * 1e3:.0f} GFLOP/s, {whose}"
    return f"MBU and MFU are of {memory:.2f} TB/s and {flops:.0f} TFLOP/s, {whose}"


def _print(cell: Cell, made: Mapping[str, Any], first: bool) -> None:
    print(*([] if first else [""]), f"{'row':22} {cell}", sep="\n")
    if "failed" in made:
        print(f"{'failed':22} {made['failed']}")
        return
    for name, text in _lines(made):
        print(f"{name:22} {text}")
    total = sum(entry["seconds"] for entry in made["kernels"].values())
    for name, entry in made["kernels"].items():
        share, count = entry["seconds"] / total, int(entry["count"])
        print(f"{entry['seconds'] * 1e6:10.1f} µs {share:6.1%} {count:5} x {name[:80]}")


def _lines(r: Mapping[str, Any]) -> list[tuple[str, str]]:
    top, graph = r["ceilings"], r["graph_s"]
    over = "" if graph is None else f", {r['step_s'] / graph - 1:+.1%} over the bare graph's {graph * 1e3:.3f}"
    lines = [
        ("tokens/s", f"{r['tokens_per_s']:.1f}  ({r['slowest']:.1f}–{r['fastest']:.1f})"),
        ("of the limit", f"{r['of_limit']:.1%} of {r['limit_tokens_per_s']:.0f} tokens/s at the ceilings"),
        ("first token (TTFT)", f"{r['first_token_s'] * 1e3:.1f} ms"),
        ("per token (TPOT)", f"{r['per_token_s'] * 1e3:.3f} ms"),
        ("MBU, MFU", f"{r['mbu']:.1%}, {r['mfu']:.1%}; {peak_words(r).removeprefix('MBU and MFU are ')}"),
        ("engine step", f"{r['step_s'] * 1e3:.3f} ms{over}"),
        ("decode reads", f"{_per_s(r['bytes_per_s'], 'B')}, {r['bandwidth']:.1%} of copy ({_per_s(top['copy'], 'B')})"),
        ("prompts compute", f"{_per_s(r['flops_per_s'], 'FLOP')}, {r['compute']:.1%} of a large product"),
        ("ceilings", f"{_per_s(top['bf16'], 'FLOP')}, with 8-bit inputs {_per_s(top['eight'], 'FLOP')}"),
        (
            "memory",
            f"weights {size(r['weight_bytes'])} ({r['bits_per_weight']:.2f} bits a weight stored), "
            f"K/V {size(r['kv_bytes'])}, peak {size(r['peak_bytes'])}",
        ),
    ]
    if r["difference"] is not None:
        text = f"logits differ by {r['difference']:.4f}, same token in {r['agreement']:.0%} of 16 steps"
        lines.append(("against the reference", text))
    return lines


def _per_s(value: float, unit: str) -> str:
    big = value >= 1e12
    return f"{value / (1e12 if big else 1e9):.2f} {'T' if big else 'G'}{unit}/s"

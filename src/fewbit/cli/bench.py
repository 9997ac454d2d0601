"""Commands that time things: bench startup, quantize, step; offline and serve have files of their own."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from fewbit.cli import load
from fewbit.cli.common import (
    DeviceOption,
    JsonOption,
    ModelArgument,
    QuietOption,
    VerboseOption,
    device_of,
    grow_memory,
    note,
    pairs,
    print_json,
    size,
    table,
)
from fewbit.cli.offline import offline as measure_offline
from fewbit.cli.offline import shape_of
from fewbit.errors import RequestError

app = typer.Typer(help="Measure speed.", no_args_is_help=True)


app.command()(measure_offline)
app.command()(load.serve)


@app.command()
def startup(
    model: ModelArgument,
    command: Annotated[
        str | None,
        typer.Option("--command", help="Another server's: 'vllm serve DIR --port {port}' [default: fewbit's]"),
    ] = None,
    cold: Annotated[
        bool, typer.Option("--cold/--warm", help="The model's files out of the page cache, or in it.")
    ] = True,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Starts.")] = 3,
    timeout: Annotated[float, typer.Option("--timeout", min=1, help="Seconds until a start is given up.")] = 600,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Time from the start of a server's process to its first token."""
    from fewbit.checkpoint import locate
    from fewbit.measure.startup import command_of, start_once, words_of

    folder = locate(model)
    words = words_of(command) if command else command_of(folder)
    found = []
    for number in range(repeats):
        note(f"start {number + 1} of {repeats}")
        found.append(start_once(folder, words, cold=cold, timeout_s=timeout))
    if json:
        return print_json(
            "bench startup", {"command_line": words, "cold": cold, "starts": [asdict(one) for one in found]}
        )
    stages = (("listening", "listening_s"), ("ready", "ready_s"), ("first token", "first_token_s"))
    times = {words: sorted(getattr(one, name) for one in found) for words, name in stages}
    table(
        [f"seconds, {repeats} starts", "median", "least", "most"],
        [(name, *(f"{t:.2f}" for t in (median(each), each[0], each[-1]))) for name, each in times.items()],
    )
    shares = [one.cached for one in found]
    print()
    pairs([("page cache", f"{min(shares):.0%} to {max(shares):.0%} of {size(found[0].file_bytes)} in it before")])
    return None


@app.command()
def quantize(
    config: Annotated[str, typer.Option("--config", help="A built-in shape, or a folder or file with a config.json.")],
    recipe: Annotated[str, typer.Option("--recipe", help="Recipe to compress by.")],
    kv: Annotated[
        str | None,
        typer.Option(
            "--kv", help="Also the K/V cache: fp8, int8, int4, or with a scale a head: fp8_head, int8_head, int4_head."
        ),
    ] = None,
    layers: Annotated[int | None, typer.Option("--layers", min=1, help="Only so many of the shape's layers.")] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Windows to calibrate on.")] = 128,
    length: Annotated[int, typer.Option("--length", min=1, help="Tokens of a window.")] = 512,
    folder: Annotated[
        Path | None, typer.Option("--folder", help="Where files may lie meanwhile [default: the system's]")
    ] = None,
    json: JsonOption = False,
    device: DeviceOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Time and memory of a compression, of random weights and tokens."""
    grow_memory()
    from fewbit.compress.recipe import read_recipe
    from fewbit.measure.quantize import measure

    chosen = read_recipe(recipe).with_kv(kv)
    if chosen.auto is not None:
        raise RequestError(f"recipe {chosen.name} decides by measuring a real model; time the recipe that it writes")
    chosen = replace(chosen, calibration=replace(chosen.calibration, samples=samples, length=length))
    found = measure(shape_of(config), chosen, device_of(device), layers=layers, folder=folder, tell=note)
    if json:
        return print_json("bench quantize", {"config": config, "recipe": recipe, "kv": kv} | asdict(found))
    stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in found.seconds.items())
    pairs(
        [
            ("time", f"{found.total_s:.1f} s, {found.layers} layers, {found.tokens:,} tokens of calibration data"),
            ("stages", stages),
            ("peak memory", f"GPU {size(found.device_bytes)}, process {size(found.peak_bytes)}"),
            ("written", f"{size(found.weight_bytes)} of tensors"),
            ("device", found.device),
        ]
    )
    return None


@app.command()
def step(
    config: Annotated[str, typer.Option("--config", help="A built-in shape, or a folder or file with a config.json.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write.")],
    candidates: Annotated[
        str, typer.Option("--candidates", help="Plain recipes by commas; none: the model's own dtype.")
    ] = "none,fp8,int4",
    kv: Annotated[str | None, typer.Option("--kv", help="Format of K and V: fp8, int8.")] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences.")] = 1,
    context: Annotated[int, typer.Option("--context", min=1, help="Tokens of each in the cache.")] = 2048,
    layers: Annotated[
        int, typer.Option("--layers", min=1, help="Of the models that are timed, and twice as many.")
    ] = 4,
    json: JsonOption = False,
    device: DeviceOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Time of a decode step by group of linears and format: the table with which recipe auto plans a speed."""
    from fewbit.measure.steptimes import measure

    names = candidates.split(",")
    if len(set(names)) < 2:
        raise RequestError(f"--candidates {candidates}: expected two or more, by commas; for example none,fp8")
    where = device_of(device)
    if not output.absolute().parent.is_dir():
        raise RequestError(f"--output {output}: there is no folder {output.absolute().parent}")
    found = measure(
        shape_of(config), names, where, kv=kv, batch=batch, context=context, layers=layers, tell=note
    )  # fmt: skip
    found.write(output)
    if json:
        return print_json("bench step", asdict(found))
    rows = [(role, *(f"{times[name] * 1e6:+.1f}" for name in names)) for role, times in found.more.items()]
    table([f"µs a layer, beside {names[0]}", *names], rows)
    print()
    pairs(
        [
            ("a layer", f"{found.layer * 1e6:.1f} µs with every linear as {names[0]}"),
            ("the rest", f"{found.fixed * 1e6:.1f} µs of a step"),
            ("spread", f"rounds of one measurement differ by up to {found.spread:.1%}"),
            ("device", found.device),
            ("written", str(output)),
        ]
    )
    return None

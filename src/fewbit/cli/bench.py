"""Commands that time things: bench offline."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fewbit.cli.common import (
    DeviceOption,
    JsonOption,
    QuietOption,
    VerboseOption,
    device_of,
    note,
    print_json,
    size,
)
from fewbit.errors import RequestError

if TYPE_CHECKING:
    from fewbit.measure.offline import Offline

app = typer.Typer(help="Measure speed.", no_args_is_help=True)


@app.command()
def offline(
    config: Annotated[str, typer.Option("--config", help="A built-in shape, or a folder or file with a config.json.")],
    recipe: Annotated[str | None, typer.Option("--recipe", help="Recipe of the weights; none: BF16.")] = None,
    kv: Annotated[str | None, typer.Option("--kv", help="Format of K and V: fp8, int8.")] = None,
    head: Annotated[
        str | None, typer.Option("--head", help="Format of the head's weights: fp8, int4 [default: as the model]")
    ] = None,
    batch: Annotated[str, typer.Option("--batch", help="Sequences at a time; several sizes by commas.")] = "1",
    input_tokens: Annotated[int, typer.Option("--input", min=1, help="Tokens of each prompt.")] = 2048,
    output_tokens: Annotated[int, typer.Option("--output", min=2, help="Tokens of each answer.")] = 512,
    runs: Annotated[int, typer.Option("--runs", min=1, help="Runs that are counted.")] = 3,
    dummy_weights: Annotated[
        bool, typer.Option("--dummy-weights", help="Random weights; the only kind so far.")
    ] = True,
    profile: Annotated[bool, typer.Option("--profile", help="Also the time of each kernel in a decode step.")] = False,
    json: JsonOption = False,
    device: DeviceOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Speed of a static batch through the engine, against ceilings measured in the same run."""
    from fewbit.checkpoint.files import read_json
    from fewbit.compress.recipe import AS_IT_WAS, read_recipe
    from fewbit.measure.dummy import shape_named
    from fewbit.measure.offline import Bench

    where = device_of(device)
    path = Path(config)
    file = path / "config.json" if path.is_dir() else path
    shape = read_json(file) if path.exists() else shape_named(config)
    chosen = (read_recipe(recipe) if recipe else AS_IT_WAS).with_kv(kv).with_head(head)
    sizes = _sizes(batch)
    bench = Bench(
        shape, chosen, where, prompt=input_tokens, output=output_tokens, largest=max(sizes), tell=note
    )  # fmt: skip
    cells = []
    for size_ in sizes:
        found = bench.run(size_, runs, profile)
        named = {"config": config, "recipe": recipe, "kv": kv, "head": head, "batch": size_}
        cells.append(named | {"input": input_tokens, "output": output_tokens} | asdict(found))
        if not json:
            print(*([] if size_ == sizes[0] else [""]), f"batch                  {size_}", sep="\n")
            _print(found)
    if json:
        return print_json("bench offline", {"cells": cells})
    return None


def _sizes(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise RequestError(f"--batch {text}: expected sizes from 1 on, by commas; for example 1,8,32")
    return [int(part) for part in parts]


def _print(found: Offline) -> None:
    for name, text in _lines(found):
        print(f"{name:22} {text}")
    total = sum(entry["seconds"] for entry in found.kernels.values())
    for name, entry in found.kernels.items():
        share, count = entry["seconds"] / total, int(entry["count"])
        print(f"{entry['seconds'] * 1e6:10.1f} µs {share:6.1%} {count:5} x {name[:80]}")


def _lines(r: Offline) -> list[tuple[str, str]]:
    top = r.ceilings
    return [
        ("tokens/s", f"{r.tokens_per_s:.1f}  ({r.slowest:.1f}–{r.fastest:.1f})"),
        ("of the limit", f"{r.of_limit:.1%} of {r.limit_tokens_per_s:.0f} tokens/s at the ceilings"),
        ("first token", f"{r.first_token_s * 1e3:.1f} ms"),
        ("per token", f"{r.per_token_s * 1e3:.3f} ms"),
        (
            "engine step",
            f"{r.step_s * 1e3:.3f} ms, {r.step_s / r.graph_s - 1:+.1%} over the bare graph's {r.graph_s * 1e3:.3f}",
        ),
        ("decode reads", f"{r.bytes_per_s / 1e12:.2f} TB/s, {r.bandwidth:.1%} of copy ({top.copy / 1e12:.2f})"),
        ("prompts compute", f"{r.flops_per_s / 1e12:.0f} TFLOP/s, {r.compute:.1%} of a large product"),
        ("ceilings", f"BF16 {top.bf16 / 1e12:.0f}, FP8 {top.eight / 1e12:.0f} TFLOP/s"),
        ("memory", f"weights {size(r.weight_bytes)}, K/V {size(r.kv_bytes)}, peak {size(r.peak_bytes)}"),
        ("against the reference", f"logits differ by {r.difference:.4f}, same token in {r.agreement:.0%} of 16 steps"),
    ]

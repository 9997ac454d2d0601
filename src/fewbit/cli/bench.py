"""Commands that time things: bench offline."""

from __future__ import annotations

import json as json_module
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

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
)
from fewbit.errors import RequestError

app = typer.Typer(help="Measure speed.", no_args_is_help=True)


@app.command()
def offline(
    config: Annotated[str, typer.Option("--config", help="A built-in shape, or a folder or file with a config.json.")],
    recipe: Annotated[str | None, typer.Option("--recipe", help="Recipe of the weights; none: BF16.")] = None,
    kv: Annotated[str | None, typer.Option("--kv", help="Format of K and V: fp8, int8.")] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences at a time.")] = 1,
    input_tokens: Annotated[int, typer.Option("--input", min=1, help="Tokens of each prompt.")] = 2048,
    output_tokens: Annotated[int, typer.Option("--output", min=2, help="Tokens of each answer.")] = 512,
    runs: Annotated[int, typer.Option("--runs", min=1, help="Runs that are counted.")] = 3,
    dummy_weights: Annotated[
        bool, typer.Option("--dummy-weights", help="Random weights; the only kind so far.")
    ] = True,
    profile: Annotated[bool, typer.Option("--profile", help="Also the time of each kernel in a decode step.")] = False,
    json: JsonOption = False,
    device: DeviceOption = None,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Speed of a static batch through the engine, against ceilings measured in the same run."""
    from fewbit.compress.recipe import Recipe, read_recipe
    from fewbit.measure.dummy import shape_named
    from fewbit.measure.offline import bench_offline

    where = device_of(device)
    path = Path(config)
    if path.exists():
        path = path / "config.json" if path.is_dir() else path
        shape = json_module.loads(path.read_text())
    else:
        shape = shape_named(config)
    chosen = read_recipe(recipe) if recipe else None
    if kv:
        chosen = (chosen or Recipe("kv", "", ())).with_kv(kv)
    if input_tokens + output_tokens > shape["max_position_embeddings"]:
        raise RequestError(
            f"--input {input_tokens} + --output {output_tokens} exceed the {shape['max_position_embeddings']} "
            f"positions of {config}; ask for fewer"
        )
    found = bench_offline(
        shape,
        chosen,
        where,
        batch=batch,
        prompt=input_tokens,
        output=output_tokens,
        runs=runs,
        profile=profile,
        tell=note,
    )
    if json:
        cell = {
            "config": config,
            "recipe": recipe,
            "kv": kv,
            "batch": batch,
            "input": input_tokens,
            "output": output_tokens,
        }
        return print_json("bench offline", cell | asdict(found))
    for name, text in _lines(found):
        print(f"{name:22} {text}")
    if profile:
        print()
        total = sum(entry["seconds"] for entry in found.kernels.values())
        for name, entry in found.kernels.items():
            share, count = entry["seconds"] / total, int(entry["count"])
            print(f"{entry['seconds'] * 1e6:10.1f} µs {share:6.1%} {count:5} x {name[:80]}")
    return None


def _lines(r: Any) -> list[tuple[str, str]]:
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

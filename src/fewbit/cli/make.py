"""The command that makes a small model: compress."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fewbit.cli.common import (
    DeviceOption,
    EngineOption,
    JsonOption,
    ModelArgument,
    QuietOption,
    SeedOption,
    VerboseOption,
    device_of,
    grow_memory,
    note,
    open_model,
    pairs,
    print_json,
    progress,
    settings,
    size,
    table,
)

if TYPE_CHECKING:
    import torch

    from fewbit.checkpoint import Checkpoint
    from fewbit.compress import Decision, Plan, Report

SAMPLE_TOKENS = 32
SAMPLE_LIMIT = 1 << 30
"""Bytes of float weights up to which a sample is generated unasked: it needs the whole model at once."""


def compress(
    model: ModelArgument,
    recipe: Annotated[
        str, typer.Option("--recipe", help="Built-in recipe (a wrong name lists them), or a file NAME.yaml.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")],
    kv: Annotated[
        str | None,
        typer.Option(
            "--kv", help="Also the K/V cache: fp8, int8, int4, or with a scale a head: fp8_head, int8_head, int4_head."
        ),
    ] = None,
    calib: Annotated[
        list[str] | None,
        typer.Option("--calib", help="Calibration data: .txt, .jsonl (.gz), a saved data set; several as FILE:SHARE."),
    ] = None,
    samples: Annotated[int | None, typer.Option("--samples", min=1, help="Windows to calibrate on.")] = None,
    length: Annotated[int | None, typer.Option("--length", min=1, help="Tokens of a window.")] = None,
    method: Annotated[
        str | None, typer.Option("--method", help="Range of calibrated scales: max, percentile, mse or entropy.")
    ] = None,
    export: Annotated[
        str | None, typer.Option("--export", help="compressed-tensors, hf, gptq or awq. [default: compressed-tensors]")
    ] = None,
    engine: EngineOption = None,
    sample_tokens: Annotated[
        int | None, typer.Option("--sample-tokens", min=0, help="Length of the sample before and after; 0: none.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a folder that is not empty.")] = False,
    json: JsonOption = False,
    device: DeviceOption = None,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Quantize a model by a recipe, write it, open it again and check it."""
    grow_memory()
    from fewbit import compress as room
    from fewbit.checkpoint import check_target, open_checkpoint
    from fewbit.compress.ranks import Ranks, own_gpu
    from fewbit.compress.recipe import source_of
    from fewbit.errors import RecipeError

    where = device_of(own_gpu() or device if device in (None, "cuda") else device)
    ranks = Ranks.join(where)
    settings.quiet = settings.quiet or ranks.rank > 0
    checkpoint = open_model(model)
    chosen = room.read_recipe(recipe).with_kv(kv)
    c = chosen.calibration
    data = tuple(source_of(text, "--calib") for text in calib) if calib else c.data
    c = replace(c, samples=samples or c.samples, length=length or c.length, data=data, seed=seed or c.seed)
    chosen = replace(chosen, calibration=c).with_method(method)
    check_target(output, force, checkpoint.path)
    if export and engine:
        raise RecipeError("--export and --for both name the format; give one of them")
    if engine:
        export = room.dialect(checkpoint, chosen, engine)
    if chosen.auto is not None:
        with progress() as bars:
            decision = ranks.first(lambda: room.decide(checkpoint, chosen, where, bars))
        _show_decision(decision)
        chosen = decision.recipe
    planned = room.plan(checkpoint, chosen, export or "compressed-tensors")
    _show_plan(checkpoint, planned)
    before = _sample(checkpoint, where, sample_tokens) if ranks.rank == 0 else None
    with progress() as bars:
        report = room.compress(checkpoint, planned, output, device=str(where), force=force, ranks=ranks, progress=bars)
    ranks.leave()
    if ranks.rank:
        return
    after = _sample(open_checkpoint(output), where, sample_tokens)
    if json:
        print_json(
            "compress",
            {
                "output": str(output),
                "recipe": chosen.name,
                **vars(report),
                "verified": vars(report.verified),
                "sample_before": before,
                "sample_after": after,
            },
        )
        return
    _show_report(report, output)
    if before is not None and after is not None:
        print(f"\nbefore: {before}\nafter:  {after}")


def _show_plan(checkpoint: Checkpoint, planned: Plan) -> None:
    from fewbit.compress import summary
    from fewbit.compress.data import data_named

    note(f"{planned.recipe.name} -> {planned.export}, for {checkpoint.path}:")
    for names, kind in summary(planned.quant, planned.spec):
        note(f"  {kind}: {names}")
    kv = next(iter(planned.kv.values()), None)
    note(f"  {kv or str(checkpoint.dtype).removeprefix('torch.')}: K and V")
    c = planned.recipe.calibration
    if planned.calibrated:
        note(f"  calibrated on {c.samples} windows of {c.length} tokens of {data_named(c)}")
    else:
        note("  needs no calibration data")


def _show_decision(decision: Decision) -> None:
    """Which linears got what, a line a layer."""
    layers: dict[str, dict[str, list[str]]] = {}
    for linear, candidate in decision.candidate.items():
        _, layer, role = linear.split(".", 2)
        roles = layers.setdefault(layer, {}).setdefault(candidate, [])
        if (last := role.rpartition(".")[2]) not in roles:  # of every expert
            roles.append(last)
    speed = "" if decision.tokens_per_s is None else f", {decision.tokens_per_s:.1f} tokens/s"
    note(f"auto: {decision.bits:.3f} bits a weight, {decision.loss:.5f} nats of KL divergence{speed} to be expected")
    for layer, chosen in layers.items():
        note(f"  layer {layer}: " + "; ".join(f"{name}: {', '.join(roles)}" for name, roles in chosen.items()))


def _show_report(report: Report, output: Path) -> None:
    verified = report.verified
    assert verified is not None
    groups: dict[str, list[float]] = {}
    for name, error in report.weight_error.items():
        groups.setdefault(name.rpartition(".")[2] if name != "lm_head" else name, []).append(error)
    rows = [(name, f"{sum(e) / len(e):.4f}", f"{max(e):.4f}") for name, e in groups.items()]
    table(["weights", "mean error", "worst layer's"], rows)
    errors = report.output_error
    worst = max(errors, key=errors.__getitem__)
    stages = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in report.seconds.items())
    if report.resumed_after:
        stages += f", after {report.resumed_after} of {len(errors)} layers that an earlier run had finished"
    print()
    pairs(
        [
            (
                "output error",
                f"{errors[max(errors)]:.4f} after the last layer (largest {errors[worst]:.4f}, layer {worst})",
            ),
            ("KL divergence", f"{report.kl:.5f} nats on {verified.tokens} held-out tokens"),
            ("bits per weight", f"{verified.bits_per_weight:.3f} in the quantized linears"),
            ("calibration", report.calibration),
            *_experts(report),
            ("time", stages),
            (
                "peak memory",
                f"{size(report.peak_bytes)} ({size(report.grown_bytes)} of it for this)"
                + (f", of the GPU {size(report.device_bytes)}" if report.device_bytes else ""),
            ),
            (
                "checked",
                f"{verified.scales:,} scales finite and not zero; logits equal bit for bit on {verified.tokens} tokens",
            ),
            ("written", f"{output}, {size(verified.weight_bytes)} of tensors"),
        ]
    )


def _experts(report: Report) -> list[tuple[str, str]]:
    """How many tokens the experts of a mixture saw."""
    if not report.experts:
        return []
    from fewbit.compress.calibrate import FLOOR

    seen = sorted(report.experts.values())
    said = f"{len(seen)} saw {seen[0]:,} to {seen[-1]:,} tokens each"
    if report.scarce:
        some = ", ".join(report.scarce[:3]) + (", ..." if len(report.scarce) > 3 else "")
        said += f"; {len(report.scarce)} saw fewer than {FLOOR}, too few for statistics of their own: {some}"
    return [("experts", said)]


def _sample(checkpoint: Checkpoint, device: torch.device, tokens: int | None) -> str | None:
    """A greedy continuation of a fixed opening; None where none was asked for or the model is too large for it."""
    from fewbit.engine.config import EngineOptions
    from fewbit.engine.engine import Engine, generate, open_engine
    from fewbit.engine.types import GenerateRequest, SamplingParams
    from fewbit.text.tokenizer import Tokenizer

    if tokens == 0 or "tokenizer.json" not in checkpoint.files:
        return None
    if tokens is None and checkpoint.spec.parameters * 4 > SAMPLE_LIMIT:
        note("  no sample: it would need the whole model in memory; ask for one with --sample-tokens")
        return None
    tokenizer = Tokenizer.load(checkpoint.folder)
    prompt = tuple(tokenizer.encode("Once upon a time"))
    options = EngineOptions(
        device=str(device), num_blocks=16, max_batch=1, max_model_len=min(200, checkpoint.spec.context)
    )
    engine: Engine = open_engine(checkpoint.path, options)
    params = SamplingParams(max_tokens=tokens or SAMPLE_TOKENS, temperature=0.0)
    (output,) = generate(engine, [GenerateRequest(id="sample", prompt=prompt, params=params)])
    return tokenizer.decode([*prompt, *output.tokens])

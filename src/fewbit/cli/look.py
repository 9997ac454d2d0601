"""Commands that only look: inspect, plan, explain, support, doctor."""

from __future__ import annotations

from typing import Annotated

import typer

from fewbit.cli.common import (
    BackendOption,
    DeviceOption,
    ExactOption,
    JsonOption,
    ModelArgument,
    QuietOption,
    SeedOption,
    VerboseOption,
    backend_of,
    device_of,
    note,
    open_model,
    pairs,
    print_json,
    size,
    table,
)


def inspect(
    model: ModelArgument,
    json: JsonOption = False,
    device: DeviceOption = None,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """What a model directory holds: architecture, formats, true bits per weight, K/V bytes per token."""
    from fewbit.measure import facts

    device_of(device)  # looks at no device, but a wrong word is one here too
    found = facts.inspect(open_model(model))
    if json:
        return print_json("inspect", found)
    pairs(
        [
            ("architecture", found.architecture),
            ("parameters", f"{found.parameters:,} ({found.linear_parameters:,} in linear layers)"),
            ("layers", f"{found.layers} of hidden size {found.hidden}"),
            ("attention", f"{found.heads} heads of {found.head_dim}, {found.kv_heads} key/value heads"),
            ("vocabulary", f"{found.vocab:,}"),
            ("context", f"{found.context:,} tokens"),
            ("format", found.format),
            ("stored dtype", found.dtype),
            ("weights on disk", size(found.file_bytes)),
            (
                "bits per weight",
                f"{found.bits_per_weight:.3f} in the {'quantized ' * bool(found.quantized_linears)}linears",
            ),
            ("K/V cache", f"{found.kv}, {found.kv_bytes_per_token:,} bytes per token"),
            ("beside it", ", ".join(found.carried) or "nothing: no tokenizer"),
            ("loaded by", ", ".join(f"{name} {version}" for name, version, reason in found.engines if not reason)),
            *(("remark", remark) for remark in found.remarks),
        ]
    )
    for _, _, reason in found.engines:
        if reason:
            print(f"  not: {reason}")
    print()
    table(["linears", "numerics"], found.groups)


def plan(
    model: ModelArgument,
    recipe: Annotated[str | None, typer.Option("--recipe", help="As this recipe would make it.")] = None,
    kv: Annotated[
        str | None,
        typer.Option("--kv", help="K/V cache format: fp8, int8, int4, or fp8_head and so on."),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences at a time.")] = 1,
    context: Annotated[int | None, typer.Option("--context", min=1, help="Tokens of each [default: the most]")] = None,
    json: JsonOption = False,
    device: DeviceOption = None,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Memory a model will take, before anything is loaded: weights, K/V, workspace, and what fits here."""
    from fewbit import compress
    from fewbit.errors import RecipeError
    from fewbit.measure import facts

    checkpoint = open_model(model)
    planned = None
    if recipe:
        planned = compress.plan(checkpoint, compress.read_recipe(recipe).with_kv(kv))
    elif kv:
        raise RecipeError("--kv needs --recipe: a directory's own K/V format is fixed")
    wanted = context or checkpoint.spec.context
    if wanted > checkpoint.spec.context:
        raise RecipeError(f"--context {wanted} exceeds the {checkpoint.spec.context} positions of {checkpoint.path}")
    m = facts.memory(checkpoint, planned, device_of(device), batch, wanted)
    if json:
        return print_json("plan", {**vars(m), "fits": m.fits})
    table(
        ["", "bytes"],
        [
            ("weights on disk", size(m.files)),
            ("weights in memory", size(m.weights)),
            (f"K/V, {m.kv_per_token:,} bytes a token x {batch} x {wanted:,}", size(m.kv)),
            ("workspace", size(m.workspace)),
            ("sum (in memory)", size(m.total)),
            (f"free on {m.device}", size(m.available)),
        ],
    )
    if m.fits:
        print(f"fits; up to {m.largest_batch:,} sequences of {wanted:,} tokens would")
    elif m.longest_context > 0:
        print(f"does not fit; {batch} x {m.longest_context:,} tokens would, or {m.largest_batch} x {wanted:,}")
    else:
        print("does not fit: the weights alone are too large for what is free")


def explain(
    model: Annotated[
        str | None, typer.Argument(metavar="[DIR]", help="Model; none: every format on this device.")
    ] = None,
    backend: BackendOption = "auto",
    exact: ExactOption = False,
    json: JsonOption = False,
    device: DeviceOption = None,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Which kernel runs each group of layers here, and why each better one declined."""
    import torch

    from fewbit.measure import facts
    from fewbit.ops.device import arithmetic_dtype

    where, backend = device_of(device), backend_of(backend, exact)
    if model is None:
        rows = facts.support_table(where, arithmetic_dtype(where, torch.bfloat16))
        if json:
            return print_json("explain", {"device": str(where), "formats": rows})
        return table(["format", "weights only", "weights and inputs"], rows, title=f"kernels on {where}")
    checkpoint = open_model(model)
    groups, forward = facts.explain(checkpoint, where, backend), facts.forward(checkpoint, where, backend)
    if json:
        found = {"device": str(where), "forward": forward, "groups": [vars(group) for group in groups]}
        return print_json("explain", found)
    print(f"forward: {forward}")
    for group in groups:
        print(f"{', '.join(group.linears)}")
        print(f"  {group.numerics} -> {group.kernel}")
        for kernel, reason in group.declined:
            print(f"  not {kernel}: {reason}")
        if group.remark:
            print(f"  note: {group.remark}")
    return None


def support(
    markdown: Annotated[bool, typer.Option("--markdown", help="Tables as Markdown has them.")] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Which families, recipes, file formats and engines go together."""
    from fewbit.measure import support as found

    made = found.tables()
    if json:
        return print_json("support", {"tables": [vars(one) for one in made]})
    for number, one in enumerate(made):
        if markdown:
            print(f"{chr(10) if number else ''}## {one.title}\n\n{one.markdown()}", end="")
        else:
            table(one.columns, one.rows, title=one.title)
            print()
    return None


def doctor(
    json: JsonOption = False,
    device: DeviceOption = None,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """What this machine has, what is missing, and whether the basics work."""
    from fewbit.measure import health

    findings = health.examine(device_of(device))
    if json:
        print_json("doctor", {"findings": [vars(f) for f in findings], "ok": all(f.ok for f in findings)})
    else:
        for f in findings:
            print(f"{'ok  ' if f.ok else 'FAIL' if f.needed else 'none'}  {f.name}: {f.detail}")
    if not all(f.ok for f in findings if f.needed):
        note("something needed is missing: see the lines that begin with FAIL")
        raise typer.Exit(2)

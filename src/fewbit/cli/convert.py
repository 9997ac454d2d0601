"""The command that says a model in another file format: export."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fewbit.cli.common import (
    EngineOption,
    JsonOption,
    ModelArgument,
    QuietOption,
    VerboseOption,
    note,
    open_model,
    pairs,
    print_json,
    progress,
    size,
)

if TYPE_CHECKING:
    from fewbit.checkpoint import Conversion, Exported


class Layout(enum.StrEnum):
    """How the folder of a TensorRT-LLM checkpoint looks."""

    PLAIN = "plain"
    NIM = "nim"


def export(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")],
    to: Annotated[str | None, typer.Option("--to", help="File format (a wrong name lists them).")] = None,
    engine: EngineOption = None,
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Round anew what the format cannot say; what exactly is printed.")
    ] = False,
    tp: Annotated[int, typer.Option("--tp", min=1, help="trtllm: ranks that share every layer.")] = 1,
    pp: Annotated[int, typer.Option("--pp", min=1, help="trtllm: pipeline stages that share the layers.")] = 1,
    layout: Annotated[
        Layout, typer.Option("--layout", help="trtllm: with the original config.json above it, as NIM wants it.")
    ] = Layout.PLAIN,
    force: Annotated[bool, typer.Option("--force", help="Replace a folder that is not empty.")] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Write a model in another file format: the same codes and scales, compared when all is written."""
    from fewbit.checkpoint import Parallel, Target, check_target, convert, plan_export, plan_for
    from fewbit.errors import RecipeError

    if (to is None) == (engine is None):
        raise RecipeError("give --to FORMAT or --for ENGINE, one of them")
    checkpoint = open_model(model)
    check_target(output, force, checkpoint.path)
    laid_out = Target(Parallel(tp, pp), layout is Layout.NIM)
    if to is not None:
        planned = plan_export(checkpoint, to, requantize, laid_out)
    elif laid_out != Target():
        raise RecipeError("--tp, --pp and --layout go with --to trtllm")
    else:
        assert engine is not None
        planned = plan_for(checkpoint, engine, requantize)
    _show_plan(planned)
    with progress() as bars:
        found = convert(planned, output, force=force, progress=lambda done, total: bars("export", done, total))
    if json:
        rounded = {"rounded": dict(planned.rounded), "rescaled": dict(planned.rescaled)}
        return print_json("export", {"output": str(output), "format": planned.to, **vars(found), **rounded})
    _show_result(planned, found, output)
    return None


def _show_plan(planned: Conversion) -> None:
    note(f"{planned.checkpoint.format} -> {planned.to}, for {planned.checkpoint.path}:")
    for what, changes in (("linears", planned.rounded), ("layers' K and V", planned.rescaled)):
        kinds: dict[str, list[str]] = {}
        for name, how in changes.items():
            kinds.setdefault(how, []).append(str(name))
        for how, names in kinds.items():
            some = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
            note(f"  rounded anew: {how} in {len(names)} {what}: {some}")
    if not planned.rounded and not planned.rescaled:
        note("  codes and scales are carried over as they are")


def _show_result(planned: Conversion, found: Exported, output: Path) -> None:
    checked = f"{found.equal:,} of {found.tensors:,} tensors equal bit for bit"
    if found.rounded or planned.rescaled:
        checked += f"; {found.tensors - found.equal - found.last_bit:,} rounded anew, and read back as rounded"
    if found.last_bit:
        checked += f"; {found.last_bit:,} scales differ in the last bit: one side stores their reciprocals"
    pairs([("checked", checked), ("written", f"{output}, {size(found.nbytes)} of tensors")])

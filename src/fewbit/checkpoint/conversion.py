"""From one file format to another, one tensor at a time: codes and scales are carried over as they are.

What a target cannot say is an error before anything is written. With `requantize` the linears it is about are rounded
anew, to the nearest numerics that the target can say; the plan names each of them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from fewbit.checkpoint import shared
from fewbit.checkpoint.acceptance import Row, rows_of
from fewbit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fewbit.checkpoint.formats import FileFormat, format_named, trtllm
from fewbit.checkpoint.layout import Quantization
from fewbit.checkpoint.nearest import nearest_kv, nearest_linear
from fewbit.checkpoint.rounding import Rounding
from fewbit.checkpoint.trtllm.modules import sharing
from fewbit.checkpoint.trtllm.writer import Target, TrtWriter, check
from fewbit.checkpoint.writer import CheckpointWriter, check_target
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.numerics.element import Element
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.quantspec import KVSpec, QuantSpec
from fewbit.spec.decoder import DecoderSpec
from fewbit.version import __version__

Progress = Callable[[int, int], None]
"""Called with how many tensors are done, and of how many."""


@dataclass(frozen=True)
class Conversion:
    """What an export will do, settled before anything is written.

    Attributes:
        checkpoint: the source.
        to: the file format.
        quant: QuantSpec by linear, as it will be written.
        kv: KVSpec by layer, as it will be written.
        rounded: linears that will be rounded anew, and why.
        rescaled: layers whose K and V get another format, and why.
        together: linears that get one scale of the whole weight.
        inputs: linears that get one calibrated scale of their input.
        layout: how a TensorRT-LLM checkpoint is laid out.
    """

    checkpoint: Checkpoint
    to: str
    quant: Mapping[str, QuantSpec]
    kv: Mapping[int, KVSpec]
    rounded: Mapping[str, str] = field(default_factory=dict)
    rescaled: Mapping[int, str] = field(default_factory=dict)
    together: Sequence[tuple[str, ...]] = ()
    inputs: Sequence[tuple[str, ...]] = ()
    layout: Target = field(default_factory=Target)


@dataclass(frozen=True)
class Exported:
    """What an export was found to hold when it was opened again.

    Attributes:
        tensors: how many there are.
        equal: how many of them are the source's, bit for bit.
        last_bit: outer scales that differ in the last bit, where one side stores a scale and the other its reciprocal.
        rounded: linears that were rounded anew.
        nbytes: of all tensors.
    """

    tensors: int
    equal: int
    last_bit: int
    rounded: int
    nbytes: int


@dataclass(frozen=True)
class _Target:
    """What a format can say and, if it is for an engine, what that one loads."""

    fmt: FileFormat
    spec: DecoderSpec
    row: Row | None

    def why_not(self, quantization: Quantization) -> str | None:
        reason = self.fmt.why_not(self.spec, quantization)
        return reason if reason or self.row is None else self.row.why_not(quantization)

    def why_not_linear(self, name: str, quant: QuantSpec) -> str | None:
        return self.why_not(Quantization({name: quant}, {}))


def plan_export(
    checkpoint: Checkpoint,
    to: str,
    requantize: bool = False,
    layout: Target | None = None,
    row: Row | None = None,
) -> Conversion:
    """Settle how a model can be said in another format.

    Args:
        checkpoint: the source.
        to: the file format.
        requantize: round anew what the target cannot say.
        layout: how to lay out a TensorRT-LLM checkpoint.
        row: what the engine loads that it is for.

    Raises:
        UnsupportedError: the target cannot say it; the message names the layers.
    """
    target, layout = _Target(format_named(to), checkpoint.spec, row), layout or Target()
    if to != trtllm.NAME and layout != Target():
        raise UnsupportedError(f"only '{trtllm.NAME}' is split over ranks or laid out for NIM, not '{to}'")
    quant, rounded = _plan_linears(checkpoint, target, requantize)
    kv, rescaled = _plan_caches(checkpoint, quant, target, requantize)
    if reason := target.why_not(Quantization(quant, kv)):
        raise UnsupportedError(reason)
    if to != trtllm.NAME:
        return Conversion(checkpoint, to, quant, kv, rounded, rescaled)
    check(checkpoint, Quantization(quant, kv), layout)
    together, inputs = shared.differing(checkpoint, quant, rounded, sharing(checkpoint.spec))
    if (reason := shared.refusal(together, inputs)) and not requantize:
        raise UnsupportedError(reason + _HINT)
    rounded |= {n: how for n, how in shared.say(together, inputs, quant) if n not in rounded}
    return Conversion(checkpoint, to, quant, kv, rounded, rescaled, together, inputs, layout)


def plan_for(checkpoint: Checkpoint, engine: str, requantize: bool = False) -> Conversion:
    """Settle in which format an engine loads a model; see `plan_export`.

    Raises:
        UnsupportedError: in none, as it is; the message says what stands in the way.
    """
    rows, reasons = rows_of(engine), dict[str, str]()
    for anew in (False, True) if requantize else (False,):
        for row in rows:
            try:
                return plan_export(checkpoint, row.dialect, anew, row=row)
            except UnsupportedError as error:
                reasons = {**reasons, row.dialect: str(error).removesuffix(_HINT)}
    raise UnsupportedError("; ".join(reasons.values()) + ("" if requantize else _HINT))


def _plan_linears(
    checkpoint: Checkpoint, target: _Target, requantize: bool
) -> tuple[dict[str, QuantSpec], dict[str, str]]:
    """The numerics of every linear, and which of them change how."""
    quant, rounded, refused = dict(checkpoint.quant), dict[str, str](), dict[str, str]()
    for name, was in checkpoint.quant.items():
        reason = target.why_not_linear(name, was)
        for same in _restated(checkpoint, name, was) if reason else ():
            if not target.why_not_linear(name, same):
                quant[name], reason = same, None
                break
        if reason:
            found = nearest_linear(was, lambda q, name=name: not target.why_not_linear(name, q))  # type: ignore[misc]
            if found is None or not requantize:
                refused[name] = reason
            else:
                quant[name], rounded[name] = found, f"{was} becomes {found}"
    if refused:
        others = list(refused)[1:]
        more = f" (and {len(others)} more linears: {_some(others)})" if others else ""
        hint = "; whatever it can say needs calibrated inputs: compress the original for it" if requantize else _HINT
        raise UnsupportedError(f"{next(iter(refused.values()))}{more}{hint}")
    return quant, rounded


def _plan_caches(
    checkpoint: Checkpoint, quant: Mapping[str, QuantSpec], target: _Target, requantize: bool
) -> tuple[dict[int, KVSpec], dict[int, str]]:
    """The formats of K and V beside linears of `quant`, and which of them change how."""
    kv = dict(checkpoint.kv)
    if not kv or not (reason := target.why_not(Quantization(quant, kv))):
        return kv, {}
    other = nearest_kv(kv[0], lambda k: not target.why_not(Quantization(quant, dict.fromkeys(kv, k))))
    if other is None or not requantize:
        raise UnsupportedError(reason + ("" if requantize else _HINT))
    return dict.fromkeys(kv, other), {layer: f"{was} becomes {other}" for layer, was in kv.items() if was != other}


_HINT = "; or let it be rounded anew with --requantize"


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")


def _restated(checkpoint: Checkpoint, name: str, quant: QuantSpec) -> Iterator[QuantSpec]:
    """Other ways to say exactly the same: scales in a wider float, a prescale of ones left out."""
    assert quant.weight is not None
    ways = [quant]
    if quant.weight.scale in (torch.bfloat16, torch.float16):
        ways.append(replace(quant, weight=replace(quant.weight, scale=torch.float32)))
    if quant.prescale and (checkpoint.tensors.dense(f"{name}.prescale") == 1).all():
        ways += [replace(way, prescale=False) for way in ways]
    yield from ways[1:]


def export(
    checkpoint: Checkpoint,
    to: str,
    target: str | Path,
    *,
    requantize: bool = False,
    layout: Target | None = None,
    force: bool = False,
    progress: Progress = lambda done, total: None,
) -> Exported:
    """Write a model in another file format, which appears whole or not at all, and look at what was written.

    Args:
        checkpoint: the source.
        to: the file format.
        target: the folder to make.
        requantize: round anew what the target cannot say.
        layout: how to lay out a TensorRT-LLM checkpoint.
        force: replace a folder that is not empty.
        progress: called with how many tensors are done, and of how many.

    Raises:
        UnsupportedError: the target cannot say it; the message names the layers.
        CheckpointError: the target is in the way, or what was written does not hold what was meant.
    """
    return convert(plan_export(checkpoint, to, requantize, layout), Path(target), force=force, progress=progress)


def convert(
    conversion: Conversion,
    target: Path,
    *,
    force: bool = False,
    progress: Progress = lambda done, total: None,
) -> Exported:
    """Carry out a plan of `plan_export`; see `export`."""
    c, source = conversion, conversion.checkpoint
    check_target(target, force, source.path)
    rounding = Rounding(source, c.quant, c.kv, c.rounded, c.together, c.inputs)
    with torch.inference_mode(), _writer(c, target, force) as writer:
        names = list(rounding.names())
        for done, name in enumerate(names):
            progress(done, len(names))
            writer.add(name, rounding.tensor(name))
        progress(len(names), len(names))
        found = _compare(open_checkpoint(writer.finish()), rounding)
        writer.commit()
    return found


def _writer(c: Conversion, target: Path, force: bool) -> CheckpointWriter:
    source = c.checkpoint
    files = dict(source.files)
    if (source.folder / "recipe.yaml").is_file():
        files["recipe.yaml"] = source.folder / "recipe.yaml"
    new = Rounding(source, c.quant, c.kv, c.rounded).is_new
    dtypes = {n: source.tensors.dtype(n) for n in source.tensors if not (n.endswith("_scale") and new(n))}
    meta = _history(source) | {"exported_from": source.format}
    if c.rounded:
        meta["requantized"] = f"{len(c.rounded)} linears"
    what = (
        target,
        format_named(c.to),
        source.family,
        source.spec,
        Quantization(c.quant, c.kv),
        dtypes,
        source.config,
        files,
        meta,
        f"export {__version__} {source.path.resolve()} {c.to} {c.layout}",
        force,
    )
    if c.to == trtllm.NAME:
        return TrtWriter(c.layout, source.dtype, source.path, *what)
    return CheckpointWriter(*what)


def _history(source: Checkpoint) -> dict[str, str]:
    """Who made the source and how, as far as its files say."""
    found: dict[str, str] = {}
    for file in [f for f in source.sources if f.suffix == ".safetensors"][:1]:
        # a file damaged since it was opened is told of when its tensors are read
        with contextlib.suppress(safetensors.SafetensorError), safetensors.safe_open(file, framework="pt") as header:
            found = {k: v for k, v in (header.metadata() or {}).items() if k not in ("format", "fewbit")}
    said = (source.config.get("quantization_config") or {}).get("producer")
    if isinstance(said, dict):
        found["producer"] = " ".join(str(v) for v in said.values())
    return found


def _compare(written: Checkpoint, rounding: Rounding) -> Exported:
    """Hold every tensor of what was written against what was meant.

    Raises:
        CheckpointError: one differs.
    """
    equal = last_bit = total = 0
    for name in rounding.names():
        if name.endswith(".wide_scale") and name not in written.tensors:
            continue  # kernels' own, no part of the weight: not every format has a place for it
        meant, found = rounding.tensor(name), written.tensors[name]
        total += 1
        if isinstance(meant, QTensor):
            assert isinstance(found, QTensor)
            same, near = _same_bits(meant, found), _same_bits(meant, found, outer_ulps=1)
        else:
            assert isinstance(found, Tensor)
            same = meant.dtype == found.dtype and torch.equal(meant, found)
            near = same or (name.endswith(".input_scale") and _ulps(meant, found) <= 1)
        if not near:
            raise CheckpointError(f"'{name}' does not read back from the written files as it was; nothing was kept")
        last_bit += near and not same
        equal += same and not rounding.is_new(name)
    extra = set(written.tensors) - set(rounding.names())
    for name in extra:  # where a format insists on a prescale, it is one of ones
        if name.endswith(".wide_scale"):
            continue
        if not name.endswith(".prescale") or (written.tensors.dense(name) != 1).any():
            raise CheckpointError(f"'{name}' is in the written files but not in the source; nothing was kept")
    nbytes = sum(map(written.tensors.nbytes, written.tensors))
    return Exported(total, equal, last_bit, len(rounding.rounded), nbytes)


def _same_bits(a: QTensor, b: QTensor, outer_ulps: int = 0) -> bool:
    """Whether two tensors have the same codes, scales and zeros; the names of their formats do not matter.

    Zeros that are all 0 count as none: a format with zeros says symmetric weights so.
    """
    mine, theirs = a.parts(), b.parts()
    for one, other in ((mine, theirs), (theirs, mine)):
        if "zero" not in other and "zero" in one and not one["zero"].any():
            del one["zero"]
    if (a.format.element, a.format.block, mine.keys()) != (b.format.element, b.format.block, theirs.keys()):
        return False
    if isinstance(a.format.scale, Element) != isinstance(b.format.scale, Element):
        return False
    if a.outer is not None and _ulps(a.outer, theirs["outer"]) > outer_ulps:
        return False
    return all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items() if name != "outer")


def _ulps(a: Tensor, b: Tensor) -> float:
    """How many steps of float32 lie between two positive numbers, at most."""
    if a.shape != b.shape or not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        return math.inf
    return (a.float().view(torch.int32) - b.float().view(torch.int32)).abs().max().item()

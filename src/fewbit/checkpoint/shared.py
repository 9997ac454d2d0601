"""Scales that linears must have together where a format stores the linears in one tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from fewbit.checkpoint.checkpoint import Checkpoint
from fewbit.checkpoint.rounding import whole_scale
from fewbit.checkpoint.trtllm.modules import Sharing
from fewbit.errors import UnsupportedError
from fewbit.numerics.format import ALL
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.quantspec import QuantSpec


def differing(
    source: Checkpoint, quant: Mapping[str, QuantSpec], rounded: Mapping[str, str], groups: Iterable[Sharing]
) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """The groups whose weights, and those whose inputs, do not have the one scale that they need.

    Args:
        source: the model. The weights of groups with whole scales are read, one at a time.
        quant: QuantSpec by linear, as wanted.
        rounded: linears that are rounded anew, which get whatever scale they need.
        groups: what needs to be had together.

    Raises:
        UnsupportedError: linears that need one prescale have several.
    """
    weights, inputs = [], []
    for group in groups:
        whole = [name for name in group.weights if name in quant and _is_whole(quant[name])]
        if any(name in rounded for name in whole) or not _alike(_scale_of(source, name) for name in whole):
            weights.append(tuple(whole))
        calibrated = [name for name in group.inputs if name in quant and quant[name].calibrated]
        if not group.fused:
            calibrated = [name for name in calibrated if _is_whole(quant[name])]
        scales = (source.tensors.dense(f"{name}.input_scale").float() for name in calibrated)
        if any(name in rounded for name in calibrated) or not _alike(scales):
            inputs.append(tuple(calibrated))
        prescaled = [name for name in group.weights if name in quant and quant[name].prescale and group.fused]
        if not _alike(source.tensors.dense(f"{name}.prescale") for name in prescaled):
            raise UnsupportedError(f"{_list(prescaled)} lie in one tensor and need one prescale, but have several")
    return weights, inputs


def say(
    weights: Sequence[tuple[str, ...]], inputs: Sequence[tuple[str, ...]], quant: Mapping[str, QuantSpec]
) -> Iterator[tuple[str, str]]:
    """By linear, what will be done about it."""
    fed = {name for group in inputs for name in group}
    for group in weights:
        for name in group:
            also = ", and one for their inputs" if name in fed else ""
            yield name, f"{quant[name].weight} weights of one input get one scale{also}"
    for name in fed - {name for group in weights for name in group}:
        yield name, "inputs of one tensor get one scale"


def refusal(weights: Sequence[tuple[str, ...]], inputs: Sequence[tuple[str, ...]]) -> str | None:
    """Why the groups cannot be written as they are; None: they can."""
    for groups, what in ((weights, "scale of the whole weight"), (inputs, "scale of their input")):
        if groups:
            more = f" (and {len(groups) - 1} more groups like them)" if len(groups) > 1 else ""
            return f"{_list(groups[0])}{more} need one {what} in a TensorRT-LLM checkpoint, but have several"
    return None


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")


def _is_whole(quant: QuantSpec) -> bool:
    return quant.weight is not None and (quant.weight.outer or quant.weight.block == (ALL, ALL))


def _scale_of(source: Checkpoint, name: str) -> torch.Tensor:
    tensor = source.tensors[f"{name}.weight"]
    assert isinstance(tensor, QTensor)
    return whole_scale(tensor)


def _alike(tensors: Iterable[torch.Tensor]) -> bool:
    first: torch.Tensor | None = None
    for tensor in tensors:
        if first is not None and not torch.equal(first, tensor):
            return False
        first = tensor
    return True

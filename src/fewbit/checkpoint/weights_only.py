"""What the formats answer that hold quantized weights and nothing else: no rounded inputs, no K and V."""

from __future__ import annotations

import torch

from fewbit.checkpoint.layout import InputScale, Quantization
from fewbit.checkpoint.names import Names
from fewbit.numerics.quantspec import KVSpec, QuantSpec
from fewbit.spec.decoder import LinearShape

OTHER = "use --export compressed-tensors, which can"


def why_not(label: str, quantization: Quantization) -> str | None:
    """What such a format cannot say whatever its packing; integers under float scales are left to look at."""
    if not quantization.quant:
        return f"{label} holds quantized weights, and none is asked for; {OTHER}"
    if quantization.kv:
        return f"{label} has no place for scales of K and V; {OTHER}"
    for name, quant in quantization.quant.items():
        fmt = quant.weight
        if quant.prescale:
            return f"{name}: {label} has no place for a prescale vector; use --export hf"
        if fmt is None or quant.input is not None or quant.lowrank or not fmt.element.integer or fmt.zero == "float":
            return f"{name}: {label} has no word for {quant}; {OTHER}"
        if fmt.block[0] != 1 or not isinstance(fmt.scale, torch.dtype):
            return f"{name}: {label} has no word for {quant}; {OTHER}"
    return None


def input_scale(quant: QuantSpec) -> InputScale:
    """See `FileFormat.input_scale`; never asked."""
    raise AssertionError(quant)


def prescale(linear: LinearShape, quant: QuantSpec) -> bool:
    """See `FileFormat.prescale`."""
    return False


def kv_scale_names(layer: int, names: Names) -> tuple[str, str]:
    """See `FileFormat.kv_scale_names`; never asked."""
    raise AssertionError(layer)


def kv_scale_shape(kv: KVSpec, heads: int) -> tuple[int, ...]:
    """See `FileFormat.kv_scale_shape`; never asked."""
    raise AssertionError(kv)

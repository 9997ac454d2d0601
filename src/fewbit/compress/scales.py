"""Scales of K and V from what calibration saw, and how far rounded weights are off."""

from __future__ import annotations

import math

from torch import Tensor

from fewbit.compress.stats import Block
from fewbit.numerics.format import ALL
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.quantspec import KVSpec
from fewbit.numerics.reference import amax_scale


def kv_scales(block: Block, kv: KVSpec | None) -> dict[str, Tensor]:
    """By ``k`` and ``v``, float32: [] or, with a scale a head, [kv_heads]; none where they are not quantized."""
    found: dict[str, Tensor] = {}
    if kv is None:
        return found
    for name, fmt, amax in (("k", kv.k, block.k_amax), ("v", kv.v, block.v_amax)):
        assert amax is not None
        rows = 1 if fmt.block == (ALL, ALL) else block.layer.attention.kv_heads
        scale = amax_scale(block.reach.get(name, amax.view(rows, -1).amax(1)).float(), fmt)
        found[name] = scale.reshape(()) if rows == 1 else scale
    return found


def relative_error(q: QTensor, rounded: Tensor, weight: Tensor) -> float:
    """``|R - Q| / |W|``, by pieces of some rows; R what was rounded, W the weight."""
    off = of = 0.0
    for start in range(0, len(weight), 256):  # a multiple of every block's rows
        piece = rounded[start : start + 256]
        off += (q.slice(-2, start, start + len(piece)).dequantize() - piece).double().square().sum().item()
        of += weight[start : start + 256].double().square().sum().item()
    return math.sqrt(off / max(of, 1e-60))

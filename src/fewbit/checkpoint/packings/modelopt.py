"""Model Optimizer's layouts, as its unified Hugging Face export writes them (0.47). Scales are float32."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fewbit.checkpoint.layout import Packing, Shape, Stored, scale_grid
from fewbit.numerics.element import E2M1, E4M3, INT4, INT8
from fewbit.numerics.format import ALL, Format
from fewbit.numerics.pack import pack_nibbles, unpack_nibbles
from fewbit.numerics.qtensor import QTensor

CAST = {INT8: torch.int8, E4M3: torch.float8_e4m3fn}


def _plain_scale(fmt: Format, shape: Shape) -> Shape:
    """One scale is [], one a row [out]; a square block has axes of one, and a single block is as good as a tensor."""
    rows, cols = scale_grid(fmt, shape)
    if fmt.block == (ALL, ALL) or (fmt.block[0] > 1 and rows == cols == 1):
        return ()
    return (rows,) if fmt.block == (1, ALL) else (rows, 1, cols, 1)


def _plain_stored(fmt: Format, shape: Shape) -> dict[str, Stored]:
    return {
        "weight": Stored(CAST[fmt.element], shape),
        "weight_scale": Stored(torch.float32, _plain_scale(fmt, shape)),
    }


def _plain_pack(q: QTensor) -> dict[str, Tensor]:
    scale = q.scale.float().reshape(_plain_scale(q.format, tuple(q.shape)))
    return {"weight": q.codes.view(CAST[q.format.element]), "weight_scale": scale}


def _plain_unpack(parts: Mapping[str, Tensor], fmt: Format, shape: Shape) -> QTensor:
    assert isinstance(fmt.scale, torch.dtype)
    scale = parts["weight_scale"].reshape(scale_grid(fmt, shape)).to(fmt.scale)
    return QTensor(fmt, parts["weight"].view(torch.uint8), scale)


PLAIN = Packing(_plain_stored, _plain_pack, _plain_unpack)
"""One code a byte."""


def _int4_stored(fmt: Format, shape: Shape) -> dict[str, Stored]:
    return {
        "weight": Stored(torch.uint8, (shape[0] // 2, shape[1])),
        "weight_scale": Stored(torch.float32, scale_grid(fmt, shape)),
    }


def _int4_pack(q: QTensor) -> dict[str, Tensor]:
    return {"weight": pack_nibbles(q.codes, dim=0), "weight_scale": q.scale.float()}


def _int4_unpack(parts: Mapping[str, Tensor], fmt: Format, shape: Shape) -> QTensor:
    assert isinstance(fmt.scale, torch.dtype)
    return QTensor(fmt, unpack_nibbles(parts["weight"], dim=0), parts["weight_scale"].to(fmt.scale))


INT4_ROWS = Packing(_int4_stored, _int4_pack, _int4_unpack)
"""Two's complement nibbles packed along the *rows*: byte row r holds rows 2r (low) and 2r + 1."""


def _wide_stored(fmt: Format, shape: Shape) -> dict[str, Stored]:
    return _int4_stored(fmt, shape) | {"weight_scale_2": Stored(torch.float32, ())}


def _wide_pack(q: QTensor) -> dict[str, Tensor]:
    amax = torch.stack([part.abs().amax() for part in q.dequantize().split(4096)]).amax()
    return _int4_pack(q) | {"weight_scale_2": amax / E4M3.max}


INT4_ROWS_WIDE = Packing(_wide_stored, _wide_pack, _int4_unpack, wide="weight_scale_2")
"""The same for FP8 inputs: kernels widen the codes to FP8 under ``weight_scale_2``, no factor of the weight."""


def _nvfp4_stored(fmt: Format, shape: Shape) -> dict[str, Stored]:
    return {
        "weight": Stored(torch.uint8, (shape[0], shape[1] // 2)),
        "weight_scale": Stored(torch.float8_e4m3fn, scale_grid(fmt, shape)),
        "weight_scale_2": Stored(torch.float32, ()),
    }


def _nvfp4_pack(q: QTensor) -> dict[str, Tensor]:
    assert q.outer is not None
    scale = q.scale.view(torch.float8_e4m3fn)
    return {"weight": pack_nibbles(q.codes), "weight_scale": scale, "weight_scale_2": q.outer.float().reshape(())}


def _nvfp4_unpack(parts: Mapping[str, Tensor], fmt: Format, shape: Shape) -> QTensor:
    outer = parts["weight_scale_2"].reshape(())
    return QTensor(fmt, unpack_nibbles(parts["weight"]), parts["weight_scale"].view(torch.uint8), outer)


NVFP4 = Packing(_nvfp4_stored, _nvfp4_pack, _nvfp4_unpack)
"""E2M1 nibbles along the columns, block scales, and the outer scale as a multiplier."""


def _mx_stored(fmt: Format, shape: Shape) -> dict[str, Stored]:
    half = fmt.element == E2M1
    weight = Stored(torch.uint8, (shape[0], shape[1] // 2)) if half else Stored(CAST[fmt.element], shape)
    return {"weight": weight, "weight_scale": Stored(torch.uint8, scale_grid(fmt, shape))}


def _mx_pack(q: QTensor) -> dict[str, Tensor]:
    half = q.format.element == E2M1
    weight = pack_nibbles(q.codes) if half else q.codes.view(CAST[q.format.element])
    return {"weight": weight, "weight_scale": q.scale}


def _mx_unpack(parts: Mapping[str, Tensor], fmt: Format, shape: Shape) -> QTensor:
    half = fmt.element == E2M1
    codes = unpack_nibbles(parts["weight"]) if half else parts["weight"].view(torch.uint8)
    return QTensor(fmt, codes, parts["weight_scale"])


MX = Packing(_mx_stored, _mx_pack, _mx_unpack)
"""Blocks of 32 under a power of two: E2M1 nibbles along the columns, or E4M3."""


def packing_of(fmt: Format, wide: bool) -> Packing:
    """How a weight lies; `wide`: with what a kernel needs that multiplies it in FP8."""
    if fmt.element == INT4:
        return INT4_ROWS_WIDE if wide else INT4_ROWS
    if fmt.outer:
        return NVFP4
    return PLAIN if isinstance(fmt.scale, torch.dtype) else MX

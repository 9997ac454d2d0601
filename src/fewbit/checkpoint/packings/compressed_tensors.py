"""compressed-tensors' layouts, release 0.20. Scales may be stored in any float dtype: the format says in which."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fewbit.checkpoint.layout import Packing, Shape, Stored, inverse, scale_grid
from fewbit.errors import CheckpointError
from fewbit.numerics.element import E4M3
from fewbit.numerics.format import ALL, Format
from fewbit.numerics.pack import pack_nibbles, pack_words, unpack_nibbles, unpack_words
from fewbit.numerics.qtensor import QTensor


def _scale_shape(fmt: Format, shape: Shape) -> Shape:
    return (1,) if fmt.block == (ALL, ALL) else scale_grid(fmt, shape)


def _float_scale(fmt: Format) -> torch.dtype:
    assert isinstance(fmt.scale, torch.dtype)
    return fmt.scale


def _plain_stored(fmt: Format, shape: Shape) -> dict[str, Stored]:
    stored = {
        "weight": Stored(torch.int8 if fmt.element.integer else torch.float8_e4m3fn, shape),
        "weight_scale": Stored(_float_scale(fmt), _scale_shape(fmt, shape)),
    }
    if fmt.zero:
        stored["weight_zero_point"] = Stored(torch.int8, _scale_shape(fmt, shape))
    return stored


def _plain_pack(q: QTensor) -> dict[str, Tensor]:
    shape = _scale_shape(q.format, tuple(q.shape))
    weight = q.codes.view(torch.int8 if q.format.element.integer else torch.float8_e4m3fn)
    if (narrow := 8 - q.format.element.bits) > 0:  # the sign fills the byte
        weight = (weight << narrow) >> narrow
    parts = {"weight": weight, "weight_scale": q.scale.reshape(shape)}
    return parts if q.zero is None else parts | {"weight_zero_point": q.zero.reshape(shape)}


def _plain_unpack(parts: Mapping[str, Tensor], fmt: Format, shape: Shape) -> QTensor:
    codes, grid = parts["weight"].view(torch.uint8), scale_grid(fmt, shape)
    if fmt.element.bits < 8:
        low, high = parts["weight"].aminmax()
        if low < fmt.element.min or high > fmt.element.max:
            raise CheckpointError(f"holds codes from {low} to {high}, more than {fmt.element.bits} bits can say")
        codes = codes & ((1 << fmt.element.bits) - 1)
    zero = parts["weight_zero_point"].reshape(grid) if fmt.zero else None
    return QTensor(fmt, codes, parts["weight_scale"].reshape(grid), zero=zero)


PLAIN = Packing(_plain_stored, _plain_pack, _plain_unpack)
"""One code a byte: ``int-quantized`` (signed, however few bits), ``float-quantized`` and ``naive-quantized``."""


def _words_stored(fmt: Format, shape: Shape) -> dict[str, Stored]:
    bits, (out, columns) = fmt.element.bits, shape
    stored = {
        "weight_packed": Stored(torch.int32, (out, -(-columns * bits // 32))),
        "weight_scale": Stored(_float_scale(fmt), _scale_shape(fmt, shape)),
        "weight_shape": Stored(torch.int64, (2,)),
    }
    if fmt.zero:
        packed = Stored(torch.int32, (-(-out * bits // 32), scale_grid(fmt, shape)[1]))
        stored["weight_zero_point"] = Stored(torch.int8, (1,)) if fmt.block[0] == ALL else packed
    if fmt.act_order:
        stored["weight_g_idx"] = Stored(torch.int32, (columns,))
    return stored


def _words_pack(q: QTensor) -> dict[str, Tensor]:
    bits = q.format.element.bits
    half = 1 << (bits - 1)  # stored as value + half: in two's complement that flips the top bit
    parts = {
        "weight_packed": pack_words(q.codes ^ half, bits),
        "weight_scale": q.scale.reshape(_scale_shape(q.format, tuple(q.shape))),
        "weight_shape": torch.tensor(q.shape, dtype=torch.int64),
    }
    if q.zero is not None:
        packed = pack_words((q.zero.int() + half).to(torch.uint8), bits, dim=0)
        parts["weight_zero_point"] = q.zero.reshape(1) if q.format.block[0] == ALL else packed
    if q.group_of is not None:
        parts["weight_g_idx"] = q.group_of
    return parts


def _words_unpack(parts: Mapping[str, Tensor], fmt: Format, shape: Shape) -> QTensor:
    bits = fmt.element.bits
    half = 1 << (bits - 1)
    if parts["weight_shape"].tolist() != list(shape):
        raise CheckpointError(f"weight_shape says {parts['weight_shape'].tolist()}, the model's config {list(shape)}")
    codes = unpack_words(parts["weight_packed"], bits, shape[1]) ^ half
    zero = parts["weight_zero_point"].reshape(-1, 1) if fmt.zero else None
    if zero is not None and fmt.block[0] != ALL:
        zero = unpack_words(parts["weight_zero_point"], bits, shape[0], dim=0).int() - half
    zero = None if zero is None else zero.to(torch.int8)
    grid, group_of = scale_grid(fmt, shape), parts["weight_g_idx"] if fmt.act_order else None
    if group_of is not None and not (int(group_of.min()) >= 0 and int(group_of.max()) < grid[1]):
        raise CheckpointError(f"weight_g_idx names groups {group_of.min()} to {group_of.max()}, there are {grid[1]}")
    return QTensor(fmt, codes, parts["weight_scale"].reshape(grid), zero=zero, group_of=group_of)


WORDS = Packing(_words_stored, _words_pack, _words_unpack)
"""``pack-quantized``: integers, shifted to be unsigned, in 32-bit words along the columns; zeros along the rows."""


def _nvfp4_stored(fmt: Format, shape: Shape) -> dict[str, Stored]:
    return {
        "weight_packed": Stored(torch.uint8, (shape[0], shape[1] // 2)),
        "weight_scale": Stored(torch.float8_e4m3fn, scale_grid(fmt, shape)),
        "weight_global_scale": Stored(torch.float32, (1,)),
    }


def _nvfp4_pack(q: QTensor) -> dict[str, Tensor]:
    assert q.outer is not None
    return {
        "weight_packed": pack_nibbles(q.codes),
        "weight_scale": q.scale.view(torch.float8_e4m3fn),
        "weight_global_scale": q.outer.double().reciprocal().float().reshape(1),  # this dialect divides by it
    }


def _nvfp4_unpack(parts: Mapping[str, Tensor], fmt: Format, shape: Shape) -> QTensor:
    outer = inverse(parts["weight_global_scale"].reshape(()))
    return QTensor(fmt, unpack_nibbles(parts["weight_packed"]), parts["weight_scale"].view(torch.uint8), outer)


NVFP4 = Packing(_nvfp4_stored, _nvfp4_pack, _nvfp4_unpack)
"""``nvfp4-pack-quantized``."""


def _mx_stored(fmt: Format, shape: Shape) -> dict[str, Stored]:
    scale = Stored(torch.uint8, scale_grid(fmt, shape))
    if fmt.element == E4M3:
        return {"weight": Stored(torch.float8_e4m3fn, shape), "weight_scale": scale}
    return {"weight_packed": Stored(torch.uint8, (shape[0], shape[1] // 2)), "weight_scale": scale}


def _mx_pack(q: QTensor) -> dict[str, Tensor]:
    if q.format.element == E4M3:
        return {"weight": q.codes.view(torch.float8_e4m3fn), "weight_scale": q.scale}
    return {"weight_packed": pack_nibbles(q.codes), "weight_scale": q.scale}


def _mx_unpack(parts: Mapping[str, Tensor], fmt: Format, shape: Shape) -> QTensor:
    codes = parts["weight"].view(torch.uint8) if fmt.element == E4M3 else unpack_nibbles(parts["weight_packed"])
    return QTensor(fmt, codes, parts["weight_scale"])


MX = Packing(_mx_stored, _mx_pack, _mx_unpack)
"""``mxfp4-pack-quantized`` and ``mxfp8-quantized``."""

BY_WORD = {
    "int-quantized": PLAIN,
    "float-quantized": PLAIN,
    "naive-quantized": PLAIN,
    "pack-quantized": WORDS,
    "nvfp4-pack-quantized": NVFP4,
    "mxfp4-pack-quantized": MX,
    "mxfp8-quantized": MX,
}
"""What ``format`` says to how weights lie."""

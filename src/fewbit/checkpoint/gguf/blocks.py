"""GGUF's blocks: Q8_0, Q4_0, Q4_K and Q6_K, exactly; the others as the gguf package decodes them.

A row is cut into blocks of 32 numbers, or of 256 in smaller runs with scales of their own (K). Every block starts or
ends with its float16 scales; the products of two scales are exact in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewbit.errors import UnsupportedError
from fewbit.numerics.element import INT4, INT6, INT8, UINT4
from fewbit.numerics.format import Format
from fewbit.numerics.qtensor import QTensor

Parts = tuple[Tensor, Tensor, Tensor | None]  # codes [n, 32 or 256], scales and zeros [n, runs]


def _half(blocks: Tensor, start: int) -> Tensor:
    """The float16 at a byte of each block, [n, 1]."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16)


def _q8_0(blocks: Tensor) -> Parts:
    """Scale, 32 int8."""
    return blocks[:, 2:], _half(blocks, 0), None


def _q4_0(blocks: Tensor) -> Parts:
    """Scale, 16 bytes: low nibbles are the first 16 numbers, high ones the last; W = scale * (code - 8)."""
    nibbles = torch.cat((blocks[:, 2:] & 15, blocks[:, 2:] >> 4), 1)
    return nibbles ^ 8, _half(blocks, 0), None


def _q4_k(blocks: Tensor) -> Parts:
    """Scale and minimum of the scales, 12 bytes of eight 6-bit scales and minima, 128 bytes of nibbles.

    W = scale * sub-scale * code - minimum * sub-minimum, each of eight runs of 32.
    """
    low, high, mixed = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((low & 63, (mixed & 15) | ((low >> 6) << 4)), 1)
    minima = torch.cat((high & 63, (mixed >> 4) | ((high >> 6) << 4)), 1)
    nibbles = blocks[:, 16:].unflatten(1, (4, 1, 32))  # 32 bytes are a run in the low nibbles, the next in the high
    codes = torch.cat((nibbles & 15, nibbles >> 4), 2).flatten(1)
    return codes, _half(blocks, 0).float() * scales, -(_half(blocks, 2).float() * minima)


def _q6_k(blocks: Tensor) -> Parts:
    """128 bytes of low nibbles, 64 of two high bits, 16 int8 sub-scales, scale; W = scale * sub-scale * (code - 32)."""
    low, high = blocks[:, :128].unflatten(1, (2, 1, 64)), blocks[:, 128:192].unflatten(1, (2, 1, 32))
    nibbles = torch.cat((low & 15, low >> 4), 2).unflatten(3, (2, 32)).flatten(2, 3)  # [n, 2, 4, 32]
    tops = torch.cat([(high >> shift) & 3 for shift in (0, 2, 4, 6)], 2)
    codes = (nibbles | (tops << 4)).flatten(1) ^ 32
    return codes, _half(blocks, 208).float() * blocks[:, 192:208].view(torch.int8), None


BLOCKS: dict[str, tuple[Format, int, int, Callable[[Tensor], Parts]]] = {
    "Q8_0": (Format("q8_0", INT8, (1, 32), scale=torch.float16), 32, 34, _q8_0),
    "Q4_0": (Format("q4_0", INT4, (1, 32), scale=torch.float16), 32, 18, _q4_0),
    "Q4_K": (Format("q4_k", UINT4, (1, 32), zero="float"), 256, 144, _q4_k),
    "Q6_K": (Format("q6_k", INT6, (1, 16)), 256, 210, _q6_k),
}
"""Type to its numerics, the numbers and bytes of a block, and how one is taken apart."""


def unpacked(rows: Tensor, kind: str) -> QTensor:
    """Blocks as they lie, uint8 [rows, bytes of a row], as a QTensor."""
    fmt, _, nbytes, take = BLOCKS[kind]
    codes, scale, zero = take(rows.reshape(-1, nbytes))
    count = len(rows)
    zeros = None if zero is None else zero.view(count, -1)
    return QTensor(fmt, codes.reshape(count, -1), scale.contiguous().view(count, -1), zero=zeros)


def decoded(rows: Tensor, kind: str) -> Tensor:
    """The values of blocks as they lie, uint8 [rows, bytes of a row], float32 [rows, columns].

    Raises:
        UnsupportedError: a type that needs the gguf package, which is not there.
    """
    if kind in BLOCKS:
        return unpacked(rows, kind).dequantize()
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError:
        raise UnsupportedError(
            f"blocks of type {kind} need the 'gguf' extra to be decoded: pip install 'fewbit[gguf]'"
        ) from None
    return torch.from_numpy(dequantize(rows.cpu().numpy(), GGMLQuantizationType[kind])).to(rows.device)

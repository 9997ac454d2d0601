"""Memory layouts of the GPU kernels, made once when a model is loaded. Plain torch, any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def interleave(rows: Tensor) -> Tensor:
    """Gate rows above up rows [2 W, ...] to blocks of 8 gate and 8 up rows in turn: one thread then holds both."""
    pairs: Tensor = rows.unflatten(0, (2, -1, 8)).transpose(0, 1)  # [W / 8, 2, 8, ...]
    return pairs.reshape(rows.shape)


def pack_tiles(codes: Tensor, columns: int) -> Tensor:
    """4-bit codes (uint8 [N, K]) to int16 words [N / 64, K / (4 C), 64, C], C = `columns`; filled up with zeros.

    Nibble j of word c is column j * C + c of its tile.
    """
    codes = F.pad(codes, (0, -codes.shape[1] % (4 * columns), 0, -codes.shape[0] % 64))
    tiles: Tensor = codes.unflatten(1, (-1, 4, columns)).unflatten(0, (-1, 64))  # [N/64, 64, K/4C, 4, C]
    planes = tiles.permute(3, 0, 2, 1, 4).to(torch.int16)  # [4, N/64, K/4C, 64, C]
    return (planes[0] | (planes[1] << 4) | (planes[2] << 8) | (planes[3] << 12)).contiguous()


def pack_scale_pairs(scales: Tensor) -> Tensor:
    """Group scales bfloat16 [N, K / 128] to int32 [N / 64, K / 256, 64], two of them in each."""
    scales = F.pad(scales, (0, scales.shape[1] % 2, 0, -scales.shape[0] % 64))
    n, groups = scales.shape
    bits = scales.contiguous().view(torch.int32)  # little-endian: the first scale is the low half
    return bits.view(n // 64, 64, groups // 2).transpose(1, 2).contiguous()


def pack_block_scales(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Scales of blocks of 16, float32 [N, K / 16], as bytes for four planes, and what is left of them a row.

    A byte has five bits of exponent and three of mantissa and says a scale relative to the largest power of its row;
    ``(byte << 4) + (222 << 7)`` read as bfloat16 is that times 2**126. E4M3 scales and powers of two are exact; what
    lies more than 2**30 below the largest of its row becomes zero.

    Returns:
        int32 [N / 64, K / 256, 64, 4], a byte a plane; float32 [N], the factor of the row.
    """
    mantissa, exponent = torch.frexp(scales)  # mantissa in [1/2, 1)
    top = exponent.masked_fill(scales == 0, -126).amax(1, keepdim=True).clamp(min=-125)
    lifted = exponent - top + 31
    code = (lifted << 3) | ((mantissa * 2 - 1) * 8).round().int()
    code = torch.where((scales > 0) & (lifted > 0), code, 0).to(torch.uint8)
    code = F.pad(code, (0, -code.shape[1] % 16, 0, -code.shape[0] % 64))
    # [N/64, 64, K/256, 4 planes, 4 blocks] -> [N/64, K/256, 64, 4 blocks, 4 planes]: a plane is a byte of the word
    tiles = code.unflatten(1, (-1, 4, 4)).unflatten(0, (-1, 64)).permute(0, 2, 1, 4, 3).contiguous()
    return tiles.view(torch.int32).squeeze(-1), torch.ldexp(torch.ones(len(top), device=top.device), top[:, 0] - 1)

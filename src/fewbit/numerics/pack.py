"""Bit packing: several small codes to a byte or a 32-bit word.

Two orders are in use. *Nibbles*: byte b of an axis holds element 2b in bits 0-3 and 2b+1 in bits 4-7; codes 1, 2, 3, 4
become the bytes 0x21, 0x43. *Words*: codes one after the other, the first one lowest, in 32-bit words; the 4-bit codes
1..8 become 0x87654321. Codes of 3, 5, 6 or 7 bits leave no gap: some lie across two words.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack_nibbles(codes: Tensor, dim: int = -1) -> Tensor:
    """Uint8 4-bit codes to half as many bytes along `dim`, whose size is even."""
    dim = dim % codes.ndim
    low, high = codes.unflatten(dim, (-1, 2)).unbind(dim + 1)
    packed: Tensor = low | (high << 4)
    return packed


def unpack_nibbles(packed: Tensor, dim: int = -1) -> Tensor:
    """The inverse of `pack_nibbles`."""
    dim = dim % packed.ndim
    return torch.stack((packed & 15, packed >> 4), dim + 1).flatten(dim, dim + 1)


def pack_words(codes: Tensor, bits: int, dim: int = -1) -> Tensor:
    """Uint8 codes of `bits` (2 to 8) bits to int32 words along `dim`; the last word is filled up with zeros."""
    codes = codes.movedim(dim, -1)
    words = -(-codes.shape[-1] * bits // 32)
    if 8 % bits:
        single = (codes[..., None] >> torch.arange(bits, dtype=torch.uint8, device=codes.device)) & 1
        codes, bits = single.flatten(-2), 1
    codes = torch.nn.functional.pad(codes, (0, words * 32 // bits - codes.shape[-1]))
    while bits < 8:
        low, high = codes.unflatten(-1, (-1, 2)).unbind(-1)
        codes = low | (high << bits)
        bits *= 2
    # four bytes are a word as they lie: every machine that torch runs on has the lowest byte first
    packed = codes.flatten().view(torch.int32).view(*codes.shape[:-1], words)
    return packed.movedim(-1, dim).contiguous()


def unpack_words(packed: Tensor, bits: int, size: int, dim: int = -1) -> Tensor:
    """The inverse of `pack_words`; `size` is the number of codes along `dim`."""
    packed = packed.movedim(dim, -1)
    codes, width = packed.flatten().view(torch.uint8).view(*packed.shape[:-1], -1), 8
    least = 1 if 8 % bits else bits
    while width > least:
        width //= 2
        codes = torch.stack((codes & ((1 << width) - 1), codes >> width), -1).flatten(-2)
    if least < bits:
        places = torch.arange(bits, dtype=torch.uint8, device=codes.device)
        codes = (codes[..., : size * bits].unflatten(-1, (-1, bits)) << places).sum(-1, dtype=torch.uint8)
    return codes[..., :size].movedim(-1, dim).contiguous()

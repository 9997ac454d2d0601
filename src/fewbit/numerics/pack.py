"""Bit packing: several small codes to a byte or a 32-bit word.

Two orders are in use. *Nibbles*: byte b of an axis holds element 2b in bits 0-3 and 2b+1 in bits 4-7; codes 1, 2, 3, 4
become the bytes 0x21, 0x43. *Words*: a 32-bit word holds 32 / bits codes, the first one lowest; the 4-bit codes 1..8
become 0x87654321.
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
    """Uint8 codes of `bits` (2, 4 or 8) bits to int32 words along `dim`; the last word is filled up with zeros."""
    per_word = 32 // bits
    codes = codes.movedim(dim, -1).int()
    fill = -codes.shape[-1] % per_word
    codes = torch.nn.functional.pad(codes, (0, fill)).unflatten(-1, (-1, per_word))
    shifts = torch.arange(per_word, dtype=torch.int32, device=codes.device) * bits
    # the codes of a word have no bit in common, so the sum is the bitwise or; int32 wraps into the sign bit as wanted
    return (codes << shifts).sum(-1, dtype=torch.int32).movedim(-1, dim).contiguous()


def unpack_words(packed: Tensor, bits: int, size: int, dim: int = -1) -> Tensor:
    """The inverse of `pack_words`; `size` is the number of codes along `dim`."""
    per_word = 32 // bits
    shifts = torch.arange(per_word, dtype=torch.int32, device=packed.device) * bits
    codes = (packed.movedim(dim, -1)[..., None] >> shifts) & ((1 << bits) - 1)
    return codes.flatten(-2)[..., :size].to(torch.uint8).movedim(-1, dim).contiguous()

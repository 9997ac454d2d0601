"""Formats: the one place that says what the bits of a quantized tensor mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from fewbit.errors import RecipeError, nearest_name
from fewbit.numerics.element import E2M1, E4M3, E5M2, E8M0, INT4, INT8, Element, integer

ALL = -1
"""A block that spans its whole axis."""


@dataclass(frozen=True)
class Format:
    """An element set, a block shape and a scale storage.

    Attributes:
        name: as recipes write it.
        element: what a code stands for.
        block: (rows, columns) that share a scale, over the last two axes (out, in); axes before them are a batch.
        scale: what a scale is stored in. It is rounded to this *before* codes are made, so every reader of the file
            computes the same product.
        outer: whether one more float32 scale multiplies the whole tensor (NVFP4).
        zero: ``"int"``: W = (code - zero) * scale, with the zero in the range of the element; ``"float"``:
            W = code * scale + zero, with a float32 zero.
        act_order: whether a table says which block of its row each column belongs to (GPTQ's act-order), in place of
            the order of the columns.
    """

    name: str
    element: Element
    block: tuple[int, int]
    scale: Element | torch.dtype = torch.float32
    outer: bool = False
    zero: Literal["int", "float"] | None = None
    act_order: bool = False

    @property
    def grouped(self) -> bool:
        """Whether blocks cut a row into pieces of the same width."""
        return self.block[1] != ALL

    @property
    def scale_bits(self) -> int:
        """Bits of one stored scale."""
        return self.scale.bits if isinstance(self.scale, Element) else self.scale.itemsize * 8

    @property
    def zero_bits(self) -> int:
        """Bits of one stored zero; 0 where there is none."""
        return {None: 0, "int": self.element.bits, "float": 32}[self.zero]

    def __str__(self) -> str:
        return self.name


def _formats() -> dict[str, Format]:
    bf16 = torch.bfloat16
    found = [
        Format("int8", INT8, (ALL, ALL)),
        Format("int8_row", INT8, (1, ALL)),
        Format("int4_tensor", INT4, (ALL, ALL)),
        Format("int4_row", INT4, (1, ALL)),
        Format("fp8", E4M3, (ALL, ALL)),
        Format("fp8_row", E4M3, (1, ALL)),
        Format("fp8_block", E4M3, (128, 128)),
        Format("fp8_g128", E4M3, (1, 128)),
        Format("fp8_e5m2", E5M2, (ALL, ALL)),
        Format("fp8_e5m2_row", E5M2, (1, ALL)),
        Format("fp8_e5m2_block", E5M2, (128, 128)),
        Format("nvfp4", E2M1, (1, 16), scale=E4M3, outer=True),
        Format("mxfp4", E2M1, (1, 32), scale=E8M0),
        Format("nvfp4_g32", E2M1, (1, 32), scale=E4M3, outer=True),
        Format("mxfp8", E4M3, (1, 32), scale=E8M0),
    ]
    for group in (32, 64, 128):
        found.append(Format(f"int8_g{group}", INT8, (1, group), scale=bf16))
        found.append(Format(f"int4_g{group}", INT4, (1, group), scale=bf16))
        found.append(Format(f"int4_g{group}_asym", INT4, (1, group), scale=bf16, zero="int"))
    return {f.name: f for f in found}


FORMATS = _formats()


def format_named(name: str) -> Format:
    """The format a recipe means by `name`.

    Raises:
        RecipeError: no such format; names the nearest one.
    """
    if name not in FORMATS:
        raise RecipeError(f"unknown numeric format '{name}'; {nearest_name(name, FORMATS)}")
    return FORMATS[name]


def integer_format(bits: int, block: tuple[int, int], *, asym: bool = False, act_order: bool = False) -> Format:
    """Integers of `bits` (2 to 8) bits, as files of other tools have them too: named like those of `FORMATS`.

    Scales of groups are bfloat16, others float32; a file whose scales are stored otherwise says so.
    """
    width = {(ALL, ALL): "tensor", (1, ALL): "row"}.get(block, f"g{block[1]}")
    name = "int8" if (bits, width) == (8, "tensor") else f"int{bits}_{width}"
    name += "_asym" * asym + "_act_order" * act_order
    if name in FORMATS:
        return FORMATS[name]
    scale = torch.float32 if block[1] == ALL else torch.bfloat16
    return Format(name, integer(bits), block, scale, zero="int" if asym else None, act_order=act_order)

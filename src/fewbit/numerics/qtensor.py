"""A quantized tensor: codes, scales, and the format that says what they mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fewbit.numerics.element import Element
from fewbit.numerics.format import ALL, Format

_PIECE = 1 << 18  # weights made float at a time


@dataclass(frozen=True)
class QTensor:
    """Raw codes with their scales, as a file stores them but not packed.

    Shapes, for a weight [out, in] cut into R x C blocks (axes before the last two are a batch everywhere):
        codes: uint8 [out, in], one raw bit pattern an element.
        scale: [R, C] as stored: raw uint8 codes if the format's scale is an element set, else a float dtype.
        outer: float32 [] or None.
        zero: int8 [R, C], float32 where the format says so, or None.
        group_of: int32 [in] or None: with act-order, the column of `scale` and `zero` that each column goes with.
    """

    format: Format
    codes: Tensor
    scale: Tensor
    outer: Tensor | None = None
    zero: Tensor | None = None
    group_of: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight."""
        return self.codes.shape

    @property
    def bits(self) -> int:
        """Bits of codes, scales, zeros and their table together, packed: what the tensor costs on disk."""
        total = self.codes.numel() * self.format.element.bits + self.scale.numel() * self.format.scale_bits
        if self.outer is not None:
            total += self.outer.numel() * 32
        if self.zero is not None:
            total += self.zero.numel() * self.format.zero_bits
        if self.group_of is not None:
            total += self.group_of.numel() * 32
        return total

    def scales(self) -> Tensor:
        """What a code's value is multiplied by, block by block: float32 [R, C], the outer scale included."""
        stored = self.format.scale
        scale = stored.decode(self.scale) if isinstance(stored, Element) else self.scale.float()
        return scale if self.outer is None else scale * self.outer

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight these bits stand for. On a CPU in pieces of some rows: little more than the result is held."""
        rows = max(self.format.block[0], 1)
        rows *= max(1, _PIECE // (rows * max(self.shape[-1], 1)))
        if self.codes.device.type != "cpu" or self.codes.ndim != 2 or self.shape[0] <= rows:
            return self._dequantize().to(dtype)
        whole = torch.empty(self.shape, dtype=dtype)
        for start in range(0, self.shape[0], rows):
            stop = min(start + rows, self.shape[0])
            whole[start:stop] = self.slice(-2, start, stop)._dequantize()
        return whole

    def _dequantize(self) -> Tensor:
        """The same in float32, at once."""
        value = self.format.element.decode(self.codes)
        if self.zero is not None and self.format.zero == "int":
            value -= spread(self.zero.float(), self.format, self.shape, self.group_of)
        value *= spread(self.scales(), self.format, self.shape, self.group_of)
        if self.zero is not None and self.format.zero == "float":
            value += spread(self.zero, self.format, self.shape, self.group_of)
        return value

    def to(self, device: torch.device | str) -> QTensor:
        """The same tensor on another device."""
        return self._with({n: t.to(device) for n, t in self.parts().items()})

    def parts(self) -> dict[str, Tensor]:
        """The tensors it is made of, by field name."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "format"}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def _with(self, parts: Mapping[str, Tensor]) -> QTensor:
        """The same format with some tensors replaced."""
        return QTensor(self.format, **{**self.parts(), **parts})

    def slice(self, dim: int, start: int, stop: int) -> QTensor:
        """Rows (`dim` -2) or columns (-1) from `start` to `stop`: a shard, exact.

        Raises:
            ValueError: the cut goes through a block.
        """
        dim = dim - self.codes.ndim if dim >= 0 else dim
        block = self.format.block[dim]
        size = self.codes.shape[dim]
        parts = {"codes": self.codes.narrow(dim, start, stop - start)}
        if self.group_of is not None and dim == -1:
            parts["group_of"] = self.group_of.narrow(0, start, stop - start)  # into the whole row's scales, as before
        elif block != ALL:
            if start % block or (stop % block and stop != size):
                raise ValueError(f"cut {start}:{stop} of axis {dim} goes through a block of {block} ({self.format})")
            first, last = start // block, -(-stop // block)
            for name in ("scale", "zero"):
                tensor: Tensor | None = getattr(self, name)
                if tensor is not None:
                    parts[name] = tensor.narrow(dim, first, last - first)
        return self._with(parts)

    def equal(self, other: QTensor) -> bool:
        """Whether format, codes and scales are the same bits."""
        mine, theirs = self.parts(), other.parts()
        return (
            self.format == other.format
            and mine.keys() == theirs.keys()
            and all(mine[n].dtype == theirs[n].dtype and torch.equal(mine[n], theirs[n]) for n in mine)
        )


def uncoded(
    fmt: Format,
    scale: Tensor,
    outer: Tensor | None = None,
    zero: Tensor | None = None,
    group_of: Tensor | None = None,
) -> QTensor:
    """A tensor of which only the scales are known yet: what to round with."""
    return QTensor(fmt, torch.empty(0, dtype=torch.uint8), scale, outer, zero, group_of)


def cat(pieces: Sequence[QTensor]) -> QTensor:
    """Join along the rows, exactly.

    Raises:
        ValueError: the formats differ, a scale that spans all rows differs between the pieces, or a piece that
            is not the last one ends inside a block.
    """
    first = pieces[0]
    if any(p.format != first.format for p in pieces):
        raise ValueError(f"cannot join formats {', '.join(str(p.format) for p in pieces)}")
    rows = first.format.block[0]
    if rows != ALL and any(p.shape[-2] % rows for p in pieces[:-1]):
        sizes = " + ".join(str(p.shape[-2]) for p in pieces)
        raise ValueError(f"cannot join {sizes} rows: a piece ends inside a block of {rows} ({first.format})")
    joined = {"codes": torch.cat([p.codes for p in pieces], -2)}
    for name in first.parts().keys() - {"codes"}:
        tensors = [p.parts()[name] for p in pieces]
        if name in ("outer", "group_of") or rows == ALL:
            if not all(torch.equal(t, tensors[0]) for t in tensors):
                raise ValueError(f"cannot join: the {name} of the whole tensor differs ({first.format})")
            joined[name] = tensors[0]
        else:
            joined[name] = torch.cat(tensors, -2)
    return first._with(joined)


def block_size(fmt: Format, shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of one block of a tensor of this shape."""
    rows, cols = (size if block == ALL else block for block, size in zip(fmt.block, shape[-2:], strict=True))
    return rows, cols


def spread(blockwise: Tensor, fmt: Format, shape: Sequence[int], group_of: Tensor | None = None) -> Tensor:
    """One value a block, [..., R, C], broadcastable to the shape of the tensor; the last blocks may be ragged."""
    if group_of is not None:
        return blockwise[..., group_of]
    rows, cols = block_size(fmt, shape)
    if rows not in (1, shape[-2]):
        blockwise = blockwise.repeat_interleave(rows, -2)[..., : shape[-2], :]
    if cols not in (1, shape[-1]):
        blockwise = blockwise.repeat_interleave(cols, -1)[..., : shape[-1]]
    return blockwise

"""The reference rounding of every format, in plain torch, on any device: what kernels and exporters are held to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.numerics.element import E4M3, E8M0, Element
from fewbit.numerics.format import ALL, Format
from fewbit.numerics.qtensor import QTensor, block_size, cat, spread, uncoded

_PIECE = {"cpu": 1 << 18, "cuda": 1 << 24}  # weights rounded at a time
_SHRINKS = 16  # candidates of the scale search: from the whole range down to about half of it


def quantize(
    x: Tensor, fmt: Format, *, scale: Tensor | None = None, outer: Tensor | None = None, zero: Tensor | None = None
) -> QTensor:
    """Round `x` to the nearest numbers that `fmt` can say.

    Args:
        x: [..., out, in], any float dtype.
        fmt: the format.
        scale: stored scales to use, as `QTensor.scale`; None: chosen by `choose_scale`.
        outer: the outer scale that belongs to a given `scale`; alone it fixes the outer scale of chosen ones.
        zero: the zeros that belong to a given `scale`.

    Raises:
        UnsupportedError: the width does not divide by the block.
        CheckpointError: `x` holds NaN or infinity.
    """
    check_fits(fmt, x.shape)
    x = x.float()
    if not all(torch.isfinite(piece).all() for piece in pieces(x, fmt)):
        raise CheckpointError("holds NaN or infinity, which no format can round; repair the weights first")
    if scale is not None:
        return round_to(x, uncoded(fmt, scale, outer, zero))
    # rows of blocks know nothing of each other: pieces that fit a cache are faster, and the search needs little memory
    parts = pieces(x, fmt)
    if fmt.outer and outer is None:
        outer = outer_scale(_amax(parts), fmt)
    if fmt.block == (ALL, ALL) and x.ndim == 2:
        if _is_searched(fmt):
            return _quantize(x, fmt, outer)
        stored, _, _ = choose_scale(_amax(parts).reshape(1, 1), fmt)
        like = uncoded(fmt, stored)
        return cat([round_to(part, like) for part in parts])
    return cat([_quantize(part, fmt, outer) for part in parts])


def pieces(x: Tensor, fmt: Format) -> tuple[Tensor, ...]:
    """A matrix in pieces of whole rows of blocks, as many as are rounded at a time; anything else is one piece."""
    if x.ndim != 2:
        return (x,)
    rows = max(fmt.block[0], 1)
    parts: tuple[Tensor, ...] = x.split(rows * max(1, _PIECE[x.device.type] // (rows * max(x.shape[1], 1))))
    return parts


def _amax(parts: Sequence[Tensor]) -> Tensor:
    """The largest magnitude of all, []."""
    return torch.stack([part.abs().amax() for part in parts]).amax()


def _quantize(x: Tensor, fmt: Format, outer: Tensor | None) -> QTensor:
    scale, outer, zero = choose_scale(x, fmt, outer)
    return round_to(x, uncoded(fmt, scale, outer, zero))


def round_to(x: Tensor, like: QTensor) -> QTensor:
    """Round float32 `x` with the format and scales of `like`, whose codes are not looked at."""
    fmt = like.format
    ratio = x / spread(like.scales(), fmt, x.shape, like.group_of)
    if like.zero is not None:
        # the zero is added before rounding as the compressed-tensors library does
        ratio = ratio + spread(like.zero.float(), fmt, x.shape, like.group_of)
    return replace(like, codes=fmt.element.encode(ratio))


def check_fits(fmt: Format, shape: torch.Size | tuple[int, ...]) -> None:
    """Raise unless a weight of `shape` can be rounded to `fmt` in whole blocks. 2-D float blocks may be ragged."""
    if fmt.act_order or fmt.zero == "float":
        raise UnsupportedError(f"{fmt} is only read: nothing here rounds to it")
    rows, cols = fmt.block
    if cols not in (1, ALL) and rows == 1 and shape[-1] % cols:
        raise UnsupportedError(
            f"{shape[-1]} columns do not divide into blocks of {cols} ({fmt}); "
            "give this layer a format with smaller groups or whole rows"
        )


def choose_scale(
    x: Tensor, fmt: Format, outer: Tensor | None = None, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Scale, outer scale and zero of float32 `x`, as stored. A block of zeros gets scale 1.

    With `importance` [in], whatever the format, the scale of least squared error weighted by it, in each block.

    Integers of four bits take the scale of least squared error in each block, everything else the largest magnitude;
    powers of two follow the OCP MX rule as the compressed-tensors library reads it (floor of the logarithm, magnitudes
    of 1.75 and up counted to the next power).
    """
    element = fmt.element
    blocks = _blocks(x, fmt)  # [..., R, C, n]
    if fmt.outer and outer is None:
        outer = outer_scale(x.abs().amax(), fmt)
    weights = None if importance is None else _blocks(importance.float().expand_as(x), fmt)
    if weights is not None or _is_searched(fmt):
        stored, zero = _search(blocks, fmt, outer, weights)
        return stored, outer, zero
    amax = blocks.abs().amax(-1)  # [..., R, C]
    if fmt.scale is E8M0:
        mantissa, exponent = torch.frexp(amax)  # amax = mantissa * 2**exponent, the mantissa in [1/2, 1)
        exponent = exponent - 1 + (mantissa >= 0.875).int() - (math.frexp(element.max)[1] - 1)
        code = torch.where(amax > 0, exponent, 0).clamp(-127, 127) + 127
        return code.to(torch.uint8), None, None
    if fmt.outer:
        assert outer is not None
        return _store_under(_over(amax, element.max), amax, fmt, outer), outer, None
    return store_scale(amax_scale(amax, fmt), fmt), None, None


def _is_searched(fmt: Format) -> bool:
    return fmt.zero == "int" or (fmt.element.integer and fmt.element.bits <= 4)


def amax_scale(amax: Tensor, fmt: Format) -> Tensor:
    """The float32 scale at which a magnitude of `amax` just fits the elements; 1 where it is 0.

    A symmetric integer range is one wider below than above: half a step is shared, so INT8 divides by 127.5.
    """
    element = fmt.element
    top = (element.max - element.min) / 2 if element.integer else element.max
    return torch.where(amax > 0, _over(amax, top), 1.0)


def input_scale(amax: Tensor, fmt: Format) -> Tensor:
    """The calibrated scale of an input whose largest magnitude was `amax`: float32 []."""
    return outer_scale(amax, fmt) if fmt.outer else amax_scale(amax.float().reshape(()), fmt)


def _over(x: Tensor, number: float) -> Tensor:
    """``x / number``, correctly rounded: with a plain number a GPU multiplies by its reciprocal instead."""
    return x / torch.full((), number, dtype=x.dtype, device=x.device)


def outer_scale(amax: Tensor, fmt: Format) -> Tensor:
    """The float32 scale over the block scales, [], for a largest magnitude of `amax`.

    It is a power of two: dialects that store the reciprocal and divide by it (compressed-tensors) and those that store
    the scale and multiply (Model Optimizer) then compute the same products to the last bit. A block scale is a float of
    its own, so up to one binary digit of range is all that it costs.
    """
    top = fmt.element.max * (fmt.scale.max if isinstance(fmt.scale, Element) else 1.0)
    mantissa, exponent = torch.frexp(_over(amax.double().reshape(()), top))
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(-126, 126)  # of the power at or above
    return torch.where(amax > 0, torch.ldexp(torch.ones_like(mantissa), exponent), 1.0).float()


def store_scale(scale: Tensor, fmt: Format) -> Tensor:
    """Float32 scales as the format stores them."""
    if isinstance(fmt.scale, Element):
        return fmt.scale.encode(scale)
    # smaller than the storage can say is the smallest it can say: a scale of zero would divide by zero
    return scale.to(fmt.scale).clamp_min(torch.finfo(fmt.scale).tiny)


def _store_under(scale: Tensor, amax: Tensor, fmt: Format, outer: Tensor) -> Tensor:
    """Block scales as stored under an outer scale; 1 where there is nothing to say."""
    smallest = min(v for v in E4M3.values if v > 0)
    return store_scale(torch.where(amax > 0, (scale / outer).clamp(smallest, E4M3.max), 1.0), fmt)


def _search(blocks: Tensor, fmt: Format, outer: Tensor | None, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The stored scale (and zero) of least squared error, weighted or not, of each block [..., R, C, n]."""
    element = fmt.element
    best: tuple[Tensor, Tensor, Tensor | None] | None = None  # error, scale, zero
    for stored, zero in _tried(blocks, fmt, outer):
        scale = uncoded(fmt, stored, outer).scales()[..., None]
        ratio = blocks / scale if zero is None else blocks / scale + zero[..., None]
        value = (
            ratio.round().clamp(element.min, element.max) if element.integer else element.decode(element.encode(ratio))
        )
        off = ((value if zero is None else value - zero[..., None]) * scale - blocks).square()
        error = (off if weights is None else off * weights).sum(-1)
        if best is None:
            best = error, stored, zero
            continue
        better = error < best[0]
        held = None if zero is None or best[2] is None else torch.where(better, zero, best[2])
        best = torch.where(better, error, best[0]), torch.where(better, stored, best[1]), held
    assert best is not None
    return best[1], None if best[2] is None else best[2].to(torch.int8)


def _tried(blocks: Tensor, fmt: Format, outer: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """What the search tries: a stored scale, and a zero where the format has one.

    Ranges from a good half of a block's to all of it; for symmetric integers also the one at which the largest
    magnitude itself is met whichever its sign (amax / 7), for 4-bit floats the one at which it is 4 instead of 6, with
    finer steps below; of powers of two the smallest that holds the block, and the one below.
    """
    element = fmt.element
    if fmt.scale is E8M0:
        amax = blocks.abs().amax(-1)
        mantissa, exponent = torch.frexp(_over(amax, element.max))
        holds = torch.where(mantissa == 0.5, exponent - 1, exponent)
        for step in (0, -1):
            yield (torch.where(amax > 0, holds + step, 0).clamp(-127, 127) + 127).to(torch.uint8), None
        return
    factors, steps = search_factors(fmt), element.max - element.min
    if fmt.zero == "int":
        low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
        half = high / 2 - low / 2  # of the width, which itself may overflow
        for factor in factors:
            stored = store_scale(torch.where(half > 0, _over(half, steps / (2 * factor)), 1.0), fmt)
            yield stored, (element.min - low * factor / stored.float()).round().clamp(element.min, element.max)
        return
    amax = blocks.abs().amax(-1)
    for factor in factors:
        scale = _over(amax, (steps / 2 if element.integer else element.max) / factor)
        if outer is None:
            yield store_scale(torch.where(amax > 0, scale, 1.0), fmt), None
        else:
            yield _store_under(scale, amax, fmt, outer), None


def search_factors(fmt: Format) -> list[float]:
    """Parts of a block's range that the search tries, in order; see `_tried`."""
    element, factors = fmt.element, [1 - shrink / (2 * _SHRINKS) for shrink in range(_SHRINKS)]
    if fmt.zero == "int":
        return factors
    if element.integer:
        return [(element.max - element.min) / (2 * element.max), *factors]
    return [*factors, 1.5] if element.bits == 4 else factors


def _blocks(x: Tensor, fmt: Format) -> Tensor:
    """[..., out, in] as [..., R, C, elements of a block]; a ragged edge is filled up with zeros."""
    rows, cols = block_size(fmt, x.shape)
    x = F.pad(x, (0, -x.shape[-1] % cols, 0, -x.shape[-2] % rows))
    x = x.unflatten(-1, (-1, cols)).unflatten(-3, (-1, rows))  # [..., R, rows, C, cols]
    return x.transpose(-3, -2).flatten(-2)


def fake_quantize(x: Tensor, fmt: Format, *, scale: Tensor | None = None, outer: Tensor | None = None) -> Tensor:
    """`x` as it comes back from `fmt`: what a linear's input looks like to the product. Float32, same shape.

    Unlike `quantize` it does not look for NaN: this is the hot path of a forward pass.
    """
    x = x.float()
    flat = x.reshape(-1, x.shape[-1])  # tokens as rows
    rows = max(1, _PIECE["cpu"] // max(flat.shape[1], 1))
    alone = fmt.block[0] == 1 and (outer is not None or not fmt.outer) if scale is None else scale.numel() == 1
    if alone and flat.device.type == "cpu" and len(flat) > rows:
        # tokens know nothing of each other, and on a CPU a piece that fits a cache is faster
        done = [fake_quantize(piece, fmt, scale=scale, outer=outer) for piece in flat.split(rows)]
        return torch.cat(done).view_as(x)
    zero = None
    if scale is None:
        scale, outer, zero = choose_scale(flat, fmt, outer)
    like = uncoded(fmt, scale, outer, zero)
    return round_to(flat, like).dequantize().view_as(x)

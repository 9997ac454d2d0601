"""The reference's rounding as calls: a kernel where a GPU has one, else the reference itself."""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.numerics import reference
from fewbit.numerics.element import Element
from fewbit.numerics.format import Format
from fewbit.numerics.qtensor import QTensor, cat
from fewbit.ops.device import current, has_triton

_ROWS = 32  # of a program


def choose_scale(
    x: Tensor, fmt: Format, outer: Tensor | None = None, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`numerics.reference.choose_scale` of a matrix. A GPU's sums of errors may decide near ties the other way."""
    if not (on_gpu(x) and searched(fmt)):
        return reference.choose_scale(x, fmt, outer, importance)
    scale, zero = search(x, fmt, importance)
    return scale, None, zero


def quantize(weight: Tensor, fmt: Format, *, outer: Tensor | None = None) -> QTensor:
    """`numerics.reference.quantize` of a matrix [out, in] under scales that are chosen."""
    if not (on_gpu(weight) and searched(fmt)):
        return reference.quantize(weight, fmt, outer=outer)
    reference.check_fits(fmt, weight.shape)
    done = []
    for piece in reference.pieces(weight, fmt):
        scale, _, zero = choose_scale(piece.float(), fmt)
        done.append(reference.quantize(piece, fmt, scale=scale, zero=zero))
    return cat(done)


def on_gpu(x: Tensor) -> bool:
    """Whether kernels can take it."""
    return x.is_cuda and has_triton()


def searched(fmt: Format) -> bool:
    """Whether the kernel can search the scales of a format: integers of four bits in groups of a power of two."""
    columns = fmt.block[1]
    return fmt.element.name == "int4" and fmt.block[0] == 1 and columns >= 16 and columns & (columns - 1) == 0


def search(x: Tensor, fmt: Format, importance: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The stored scale, and the zero, of least squared error of each group of x [out, in], weighted or not."""
    from fewbit.ops.rounding.triton_rounding import search as kernel

    x = x.float().contiguous()
    groups = x.shape[0], x.shape[1] // fmt.block[1]
    scale = torch.empty(groups, device=x.device)
    zero = torch.empty(groups, dtype=torch.int8, device=x.device) if fmt.zero else None
    factors = torch.tensor(reference.search_factors(fmt), dtype=torch.float64)
    half = (fmt.element.max - fmt.element.min) / 2
    tried = torch.stack([factors, half / factors]).float().to(x.device)
    weights = x if importance is None else importance.float().contiguous()
    assert isinstance(fmt.scale, torch.dtype)
    with current(x.device):
        kernel[(-(-scale.numel() // _ROWS),)](
            x, weights, tried, scale, scale if zero is None else zero, scale.numel(), groups[1], tried.shape[1],
            float(torch.finfo(fmt.scale).tiny), SIZE=fmt.block[1], ROWS=_ROWS, LOW=fmt.element.min,
            HIGH=fmt.element.max, ZERO=zero is not None, WEIGHTED=importance is not None,
            BF16=fmt.scale == torch.bfloat16, num_warps=4,
        )  # fmt: skip
    return scale.to(fmt.scale), zero


def round_columns(
    w: Tensor, upper: Tensor, scale: Tensor, zero: Tensor | None, element: Element
) -> tuple[Tensor, Tensor]:
    """Round the columns of w one after another; those to the right make up for the error of each.

    Args:
        w: float32 [out, n].
        upper: float32 [n, n], the upper triangular factor that says how: see `compress.techniques.gptq`.
        scale: float32 [out, n], of each column.
        zero: likewise.
        element: what codes stand for.

    Returns:
        Codes uint8 [out, n], and the errors in units of the factor's diagonal, float32 [out, n].
    """
    if on_gpu(w):
        return round_columns_by_kernel(w, upper, scale, zero, element)
    w = w.clone()
    codes, errors = torch.empty(w.shape, dtype=torch.uint8, device=w.device), torch.empty_like(w)
    for i in range(w.shape[1]):
        column, s = w[:, i], scale[:, i]
        code = element.encode(column / s if zero is None else column / s + zero[:, i])
        value = element.decode(code)
        error = (column - (value if zero is None else value - zero[:, i]) * s) / upper[i, i]
        w[:, i + 1 :] -= error[:, None] * upper[i, i + 1 :]
        codes[:, i], errors[:, i] = code, error
    return codes, errors


def round_columns_by_kernel(
    w: Tensor, upper: Tensor, scale: Tensor, zero: Tensor | None, element: Element
) -> tuple[Tensor, Tensor]:
    """See `round_columns`."""
    from fewbit.ops.rounding.triton_rounding import columns as kernel

    rows, width = w.shape
    value, error = (torch.empty(width, rows, device=w.device) for _ in range(2))
    mantissa, least = (0, 0) if element.integer else element.digits
    by_column = scale.t().contiguous()
    with current(w.device):
        kernel[(-(-rows // _ROWS),)](
            w.contiguous(), upper.contiguous(), by_column, by_column if zero is None else zero.t().contiguous(), value,
            error, rows, width, ROWS=_ROWS, WIDTH=max(1 << (width - 1).bit_length(), 16), ZERO=zero is not None,
            INTEGER=element.integer, LOW=element.min, HIGH=element.max, MANTISSA=mantissa, LEAST=least, num_warps=4,
        )  # fmt: skip
    return element.encode(value.t()), error.t()

"""The search of scales, and GPTQ's columns, each reading its weights once."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _nearest(x):
    """Whole numbers nearest to |x| < 2**22, ties to even."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _to_bf16(x):
    """Float32 x > 0 rounded to a number that bfloat16 has, ties to even."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def search(
    x_ptr, weights_ptr, tried_ptr, scale_ptr, zero_ptr, groups, per_row, count, tiny,
    SIZE: tl.constexpr, ROWS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, ZERO: tl.constexpr,
    WEIGHTED: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """Grid (groups / ROWS,). The scale (and zero) of least squared error of each group: scale, zero [groups].

    x [groups, SIZE]; weights [per_row, SIZE]; tried [2, count]: parts of the range, and half the codes over them; tiny:
    the smallest scale. The arithmetic is that of `numerics.reference`.
    """
    group = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, SIZE)[None, :]
    real = group < groups
    x = tl.load(x_ptr + group[:, None] * SIZE + i, mask=real[:, None], other=0.0)
    weights = 1.0
    if WEIGHTED:
        weights = tl.load(weights_ptr + (group % per_row)[:, None] * SIZE + i)
    low = tl.minimum(tl.min(x, 1), 0.0)
    half = tl.maximum(tl.max(x, 1), 0.0) * 0.5 - low * 0.5 if ZERO else tl.max(tl.abs(x), 1)
    least = tl.full((ROWS,), float("inf"), tl.float32)
    best = tl.full((ROWS,), 1.0, tl.float32)
    best_zero = tl.zeros((ROWS,), tl.float32)
    for at in tl.range(0, count):
        part = tl.load(tried_ptr + at)
        scale = tl.where(half > 0, tl.div_rn(half, tl.zeros_like(half) + tl.load(tried_ptr + count + at)), 1.0)
        if BF16:
            scale = _to_bf16(scale)
        scale = tl.maximum(scale, tiny)
        ratio = tl.div_rn(x, tl.broadcast_to(scale[:, None], (ROWS, SIZE)))
        zero = tl.zeros_like(half)
        if ZERO:
            zero = tl.minimum(tl.maximum(_nearest(LOW - tl.div_rn(low * part, scale)), LOW), HIGH)
            ratio += zero[:, None]
        value = tl.minimum(tl.maximum(_nearest(ratio), LOW), HIGH)
        off = (value - zero[:, None]) * scale[:, None] - x
        error = tl.sum(off * off * weights, 1)
        better = error < least
        least = tl.where(better, error, least)
        best = tl.where(better, scale, best)
        best_zero = tl.where(better, zero, best_zero)
    tl.store(scale_ptr + group, best, mask=real)
    if ZERO:
        tl.store(zero_ptr + group, best_zero.to(tl.int8), mask=real)


@triton.jit
def columns(
    w_ptr, upper_ptr, scale_ptr, zero_ptr, value_ptr, error_ptr, rows, width,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, ZERO: tl.constexpr, INTEGER: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr, MANTISSA: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """Grid (rows / ROWS,). See `rounding.round_columns`: w [rows, width], upper [width, width], the rest [width, rows].

    value: that of the code, before the zero and the scale. A float has MANTISSA bits and exponents from LEAST on.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, WIDTH)
    real = row < rows
    w = tl.load(w_ptr + row[:, None] * width + j[None, :], mask=real[:, None] & (j < width)[None, :], other=0.0)
    for i in tl.range(0, width):
        at = i * rows.to(tl.int64) + row
        column = tl.sum(tl.where((j == i)[None, :], w, 0.0), 1)
        scale = tl.load(scale_ptr + at, mask=real, other=1.0)
        u = tl.load(upper_ptr + i * width + j, mask=j < width, other=0.0)
        diagonal = tl.sum(tl.where(j == i, u, 0.0), 0)
        ratio = tl.div_rn(column, scale)
        zero = tl.zeros_like(ratio)
        if ZERO:
            zero = tl.load(zero_ptr + at, mask=real, other=0.0)
            ratio += zero
        ratio = tl.minimum(tl.maximum(ratio, LOW), HIGH)
        if INTEGER:
            value = _nearest(ratio)
        else:
            exponent = tl.maximum(((ratio.to(tl.int32, bitcast=True) >> 23) & 255) - 127, LEAST) - MANTISSA
            step = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
            value = _nearest(tl.div_rn(ratio, step)) * step
        error = tl.div_rn(column - (value - zero) * scale, tl.zeros_like(ratio) + diagonal)
        w -= error[:, None] * tl.where(j > i, u, 0.0)[None, :]
        tl.store(value_ptr + at, value, mask=real)
        tl.store(error_ptr + at, error, mask=real)

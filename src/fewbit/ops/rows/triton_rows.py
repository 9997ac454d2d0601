"""What happens to a row of activations between two products: embedding, norm, activation, rounding, choosing.

One program a row, so a row is read once. ``CODE`` (``none``, ``e4m3``, ``int8``) says what the next linear wants to
read; ``DYNAMIC``: under a scale made from the row, else under the one scale at `s_ptr`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fewbit.ops.linear.triton_epilogue import load_stats, row_scale
from fewbit.ops.triton_common import round_code, start_next, top_of, wait_previous


@triton.jit
def _store_row(
    y, out_ptr, s_ptr, row, at, mask, CODE: tl.constexpr, DYNAMIC: tl.constexpr, PTX: tl.constexpr
):  # fmt: skip
    """Round float32 y and store it at out_ptr + at; a dynamic scale goes to s_ptr[row]."""
    if CODE != "none":
        if DYNAMIC:
            amax = tl.max(tl.where(mask, tl.abs(y), 0.0), 0)
            amax = tl.where(amax > 0, amax, top_of(CODE))
            tl.store(s_ptr + row, amax / top_of(CODE))
            inverse = top_of(CODE) / amax
        else:
            inverse = 1.0 / tl.load(s_ptr)
        y = round_code(y * inverse, CODE, PTX)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_norm(
    x_ptr, res_ptr, g_ptr, out_ptr, s_ptr, K, eps,
    BLOCK: tl.constexpr, ADD: tl.constexpr, CODE: tl.constexpr, DYNAMIC: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Grid (T,). res += x (if ADD), then out = RMSNorm(res) * g, rounded. x, res [T, K]; g [K]."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    mask = k < K
    at = row * K + k
    r = tl.load(res_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        stored = (r + tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)).to(res_ptr.dtype.element_ty)
        tl.store(res_ptr + at, stored, mask=mask)
        r = stored.to(tl.float32)
    rms = tl.rsqrt(tl.sum(r * r, 0) / K + eps)
    y = r * rms * tl.load(g_ptr + k, mask=mask, other=0.0).to(tl.float32)
    _store_row(y, out_ptr, s_ptr, row, at, mask, CODE, DYNAMIC, PTX)


@triton.jit
def gated(
    x_ptr, out_ptr, s_ptr, W, BLOCK: tl.constexpr, CODE: tl.constexpr, DYNAMIC: tl.constexpr, PTX: tl.constexpr
):  # fmt: skip
    """Grid (T,). out [T, W] = silu(gate) * up, rounded; x [T, 2 W] holds blocks of 8 gate and 8 up columns."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    mask = k < W
    at = row * (2 * W) + k // 8 * 16 + k % 8
    gate = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + at + 8, mask=mask, other=0.0).to(tl.float32)
    y = gate / (1 + tl.exp(-gate)) * up
    _store_row(y, out_ptr, s_ptr, row, row * W + k, mask, CODE, DYNAMIC, PTX)


@triton.jit
def round_rows(
    x_ptr, out_ptr, s_ptr, K, BLOCK: tl.constexpr, CODE: tl.constexpr, DYNAMIC: tl.constexpr, PTX: tl.constexpr
):
    """Grid (T,). out = codes of x [T, K]."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    mask = k < K
    y = tl.load(x_ptr + row * K + k, mask=mask, other=0.0).to(tl.float32)
    _store_row(y, out_ptr, s_ptr, row, row * K + k, mask, CODE, DYNAMIC, PTX)


@triton.jit
def round_known(
    x_ptr, stats_ptr, tops_ptr, zero_ptr, out_ptr, s_ptr, K, eps,
    BLOCK: tl.constexpr, NORM: tl.constexpr, CODE: tl.constexpr, DYNAMIC: tl.constexpr, PDL: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """Grid (T, K / BLOCK). The decode step's rounding: out = codes of x [T, K], whose magnitudes are known.

    NORM: x is res * g and is multiplied by the inverse RMS from the stats first; those at `zero_ptr` are cleared. The
    stats of all three have a row stride of 48, see `fewbit.ops.linear.triton_epilogue`.
    """
    start_next(PDL)
    wait_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    squares, given = load_stats(stats_ptr + row * 48, tops_ptr + row * 48, s_ptr, CODE, DYNAMIC, NORM)
    k = piece * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(x_ptr + row * K + k, mask=k < K, other=0.0)
    inverse, factor = row_scale(squares, given, K, eps, CODE, DYNAMIC, NORM)
    y = round_code(y.to(tl.float32) * inverse, CODE, PTX)
    tl.store(out_ptr + row * K + k, y.to(out_ptr.dtype.element_ty), mask=k < K)
    if piece == 0:
        if DYNAMIC:
            tl.store(s_ptr + row, factor)
        if NORM:
            i = tl.arange(0, 64)
            tl.store(zero_ptr + row * 48 + i, tl.zeros((64,), tl.float32), mask=i < 48)


@triton.jit
def embed(
    token_ptr, source_ptr, last_ptr, table_ptr, g_ptr, res_ptr, out_ptr, stats_ptr, clear_ptr, K, clear_n,
    BLOCK: tl.constexpr, CLEAR: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (T,). The decode step's first kernel: res = table[token] (float32), out = res * g, and the stats of both.

    The token of row i is last[source[i]] (what the step before chose) or, where source[i] < 0, token[i]. The row's
    clear_n numbers at `clear_ptr` become zero; CLEAR is a power of two that covers them.
    """
    start_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(source_ptr + row)
    token = tl.load(token_ptr + row)
    if source >= 0:
        token = tl.load(last_ptr + source)
    k = tl.arange(0, BLOCK)
    mask = k < K
    r = tl.load(table_ptr + token.to(tl.int64) * K + k, mask=mask, other=0.0).to(tl.float32)
    tl.store(res_ptr + row * K + k, r, mask=mask)
    g = tl.load(g_ptr + k, mask=mask, other=0.0).to(tl.float32)
    y = (r * g).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * K + k, y, mask=mask)
    i = tl.arange(0, 64)
    stats = tl.where(i == 0, tl.sum(r * r, 0), tl.where(i == 16, tl.max(tl.abs(y.to(tl.float32)), 0), 0.0))
    tl.store(stats_ptr + row * 48 + i, stats, mask=i < 48)
    c = tl.arange(0, CLEAR)
    tl.store(clear_ptr + row * clear_n + c, tl.zeros((CLEAR,), tl.float32), mask=c < clear_n)


@triton.jit
def argmax(
    logits_ptr, part_ptr, index_ptr, count_ptr, best_ptr, out_ptr, V,
    BLOCK: tl.constexpr, PIECES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (T, PIECES). The largest logit of each row and its id, the lowest of equals; NaN counts as the largest.

    part float32 and index int32 [T, PIECES]; count int32 [T], zero before and after; best float32 [T], out int32 [T].
    """
    start_next(PDL)
    wait_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    per = (V + PIECES * BLOCK - 1) // (PIECES * BLOCK) * BLOCK
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    arg = tl.zeros((BLOCK,), tl.int32)
    for start in tl.range(piece * per, tl.minimum(piece * per + per, V), BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + row * V + i, mask=i < V, other=float("-inf")).to(tl.float32)
        x = tl.where(x != x, float("inf"), x)
        more = x > top
        arg = tl.where(more, i, arg)
        top = tl.where(more, x, top)
    best = tl.max(top, 0)
    at = tl.min(tl.where(top == best, arg, 2147483647), 0)
    tl.store(part_ptr + row * PIECES + piece, best)
    tl.store(index_ptr + row * PIECES + piece, at)
    tl.debug_barrier()
    done = tl.atomic_add(count_ptr + row, 1, sem="acq_rel")
    if done == PIECES - 1:
        p = row * PIECES + tl.arange(0, PIECES)
        tops = tl.load(part_ptr + p, cache_modifier=".cg")
        ids = tl.load(index_ptr + p, cache_modifier=".cg")
        best = tl.max(tops, 0)
        tl.store(best_ptr + row, best)
        tl.store(out_ptr + row, tl.min(tl.where(tops == best, ids, 2147483647), 0))
        tl.store(count_ptr + row, 0)


@triton.jit
def scale_product(x_ptr, rows_ptr, columns_ptr, out_ptr, T, N, ROWS: tl.constexpr):
    """Grid (T / 16, N / 256). out = x (int32) * rows * columns; rows float32 [T] (ROWS) or []."""
    rt = (tl.program_id(0) * 16 + tl.arange(0, 16)).to(tl.int64)
    rn = tl.program_id(1) * 256 + tl.arange(0, 256)
    mask = (rt < T)[:, None] & (rn < N)[None, :]
    at = rt[:, None] * N + rn[None, :]
    a = tl.load(rows_ptr + rt, mask=rt < T, other=0.0)[:, None] if ROWS else tl.load(rows_ptr)
    b = tl.load(columns_ptr + rn, mask=rn < N, other=0.0)[None, :]
    y = tl.load(x_ptr + at, mask=mask, other=0).to(tl.float32) * a * b
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=mask)

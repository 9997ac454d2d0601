"""Skinny products with 16- and 8-bit weights: few tokens, every weight read once, at the speed of memory.

`wide_gemv`: one token, on the CUDA cores; rounds the token to the codes of a quantized input by itself.
`wide_gemm`: up to 128 tokens on the matrix units, the weight on the M side of the instruction, so that few tokens waste
nothing; the reduction is cut in SPLIT pieces where rows alone do not fill the GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fewbit.ops.linear.triton_epilogue import (
    gemm_epilogue,
    gemv_epilogue,
    gemv_residual,
    gemv_rows,
    load_stats,
    row_scale,
    scale_rows,
)
from fewbit.ops.triton_common import dot4, prefetch_line, round_code, start_next, wait_previous


@triton.jit
def _load_x(x_ptr, rk, K, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(x_ptr + rk)
    return tl.load(x_ptr + rk, mask=rk < K, other=0.0)


@triton.jit
def _load_w(p, rk, K, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(p, eviction_policy="evict_first")
    if p.dtype.element_ty == tl.int8:
        return tl.load(p, mask=(rk < K)[None, :], other=0, eviction_policy="evict_first")
    return tl.load(p, mask=(rk < K)[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def _load_words(p, rk, K, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(p, eviction_policy="evict_first")
    return tl.load(p, mask=(rk * 4 < K)[None, :], other=0, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["ahead"])
def wide_gemv(
    x_ptr, w_ptr, sw_ptr, sx_ptr, tops_ptr, bias_ptr, t_ptr, b_ptr, stats_ptr, out_ptr, out_scale_ptr, res_ptr, g_ptr,
    stats_out_ptr, count_ptr, zero_ptr, ahead_ptr, ahead, N, K, eps,
    BN: tl.constexpr, BK: tl.constexpr, NIT: tl.constexpr, CODE: tl.constexpr, DYNAMIC: tl.constexpr, SX: tl.constexpr,
    SCALED: tl.constexpr, EVEN: tl.constexpr,
    BIAS: tl.constexpr, RANK: tl.constexpr, OUT: tl.constexpr, OUT_CODE: tl.constexpr, TOPS: tl.constexpr,
    NORM: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Grid (N / BN,). x [K]; w [N, K]; sw float32 [N]. BK * NIT >= K.

    CODE: x is rounded to such codes here, under a scale from the magnitudes at `tops_ptr` [16] (DYNAMIC) or sx
    float32 []; SX: x holds codes already, in units of sx. NORM: x is multiplied by the inverse RMS that the stats give.

    The weights of the first iteration are under way before the wait for the kernel before this one.
    """
    pid = tl.program_id(0)
    row = gemv_rows(pid, BN, OUT)
    rk = tl.arange(0, BK)
    wp = w_ptr + tl.minimum(row, N - 1)[:, None].to(tl.int64) * K + rk[None, :]
    w = _load_w(wp, rk, K, EVEN)
    start_next(PDL)
    wait_previous(PDL)
    squares, given = load_stats(stats_ptr, tops_ptr, sx_ptr, CODE, DYNAMIC, NORM)
    v = _load_x(x_ptr, rk, K, EVEN)
    res, g = gemv_residual(res_ptr, g_ptr, row, N, OUT)
    inverse = 1.0
    if CODE != "none":
        inverse, factor = row_scale(squares, given, K, eps, CODE, DYNAMIC, NORM)
    acc = tl.zeros((BN, BK), tl.float32)
    for it in tl.range(0, NIT):
        wn = w
        vn = v
        if NIT > 1:
            nx = tl.minimum(it + 1, NIT - 1) * BK
            wn = _load_w(wp + nx, nx + rk, K, EVEN)
            vn = _load_x(x_ptr, nx + rk, K, EVEN)
        x = v.to(tl.float32)
        if CODE != "none":
            x = round_code(x * inverse, CODE, PTX)
        if w_ptr.dtype.element_ty == tl.float8e4nv:
            acc += w.to(tl.float16).to(tl.float32) * x[None, :]  # two numbers to a conversion
        else:
            acc += w.to(tl.float32) * x[None, :]
        w = wn
        v = vn
    if SX:
        factor = tl.load(sx_ptr)
    elif CODE == "none":
        _, factor = row_scale(squares, given, K, eps, CODE, DYNAMIC, NORM)
    r = tl.sum(acc, 1) * factor
    if SCALED:
        r = r * tl.load(sw_ptr + tl.minimum(row, N - 1))
    gemv_epilogue(
        r, res, g, bias_ptr, t_ptr, b_ptr, out_ptr, out_scale_ptr, res_ptr, stats_out_ptr, zero_ptr, ahead_ptr, ahead,
        row, pid, N, BN, OUT, OUT_CODE, TOPS, AHEAD, BIAS, RANK, NORM, PTX,
    )  # fmt: skip


@triton.jit(do_not_specialize=["ahead"])
def int8_gemv(
    x_ptr, w_ptr, sw_ptr, sx_ptr, tops_ptr, bias_ptr, t_ptr, b_ptr, stats_ptr, out_ptr, out_scale_ptr, res_ptr, g_ptr,
    stats_out_ptr, count_ptr, zero_ptr, ahead_ptr, ahead, N, K, eps,
    BN: tl.constexpr, BK: tl.constexpr, NIT: tl.constexpr, DYNAMIC: tl.constexpr, EVEN: tl.constexpr,
    BIAS: tl.constexpr, RANK: tl.constexpr, OUT: tl.constexpr, OUT_CODE: tl.constexpr, TOPS: tl.constexpr,
    NORM: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """`wide_gemv` for INT8 weights and inputs: four products to an instruction, sums exact. w int32 [N, K / 4].

    x [K] is rounded here, see `wide_gemv`.
    """
    pid = tl.program_id(0)
    row = gemv_rows(pid, BN, OUT)
    words: tl.constexpr = BK // 4
    rk = tl.arange(0, words)
    wp = w_ptr + tl.minimum(row, N - 1)[:, None].to(tl.int64) * (K // 4) + rk[None, :]
    w = _load_words(wp, rk, K, EVEN)
    start_next(PDL)
    wait_previous(PDL)
    squares, given = load_stats(stats_ptr, tops_ptr, sx_ptr, "int8", DYNAMIC, NORM)
    r4 = tl.arange(0, 4)
    at = rk[:, None] * 4 + r4[None, :]
    v = _load_x(x_ptr, at, K, EVEN)
    res, g = gemv_residual(res_ptr, g_ptr, row, N, OUT)
    inverse, factor = row_scale(squares, given, K, eps, "int8", DYNAMIC, NORM)
    acc = tl.zeros((BN, words), tl.int32)
    for it in tl.range(0, NIT):
        wn = w
        vn = v
        if NIT > 1:
            nx = tl.minimum(it + 1, NIT - 1) * words
            wn = _load_words(wp + nx, nx + rk, K, EVEN)
            vn = _load_x(x_ptr, nx * 4 + at, K, EVEN)
        x = round_code(v.to(tl.float32) * inverse, "int8", PTX).to(tl.int32)
        packed = tl.sum((x & 255) << (r4 * 8)[None, :], 1)
        acc = dot4(w, tl.broadcast_to(packed[None, :], (BN, words)), acc, PTX)
        w = wn
        v = vn
    r = tl.sum(acc, 1).to(tl.float32) * factor * tl.load(sw_ptr + tl.minimum(row, N - 1))
    gemv_epilogue(
        r, res, g, bias_ptr, t_ptr, b_ptr, out_ptr, out_scale_ptr, res_ptr, stats_out_ptr, zero_ptr, ahead_ptr, ahead,
        row, pid, N, BN, OUT, OUT_CODE, TOPS, AHEAD, BIAS, RANK, NORM, PTX,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M", "ahead"])
def wide_gemm(
    x_ptr, w_ptr, sw_ptr, sx_ptr, bias_ptr, t_ptr, b_ptr, stats_ptr, out_ptr, out_scale_ptr, res_ptr, g_ptr,
    stats_out_ptr, count_ptr, zero_ptr, ahead_ptr, ahead, M, N, K, eps,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, SX: tl.constexpr,
    SCALED: tl.constexpr, PREFETCH: tl.constexpr,
    BIAS: tl.constexpr, RANK: tl.constexpr, OUT: tl.constexpr, OUT_CODE: tl.constexpr, TOPS: tl.constexpr,
    NORM: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Grid (N / BN, SPLIT, M / BM). x [M, K] numbers, or the codes of w's dtype; K a multiple of BK * SPLIT.

    sw float32 [N]; SX: ``none``, ``one`` (sx float32 []) or ``rows`` (sx float32 [M]), the scale of the codes.
    OUT_CODE: the codes in which ``silu`` stores, under the scale at `out_scale_ptr`. PREFETCH: 128-byte lines a row.
    """
    pid_n = tl.program_id(0)
    pid_k = tl.program_id(1)
    pid_m = tl.program_id(2)
    per = K // BK // SPLIT
    k0 = pid_k * per
    rn = pid_n * BN + tl.arange(0, BN)
    rm = pid_m * BM + tl.arange(0, BM)
    rk = tl.arange(0, BK)
    wrow = w_ptr + tl.minimum(rn, N - 1).to(tl.int64) * K
    wp = wrow[:, None] + rk[None, :]
    xp = x_ptr + rm[:, None] * K + rk[None, :]
    INT: tl.constexpr = x_ptr.dtype.element_ty == tl.int8
    if PDL:
        start_next(PDL)
        line: tl.constexpr = 1024 // w_ptr.dtype.element_ty.primitive_bitwidth
        for j in tl.static_range(PREFETCH):
            prefetch_line(wrow + k0 * BK + j * line, PTX)
        wait_previous(PDL)
    acc = tl.zeros((BN, BM), tl.int32 if INT else tl.float32)
    for kb in tl.range(k0, k0 + per, num_stages=STAGES):
        w = tl.load(wp + kb * BK, eviction_policy="evict_first")
        if INT:
            x = tl.load(xp + kb * BK, mask=rm[:, None] < M, other=0)  # 0.0 does not cast to int8, 0 not to fp8
        else:
            x = tl.load(xp + kb * BK, mask=rm[:, None] < M, other=0.0)
        if w.dtype != x.dtype:
            w = w.to(x.dtype)
        acc = tl.dot(w, x.T, acc, out_dtype=acc.dtype)
    r = acc.to(tl.float32)
    if SCALED:
        r = r * tl.load(sw_ptr + tl.minimum(rn, N - 1))[:, None]
    r = scale_rows(r, stats_ptr, sx_ptr, rm, M, K, eps, NORM, SX)
    gemm_epilogue(
        r, bias_ptr, t_ptr, b_ptr, out_ptr, out_scale_ptr, res_ptr, g_ptr, stats_out_ptr, count_ptr, zero_ptr,
        ahead_ptr, ahead, rn, rm, pid_n, pid_k, pid_m, M, N, BN, BM, SPLIT, OUT, OUT_CODE, TOPS, AHEAD, BIAS, RANK,
        NORM, PTX,
    )  # fmt: skip

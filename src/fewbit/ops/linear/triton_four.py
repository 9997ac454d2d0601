"""Skinny products with 4-bit weights, and their decoding into a scratch for long prompts.

Weights lie in tiles of 64 rows and 4 * C columns as int16 words [N / 64, K / (4 * C), 64, C]; nibble j of word c is
column j * C + c (`layouts.pack_tiles`). So one word gives one number to each of four *planes* [rows, C], two
neighbouring words are one register, and every plane is an operand of the matrix units as it comes: Triton makes
asynchronous copies, a few logic operations in registers and matrix instructions of it, and no weight passes through
shared memory twice.
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
from fewbit.ops.triton_common import (
    e2m1_planes,
    high_bf16,
    int4_planes,
    low_bf16,
    nibble3,
    nibble4,
    prefetch_block,
    round_code,
    start_next,
    wait_previous,
)


@triton.jit
def _sum4(v, BN: tl.constexpr, F: tl.constexpr):
    return tl.sum(tl.reshape(v, (BN, F // 4, 4)), 2)  # stays inside a thread


@triton.jit
def _pairs(x_ptr, at, K, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(x_ptr + at)
    return tl.load(x_ptr + at, mask=at * 2 < K, other=0)


@triton.jit(do_not_specialize=["ahead"])
def int4_gemv(
    x_ptr, w_ptr, s_ptr, sx_ptr, tops_ptr, bias_ptr, t_ptr, b_ptr, stats_ptr, out_ptr, out_scale_ptr, res_ptr, g_ptr,
    stats_out_ptr, count_ptr, zero_ptr, ahead_ptr, ahead, N, K, eps,
    BN: tl.constexpr, KC: tl.constexpr, NIT: tl.constexpr, CODE: tl.constexpr, DYNAMIC: tl.constexpr, SX: tl.constexpr,
    EVEN: tl.constexpr,
    BIAS: tl.constexpr, RANK: tl.constexpr, OUT: tl.constexpr, OUT_CODE: tl.constexpr, TOPS: tl.constexpr,
    NORM: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """One token, symmetric groups of 128, C = 64. Grid (N / BN,). 256 * KC * NIT >= K.

    x: bfloat16 [K] seen as int32; w: tiles seen as int32 [N / 64, K / 256, 64, 32]; s: two bfloat16 scales in an int32
    [N / 64, K / 256, 64]. CODE, DYNAMIC, SX: see `triton_wide.wide_gemv`.

    A nibble becomes float32 128 + u or 2048 + u by one LOP3; what is too much is corrected by one vector of sums of x
    that all rows share.
    """
    pid = tl.program_id(0)
    F: tl.constexpr = KC * 32  # int32 words of one row in one iteration
    blocks = KC * NIT
    row = gemv_rows(pid, BN, OUT)
    f = tl.arange(0, F)
    f4 = tl.arange(0, F // 4) * 4
    base = (row // 64).to(tl.int64) * (blocks * 64) + row % 64
    wp = w_ptr + (base * 32)[:, None] + ((f // 32) * 2048 + f % 32)[None, :]
    sp = s_ptr + base[:, None] + ((f4 // 32) * 64)[None, :]
    xo = (f // 32) * 128 + f % 32
    w = tl.load(wp, eviction_policy="evict_first")
    s = tl.load(sp)
    start_next(PDL)
    wait_previous(PDL)
    squares, given = load_stats(stats_ptr, tops_ptr, sx_ptr, CODE, DYNAMIC, NORM)
    res, g = gemv_residual(res_ptr, g_ptr, row, N, OUT)
    if CODE != "none":
        inverse, factor = row_scale(squares, given, K, eps, CODE, DYNAMIC, NORM)
    acc = tl.zeros((BN, F // 4), tl.float32)
    for it in tl.range(0, NIT):
        wn = w
        sn = s
        if NIT > 1:  # the next tile is under way while this one is used
            nx = tl.minimum(it + 1, NIT - 1) * KC
            wn = tl.load(wp + nx * 2048, eviction_policy="evict_first")
            sn = tl.load(sp + nx * 64)
        xp = it * (KC * 128) + xo
        v0 = _pairs(x_ptr, xp, K, EVEN)
        v1 = _pairs(x_ptr, xp + 32, K, EVEN)
        v2 = _pairs(x_ptr, xp + 64, K, EVEN)
        v3 = _pairs(x_ptr, xp + 96, K, EVEN)
        e0, e1, e2, e3 = low_bf16(v0), low_bf16(v1), low_bf16(v2), low_bf16(v3)  # even columns of the four planes
        o0, o1, o2, o3 = high_bf16(v0), high_bf16(v1), high_bf16(v2), high_bf16(v3)  # odd columns
        if CODE != "none":
            e0, o0 = round_code(e0 * inverse, CODE, PTX), round_code(o0 * inverse, CODE, PTX)
            e1, o1 = round_code(e1 * inverse, CODE, PTX), round_code(o1 * inverse, CODE, PTX)
            e2, o2 = round_code(e2 * inverse, CODE, PTX), round_code(o2 * inverse, CODE, PTX)
            e3, o3 = round_code(e3 * inverse, CODE, PTX), round_code(o3 * inverse, CODE, PTX)
        c0 = (e0 + o0) * -136.0 + (e1 + o1) * -2056.0
        c1 = (e2 + o2) * -136.0 + (e3 + o3) * -2056.0
        a = c0[None, :] + nibble4(w << 16, PTX) * e0[None, :] + nibble3(w << 8, PTX) * e1[None, :]
        a += nibble4(w, PTX) * o0[None, :] + nibble3(w >> 8, PTX) * o1[None, :]
        b = c1[None, :] + nibble4(w << 8, PTX) * e2[None, :] + nibble3(w, PTX) * e3[None, :]
        b += nibble4(w >> 8, PTX) * o2[None, :] + nibble3(w >> 16, PTX) * o3[None, :]
        acc += _sum4(a, BN, F) * low_bf16(s)  # planes 0, 1: the first group of 128
        acc += _sum4(b, BN, F) * high_bf16(s)  # planes 2, 3: the second
        w = wn
        s = sn
    if SX:
        factor = tl.load(sx_ptr)
    elif CODE == "none":
        _, factor = row_scale(squares, given, K, eps, CODE, DYNAMIC, NORM)
    r = tl.sum(acc, 1) * factor
    gemv_epilogue(
        r, res, g, bias_ptr, t_ptr, b_ptr, out_ptr, out_scale_ptr, res_ptr, stats_out_ptr, zero_ptr, ahead_ptr, ahead,
        row, pid, N, BN, OUT, OUT_CODE, TOPS, AHEAD, BIAS, RANK, NORM, PTX,
    )  # fmt: skip


@triton.jit
def _plane_of_x(xp, at, rc, K, real, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(xp + at, mask=real, other=0.0).T
    return tl.load(xp + at, mask=real & (at + rc < K)[None, :], other=0.0).T


@triton.jit
def _prefetch_tiles(
    w_ptr, pid_n, k0, blocks, N, BN: tl.constexpr, C: tl.constexpr, TILES: tl.constexpr, PTX: tl.constexpr
):
    """The first tiles of every 64 rows on their way to L2 (they depend on no kernel before)."""
    for i in tl.static_range(BN // 64):
        rows = tl.minimum(pid_n * (BN // 64) + i, (N - 1) // 64)  # the last program may have less than its rows
        tile = rows.to(tl.int64) * blocks + k0
        prefetch_block(w_ptr + tile * (64 * C), tl.minimum(TILES, blocks - k0) * (128 * C), PTX)


@triton.jit
def _offset(z_ptr, at, BN: tl.constexpr, C: tl.constexpr, ASYM: tl.constexpr, PTX: tl.constexpr):
    """What turns 128 + u into the signed number of a group, [BN, C]; a whole number, exact in bfloat16."""
    ty: tl.constexpr = tl.bfloat16 if PTX else tl.float32
    if ASYM:
        z = -136.0 - tl.load(z_ptr + at).to(tl.float32)
        return tl.broadcast_to(z.to(ty)[:, None], (BN, C))
    return tl.full((BN, C), -136.0, ty)


@triton.jit(do_not_specialize=["M", "ahead"])
def int4_gemm(
    x_ptr, w_ptr, s_ptr, z_ptr, sx_ptr, bias_ptr, t_ptr, b_ptr, stats_ptr, out_ptr, out_scale_ptr, res_ptr, g_ptr,
    stats_out_ptr, count_ptr, zero_ptr, ahead_ptr, ahead, M, N, K, blocks, eps,
    BN: tl.constexpr, BM: tl.constexpr, C: tl.constexpr, PER: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    ASYM: tl.constexpr, SX: tl.constexpr, EVEN: tl.constexpr, PREFETCH: tl.constexpr,
    BIAS: tl.constexpr, RANK: tl.constexpr, OUT: tl.constexpr, OUT_CODE: tl.constexpr, TOPS: tl.constexpr,
    NORM: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Grid (N / BN, SPLIT, M / BM). x [M, K]; s floats [groups, N64], z int8 likewise; PER groups (2 or 4) to a tile.

    N64: N up to a multiple of 64; blocks: tiles along K, a multiple of SPLIT. SX: x holds codes in units of sx float32
    [] (``one``) or [M] (``rows``).
    """
    pid_n = tl.program_id(0)
    pid_k = tl.program_id(1)
    pid_m = tl.program_id(2)
    per = blocks // SPLIT
    k0 = pid_k * per
    k1 = k0 + per
    stride = (N + 63) // 64 * 64
    rn = pid_n * BN + tl.arange(0, BN)
    rm = pid_m * BM + tl.arange(0, BM)
    rc = tl.arange(0, C)
    rw = tl.minimum(rn, stride - 1)
    wp = w_ptr + ((rw // 64)[:, None].to(tl.int64) * blocks * 64 + (rw % 64)[:, None]) * C + rc[None, :]
    xp = x_ptr + rm[:, None] * K + rc[None, :]
    sp = s_ptr + rw
    s0 = tl.load(sp + k0 * PER * stride)
    s1 = tl.load(sp + (k0 * PER + 1) * stride)
    s2 = s0
    s3 = s1
    if PER == 4:
        s2 = tl.load(sp + (k0 * PER + 2) * stride)
        s3 = tl.load(sp + (k0 * PER + 3) * stride)
    if PDL:
        start_next(PDL)
        if PREFETCH > 0:
            _prefetch_tiles(w_ptr, pid_n, k0, blocks, N, BN, C, PREFETCH, PTX)
        wait_previous(PDL)
    real = rm[:, None] < M
    acc = tl.zeros((BN, BM), tl.float32)
    for kb in tl.range(k0, k1, num_stages=STAGES):
        at = tl.minimum(kb + 1, k1 - 1) * PER * stride  # Triton does not pipeline 2-byte loads: carry the next scales
        n0 = tl.load(sp + at)
        n1 = tl.load(sp + at + stride)
        w = tl.load(wp + kb * (64 * C), eviction_policy="evict_first")
        x = kb * (4 * C)
        x0 = _plane_of_x(xp, x, rc, K, real, EVEN)
        x1 = _plane_of_x(xp, x + C, rc, K, real, EVEN)
        x2 = _plane_of_x(xp, x + 2 * C, rc, K, real, EVEN)
        x3 = _plane_of_x(xp, x + 3 * C, rc, K, real, EVEN)
        zp = kb * PER * stride + rw
        if PER == 2:
            if ASYM:
                p0, p1, _, _ = int4_planes(w, _offset(z_ptr, zp, BN, C, ASYM, PTX), PTX)
                _, _, p2, p3 = int4_planes(w, _offset(z_ptr, zp + stride, BN, C, ASYM, PTX), PTX)
            else:
                p0, p1, p2, p3 = int4_planes(w, _offset(z_ptr, zp, BN, C, ASYM, PTX), PTX)
            g = tl.dot(p0.to(x0.dtype), x0)
            g = tl.dot(p1.to(x0.dtype), x1, g)
            h = tl.dot(p2.to(x0.dtype), x2)
            h = tl.dot(p3.to(x0.dtype), x3, h)
            acc += g * s0.to(tl.float32)[:, None]
            acc += h * s1.to(tl.float32)[:, None]
        else:
            n2 = tl.load(sp + at + 2 * stride)
            n3 = tl.load(sp + at + 3 * stride)
            if ASYM:
                p0, _, _, _ = int4_planes(w, _offset(z_ptr, zp, BN, C, ASYM, PTX), PTX)
                _, p1, _, _ = int4_planes(w, _offset(z_ptr, zp + stride, BN, C, ASYM, PTX), PTX)
                _, _, p2, _ = int4_planes(w, _offset(z_ptr, zp + 2 * stride, BN, C, ASYM, PTX), PTX)
                _, _, _, p3 = int4_planes(w, _offset(z_ptr, zp + 3 * stride, BN, C, ASYM, PTX), PTX)
            else:
                p0, p1, p2, p3 = int4_planes(w, _offset(z_ptr, zp, BN, C, ASYM, PTX), PTX)
            acc += tl.dot(p0.to(x0.dtype), x0) * s0.to(tl.float32)[:, None]
            acc += tl.dot(p1.to(x0.dtype), x1) * s1.to(tl.float32)[:, None]
            acc += tl.dot(p2.to(x0.dtype), x2) * s2.to(tl.float32)[:, None]
            acc += tl.dot(p3.to(x0.dtype), x3) * s3.to(tl.float32)[:, None]
            s2, s3 = n2, n3
        s0, s1 = n0, n1
    acc = scale_rows(acc, stats_ptr, sx_ptr, rm, M, K, eps, NORM, SX)
    gemm_epilogue(
        acc, bias_ptr, t_ptr, b_ptr, out_ptr, out_scale_ptr, res_ptr, g_ptr, stats_out_ptr, count_ptr, zero_ptr,
        ahead_ptr, ahead, rn, rm, pid_n, pid_k, pid_m, M, N, BN, BM, SPLIT, OUT, OUT_CODE, TOPS, AHEAD, BIAS, RANK,
        NORM, PTX,
    )  # fmt: skip


@triton.jit
def _block_scale(b, BN: tl.constexpr, PTX: tl.constexpr):
    """Scale bytes [BN, 4] (`layouts.pack_block_scales`) to scales * 2**126 for the 64 columns of a plane."""
    bits = ((b & 255) << 4) + (222 << 7)
    v = bits.to(tl.int16).to(tl.bfloat16, bitcast=True) if PTX else (bits << 16).to(tl.float32, bitcast=True)
    return tl.reshape(tl.broadcast_to(v[:, :, None], (BN, 4, 16)), (BN, 64))


@triton.jit(do_not_specialize=["M", "ahead"])
def fp4_gemm(
    x_ptr, w_ptr, s_ptr, sw_ptr, sx_ptr, bias_ptr, t_ptr, b_ptr, stats_ptr, out_ptr, out_scale_ptr, res_ptr, g_ptr,
    stats_out_ptr, count_ptr, zero_ptr, ahead_ptr, ahead, M, N, K, blocks, eps,
    BN: tl.constexpr, BM: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, SX: tl.constexpr, EVEN: tl.constexpr,
    PREFETCH: tl.constexpr,
    BIAS: tl.constexpr, RANK: tl.constexpr, OUT: tl.constexpr, OUT_CODE: tl.constexpr, TOPS: tl.constexpr,
    NORM: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """E2M1 weights in blocks of 16. Grid (N / BN, SPLIT, M / BM). s int32 [N / 64, blocks, 64, 4], a byte a plane.

    sw float32 [N]: what is left of the scale of a row; SX: see `int4_gemm`. The block scale goes into the weight,
    exactly: both together have 6 significant bits. Four accumulators of their own: chained, ptxas would serialize every
    wgmma.
    """
    pid_n = tl.program_id(0)
    pid_k = tl.program_id(1)
    pid_m = tl.program_id(2)
    per = blocks // SPLIT
    k0 = pid_k * per
    rn = pid_n * BN + tl.arange(0, BN)
    rm = pid_m * BM + tl.arange(0, BM)
    rc = tl.arange(0, 64)
    rw = tl.minimum(rn, (N + 63) // 64 * 64 - 1)
    row = (rw // 64)[:, None].to(tl.int64) * blocks * 64 + (rw % 64)[:, None]
    wp = w_ptr + row * 64 + rc[None, :]
    sp = s_ptr + row * 4 + tl.arange(0, 4)[None, :]
    xp = x_ptr + rm[:, None] * K + rc[None, :]
    if PDL:
        start_next(PDL)
        if PREFETCH > 0:
            _prefetch_tiles(w_ptr, pid_n, k0, blocks, N, BN, 64, PREFETCH, PTX)
        wait_previous(PDL)
    real = rm[:, None] < M
    acc = tl.zeros((BN, BM), tl.float32)
    for kb in tl.range(k0, k0 + per, num_stages=STAGES):
        w = tl.load(wp + kb * 4096, eviction_policy="evict_first")
        s = tl.load(sp + kb * 256, eviction_policy="evict_first")
        p0, p1, p2, p3 = e2m1_planes(
            w,
            _block_scale(s, BN, PTX),
            _block_scale(s >> 8, BN, PTX),
            _block_scale(s >> 16, BN, PTX),
            _block_scale(s >> 24, BN, PTX),
            PTX,
        )
        x = kb * 256
        x0 = _plane_of_x(xp, x, rc, K, real, EVEN)
        g0 = tl.dot(p0.to(x0.dtype), x0)
        g1 = tl.dot(p1.to(x0.dtype), _plane_of_x(xp, x + 64, rc, K, real, EVEN))
        g2 = tl.dot(p2.to(x0.dtype), _plane_of_x(xp, x + 128, rc, K, real, EVEN))
        g3 = tl.dot(p3.to(x0.dtype), _plane_of_x(xp, x + 192, rc, K, real, EVEN))
        acc += (g0 + g1) + (g2 + g3)
    acc = acc * tl.load(sw_ptr + tl.minimum(rn, N - 1))[:, None]
    acc = scale_rows(acc, stats_ptr, sx_ptr, rm, M, K, eps, NORM, SX)
    gemm_epilogue(
        acc, bias_ptr, t_ptr, b_ptr, out_ptr, out_scale_ptr, res_ptr, g_ptr, stats_out_ptr, count_ptr, zero_ptr,
        ahead_ptr, ahead, rn, rm, pid_n, pid_k, pid_m, M, N, BN, BM, SPLIT, OUT, OUT_CODE, TOPS, AHEAD, BIAS, RANK,
        NORM, PTX,
    )  # fmt: skip


@triton.jit
def int4_decode(
    w_ptr, s_ptr, z_ptr, row_ptr, out_ptr, N, K, blocks,
    C: tl.constexpr, PER: tl.constexpr, ASYM: tl.constexpr, ROWS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Tiles to a row-major scratch [N, K]. Grid (N / 64, blocks). ROWS: divided by row [N] (for an E4M3 scratch)."""
    pid_n = tl.program_id(0)
    kb = tl.program_id(1)
    stride = (N + 63) // 64 * 64
    rn = pid_n * 64 + tl.arange(0, 64)
    rc = tl.arange(0, C)
    tile = pid_n.to(tl.int64) * blocks + kb
    w = tl.load(w_ptr + (tile * 64 + tl.arange(0, 64)[:, None]) * C + rc[None, :])
    shared = 1.0
    if ROWS:
        shared = 1.0 / tl.load(row_ptr + rn, mask=rn < N, other=1.0)
    planes = int4_planes(w, _offset(z_ptr, rn, 64, C, False, PTX), PTX)
    for j in tl.static_range(4):
        group = kb * PER + j * PER // 4
        v = planes[j].to(tl.float32)
        if ASYM:
            v -= tl.load(z_ptr + group * stride + rn).to(tl.float32)[:, None]
        v = v * (tl.load(s_ptr + group * stride + rn).to(tl.float32) * shared)[:, None]
        k = kb * (4 * C) + j * C + rc
        to = out_ptr + rn[:, None].to(tl.int64) * K + k[None, :]
        tl.store(to, v.to(out_ptr.dtype.element_ty), mask=(rn < N)[:, None] & (k < K)[None, :])


@triton.jit
def fp4_decode(w_ptr, s_ptr, sw_ptr, out_ptr, N, K, blocks, PTX: tl.constexpr):
    """Tiles to a row-major scratch [N, K]. Grid (N / 64, blocks)."""
    pid_n = tl.program_id(0)
    kb = tl.program_id(1)
    rr = tl.arange(0, 64)
    rn = pid_n * 64 + rr
    rc = tl.arange(0, 64)
    tile = pid_n.to(tl.int64) * blocks + kb
    w = tl.load(w_ptr + (tile * 64 + rr[:, None]) * 64 + rc[None, :])
    s = tl.load(s_ptr + (tile * 64 + rr[:, None]) * 4 + tl.arange(0, 4)[None, :])
    planes = e2m1_planes(
        w,
        _block_scale(s, 64, PTX),
        _block_scale(s >> 8, 64, PTX),
        _block_scale(s >> 16, 64, PTX),
        _block_scale(s >> 24, 64, PTX),
        PTX,
    )
    sw = tl.load(sw_ptr + rn, mask=rn < N, other=0.0)[:, None]
    for j in tl.static_range(4):
        k = kb * 256 + j * 64 + rc
        to = out_ptr + rn[:, None].to(tl.int64) * K + k[None, :]
        tl.store(
            to, (planes[j].to(tl.float32) * sw).to(out_ptr.dtype.element_ty), mask=(rn < N)[:, None] & (k < K)[None, :]
        )

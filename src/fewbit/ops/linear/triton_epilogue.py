"""What the skinny kernels do with a finished tile of ``x @ weight.T``: four endings, chosen by ``OUT``.

- ``store``: out [M, N] in its own dtype.
- ``atomic``: added to out [M, N], float32 and zero before (several programs share one tile of out).
- ``silu``: out [M, N / 2] = silu(gate) * up; gate and up rows of the weight lie interleaved in blocks of 8.
- ``residual``: added to res [M, N], float32. Who finishes a tile of res also writes ``out = res * g`` (g: the weight of
  the next RMSNorm) and adds the squares of res to the row's *stats*. The next linear multiplies its result by
  ``rsqrt(sum / K + eps)``: so no kernel is left for the norm itself.

Stats are float32 [M, 3, 16]: sums of squares; largest magnitudes of ``out``; largest magnitudes of what lies between
two residuals (attention's output, or what ``silu`` made). Each is cut in 16 so that fewer programs meet at one address.
The magnitudes (TOPS) are for a linear that rounds its input under a scale of the whole row.

RANK: a low-rank branch is added: t float32 [M, RANK], what `triton_branch.shrink` made of the input, times b [N, RANK].

AHEAD: a program that has read its weights asks for its share of `ahead` times 8 KiB at `ahead_ptr`: weights of a later
kernel, so that memory has work while this kernel ends and that one starts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fewbit.ops.triton_common import prefetch_ahead, round_code, top_of


@triton.jit
def scale_rows(acc, stats_ptr, sx_ptr, rm, M, K, eps, NORM: tl.constexpr, SX: tl.constexpr):
    """The product [BN, BM] times the scale of each token's codes (SX: ``none``, ``one``, ``rows``) and inverse RMS.

    Read at the end: held in registers from the beginning, they cost int4_gemm 6 % of a step of 32 tokens.
    """
    if SX == "one":
        acc = acc * tl.load(sx_ptr)
    elif SX == "rows":
        acc = acc * tl.load(sx_ptr + rm, mask=rm < M, other=0.0)[None, :]
    if NORM:
        at = stats_ptr + rm[:, None] * 48 + tl.arange(0, 16)[None, :]
        squares = tl.sum(tl.load(at, mask=(rm < M)[:, None], other=1.0), 1)
        acc = acc * tl.rsqrt(squares / K + eps)[None, :]
    return acc


@triton.jit
def load_stats(stats_ptr, tops_ptr, sx_ptr, CODE: tl.constexpr, DYNAMIC: tl.constexpr, NORM: tl.constexpr):
    """What `row_scale` needs of one token. The loads are made early; who needs nothing else waits for them late."""
    i = tl.arange(0, 16)
    squares = tl.load(stats_ptr + i) if NORM else 1.0
    given = 1.0
    if CODE != "none":
        given = tl.load(tops_ptr + i) if DYNAMIC else tl.load(sx_ptr)
    return squares, given


@triton.jit
def row_scale(squares, given, K, eps, CODE: tl.constexpr, DYNAMIC: tl.constexpr, NORM: tl.constexpr):
    """Of one token: what its numbers are multiplied by to become codes, and what the product is multiplied by."""
    rms = 1.0
    if NORM:
        rms = tl.rsqrt(tl.sum(squares, 0) / K + eps)
    inverse = 1.0
    factor = rms
    if CODE != "none":
        if DYNAMIC:  # the scale follows the row, so the norm's factor cancels in the codes
            amax = tl.max(given, 0)
            amax = tl.where(amax > 0, amax, 1.0)
            inverse = top_of(CODE) / amax
            factor = rms / inverse
        else:
            factor = given
            inverse = rms / factor
    return inverse, factor


@triton.jit
def _silu(gate, up):
    return gate / (1 + tl.exp(-gate)) * up


@triton.jit
def gemm_epilogue(
    acc, bias_ptr, t_ptr, b_ptr, out_ptr, out_scale_ptr, res_ptr, g_ptr, stats_ptr, count_ptr, zero_ptr, ahead_ptr,
    ahead, rn, rm, pid_n, pid_k, pid_m, M, N,
    BN: tl.constexpr, BM: tl.constexpr, SPLIT: tl.constexpr, OUT: tl.constexpr, CODE: tl.constexpr, TOPS: tl.constexpr,
    AHEAD: tl.constexpr, BIAS: tl.constexpr, RANK: tl.constexpr, ZERO: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Finish acc float32 [BN, BM]: features `rn`, tokens `rm`. ZERO: the stats at `zero_ptr` are cleared too."""
    if AHEAD and pid_m == 0:
        programs = tl.num_programs(0) * tl.num_programs(1)
        prefetch_ahead(ahead_ptr, ahead, pid_k * tl.num_programs(0) + pid_n, programs, PTX)
    real = rm < M
    mask = real[None, :] & (rn < N)[:, None]
    if BIAS and pid_k == 0:
        acc += tl.load(bias_ptr + rn, mask=rn < N, other=0.0).to(tl.float32)[:, None]
    if RANK > 0 and pid_k == 0:
        i = tl.arange(0, RANK)[None, :]
        t = tl.load(t_ptr + rm[:, None] * RANK + i, mask=real[:, None], other=0.0)
        b = tl.load(b_ptr + rn[:, None].to(tl.int64) * RANK + i, mask=(rn < N)[:, None], other=0.0)
        acc += tl.dot(b, t.to(b.dtype).T)
    if ZERO and ((pid_n == 0) & (pid_k == 0)):
        i = tl.arange(0, 64)[None, :]
        tl.store(zero_ptr + rm[:, None] * 48 + i, tl.zeros((BM, 64), tl.float32), mask=real[:, None] & (i < 48))
    if OUT == "silu":
        gate, up = tl.split(tl.permute(tl.reshape(acc, (BN // 16, 2, 8, BM)), (0, 2, 3, 1)))
        y = tl.reshape(_silu(gate, up), (BN // 2, BM))
        if CODE != "none":
            y = round_code(y / tl.load(out_scale_ptr), CODE, PTX)
        ro = pid_n * (BN // 2) + tl.arange(0, BN // 2)
        where = real[None, :] & (ro < N // 2)[:, None]
        y = y.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + rm[None, :] * (N // 2) + ro[:, None], y, mask=where)
        if TOPS:
            top = tl.max(tl.where(where, tl.abs(y.to(tl.float32)), 0.0), 0)
            tl.atomic_max(stats_ptr + rm * 48 + 32 + pid_n % 16, top, mask=real, sem="relaxed")
    else:
        offs = rm[None, :] * N + rn[:, None]
        if OUT == "store":
            tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=mask)
        elif OUT == "atomic":
            tl.atomic_add(out_ptr + offs, acc, mask=mask, sem="relaxed")
        else:
            tl.atomic_add(res_ptr + offs, acc, mask=mask, sem="relaxed")
            tl.debug_barrier()  # every thread's adds before the counter
            count = count_ptr + pid_m * tl.num_programs(0) + pid_n
            done = tl.atomic_add(count, 1, sem="acq_rel")
            if done == SPLIT - 1:
                g = tl.load(g_ptr + rn, mask=rn < N, other=0.0).to(tl.float32)
                r = tl.load(res_ptr + offs, mask=mask, other=0.0, cache_modifier=".cg")
                y = (r * g[:, None]).to(out_ptr.dtype.element_ty)
                tl.store(out_ptr + offs, y, mask=mask)
                stat = stats_ptr + rm * 48 + pid_n % 16
                tl.atomic_add(stat, tl.sum(r * r, 0), mask=real, sem="relaxed")
                if TOPS:
                    tl.atomic_max(stat + 16, tl.max(tl.abs(y.to(tl.float32)), 0), mask=real, sem="relaxed")
                tl.store(count, 0)


@triton.jit
def gemv_rows(pid, BN: tl.constexpr, OUT: tl.constexpr):
    """Weight rows [BN] of a program: neighbours, or for ``silu`` BN / 2 gate rows and then their up rows."""
    i = tl.arange(0, BN)
    if OUT == "silu":
        unit = pid * (BN // 2) + i % (BN // 2)
        return unit // 8 * 16 + i // (BN // 2) * 8 + unit % 8
    return pid * BN + i


@triton.jit
def gemv_residual(res_ptr, g_ptr, row, N, OUT: tl.constexpr):
    """What a GEMV adds its result to, and the weight of the next norm: loaded before the weights are."""
    res = 0.0
    g = 0.0
    if OUT == "residual":
        res = tl.load(res_ptr + row, mask=row < N, other=0.0)
        g = tl.load(g_ptr + row, mask=row < N, other=0.0)
    return res, g


@triton.jit
def gemv_epilogue(
    r, res, g, bias_ptr, t_ptr, b_ptr, out_ptr, out_scale_ptr, res_ptr, stats_ptr, zero_ptr, ahead_ptr, ahead, row, pid,
    N,
    BN: tl.constexpr, OUT: tl.constexpr, CODE: tl.constexpr, TOPS: tl.constexpr, AHEAD: tl.constexpr,
    BIAS: tl.constexpr, RANK: tl.constexpr, ZERO: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Finish r float32 [BN], one token. ``atomic`` does not occur: a program has whole rows."""
    if AHEAD:
        prefetch_ahead(ahead_ptr, ahead, pid, tl.num_programs(0), PTX)
    real = row < N
    if BIAS:
        r += tl.load(bias_ptr + row, mask=real, other=0.0).to(tl.float32)
    if RANK > 0:
        i = tl.arange(0, RANK)[None, :]
        b = tl.load(b_ptr + row[:, None].to(tl.int64) * RANK + i, mask=real[:, None], other=0.0)
        r += tl.sum(b.to(tl.float32) * tl.load(t_ptr + i), 1)
    if ZERO and pid == 0:
        tl.store(zero_ptr + tl.arange(0, 64), tl.zeros((64,), tl.float32), mask=tl.arange(0, 64) < 48)
    if OUT == "silu":
        gate, up = tl.split(tl.permute(tl.reshape(r, (2, BN // 2)), (1, 0)))
        ro = pid * (BN // 2) + tl.arange(0, BN // 2)
        y = _silu(gate, up)
        if CODE != "none":
            y = round_code(y / tl.load(out_scale_ptr), CODE, PTX)
        y = tl.where(ro < N // 2, y, 0.0).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + ro, y, mask=ro < N // 2)
        if TOPS:
            tl.atomic_max(stats_ptr + 32 + pid % 16, tl.max(tl.abs(y.to(tl.float32)), 0), sem="relaxed")
    elif OUT == "residual":
        r += res
        tl.store(res_ptr + row, r, mask=real)
        y = (r * g.to(tl.float32)).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row, y, mask=real)
        tl.atomic_add(stats_ptr + pid % 16, tl.sum(tl.where(real, r * r, 0.0), 0), sem="relaxed")
        if TOPS:
            tl.atomic_max(stats_ptr + 16 + pid % 16, tl.max(tl.abs(y.to(tl.float32)), 0), sem="relaxed")
    else:
        tl.store(out_ptr + row, r.to(out_ptr.dtype.element_ty), mask=real)

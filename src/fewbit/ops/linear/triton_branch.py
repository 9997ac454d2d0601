"""The first half of a low-rank branch in the decode step; the product beside it adds the second (`triton_epilogue`)."""

from __future__ import annotations

import triton
import triton.language as tl

from fewbit.ops.triton_common import start_next, wait_previous


@triton.jit(do_not_specialize=["M"])
def shrink(
    x_ptr, a_ptr, t_ptr, clear_ptr, stats_ptr, M, K, eps,
    BM: tl.constexpr, BK: tl.constexpr, RANK: tl.constexpr, CLEAR: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (K / BK, M / BM). t [M, RANK] += x [M, K] @ a.T; t is float32 and zero before, a [RANK, K].

    NORM: x is multiplied by the inverse RMS from the stats (`triton_epilogue`). The rows of the next branch's t, which
    lie at `clear_ptr` [M, CLEAR], become zero.
    """
    pid_k = tl.program_id(0)
    rm = tl.program_id(1) * BM + tl.arange(0, BM)
    rk = pid_k * BK + tl.arange(0, BK)
    rr = tl.arange(0, RANK)
    a = tl.load(a_ptr + rr[:, None] * K + rk[None, :], mask=(rk < K)[None, :], other=0.0)
    start_next(PDL)
    wait_previous(PDL)
    real = (rm < M)[:, None]
    x = tl.load(x_ptr + rm[:, None] * K + rk[None, :], mask=real & (rk < K)[None, :], other=0.0)
    acc = tl.dot(x, a.T)
    if NORM:
        at = stats_ptr + rm[:, None] * 48 + tl.arange(0, 16)[None, :]
        acc = acc * tl.rsqrt(tl.sum(tl.load(at, mask=real, other=1.0), 1) / K + eps)[:, None]
    tl.atomic_add(t_ptr + rm[:, None] * RANK + rr[None, :], acc, mask=real, sem="relaxed")
    if pid_k == 0:
        i = tl.arange(0, CLEAR)[None, :]
        tl.store(clear_ptr + rm[:, None] * CLEAR + i, tl.zeros((BM, CLEAR), tl.float32), mask=real & (i < CLEAR))

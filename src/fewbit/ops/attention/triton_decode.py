"""Decode attention over paged K and V: one new token a sequence, the whole cache read once at the speed of memory.

Tokens are the rows of both products and the query heads of one K/V head their columns: ``scores = K @ q`` and
``out = V.T @ p``. So the cache fills the matrix units, not the few heads, and what is computed for padding is small. A
long sequence is cut in SPLITS pieces that the last program to finish joins. What matters for speed: a page is a tile,
so that its address is a scalar; the *next* page's id is carried through the loop; an 8-bit V lies transposed in its
page [D, PAGE], otherwise it would be gathered byte by byte; 8-bit codes become float16 two to an instruction, and
their scales multiply scores and output.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fewbit.ops.triton_common import prefetch_ahead, prefetch_block, round_code, start_next, wait_previous


@triton.jit
def _norm_rope(x_ptr, g_ptr, c, s, rd, eps, D: tl.constexpr, NORM: tl.constexpr):
    """Head(s) at x_ptr (a block of pointers [..., 1]), normalized and rotated: float32 [..., D].

    c, s: cosines and sines [..., D], the sines of the first half negative.
    """
    other = (rd + D // 2) % D
    x = tl.load(x_ptr + rd).to(tl.float32)
    y = tl.load(x_ptr + other).to(tl.float32)
    if NORM:
        rms = tl.rsqrt(tl.sum(x * x, axis=len(x.shape) - 1, keep_dims=True) / D + eps)
        x = x * rms * tl.load(g_ptr + rd).to(tl.float32)
        y = y * rms * tl.load(g_ptr + other).to(tl.float32)
    return x * c + y * s


@triton.jit
def _new_token(
    row, kn_ptr, k_ptr, v_ptr, page, pos, h, c, s, ks, vs, eps, there,
    H: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, KV: tl.constexpr, QK_NORM: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """K and V of the new token, made ready and stored in its page; as the cache holds them, float32 [D]."""
    rd = tl.arange(0, D)
    k = _norm_rope(row + (H + h) * D, kn_ptr, c, s, rd, eps, D, QK_NORM)
    v = tl.load(row + (H + HK + h) * D + rd).to(tl.float32)
    if KV != "none":
        k = round_code(k / ks, KV, PTX)
        v = round_code(v / vs, KV, PTX)
    slot = (page.to(tl.int64) * HK + h) * (PAGE * D)
    at = pos % PAGE
    k_code = k.to(k_ptr.dtype.element_ty)
    v_code = v.to(v_ptr.dtype.element_ty)
    tl.store(k_ptr + slot + at * D + rd, k_code, mask=(rd < D) & there)
    tl.store(v_ptr + slot + (at * D + rd if KV == "none" else rd * PAGE + at), v_code, mask=(rd < D) & there)
    if PTX:
        k = k_code.to(tl.float32)
        v = v_code.to(tl.float32)
    return k, v


@triton.jit
def _finish(
    y, out_ptr, out_scale_ptr, tops_ptr, first, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, CODE: tl.constexpr,
    TOPS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Store y [GP, D]: the heads from `first` on, of which G are real, of the row at out_ptr."""
    head = first + tl.arange(0, GP)
    real = tl.arange(0, GP) < G
    if CODE != "none":
        y = round_code(y / tl.load(out_scale_ptr), CODE, PTX)
    y = y.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + head[:, None] * D + tl.arange(0, D)[None, :], y, mask=real[:, None])
    if TOPS:
        tl.atomic_max(tops_ptr + head % 16, tl.max(tl.abs(y.to(tl.float32)), 1), mask=real, sem="relaxed")


@triton.jit
def _join(part_ptr, stat_ptr, SPLITS: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr):
    """The mean of the pieces [SPLITS, G, D], each weighted by its sum of exponentials; the logarithms [G, SPLITS]."""
    rg = tl.arange(0, GP)
    rd = tl.arange(0, D)
    ALL: tl.constexpr = triton.next_power_of_2(SPLITS)
    SOME: tl.constexpr = min(ALL, max(16384 // (GP * D), 1))  # so many at once as registers hold
    top = tl.full((GP,), -1e30, tl.float32)
    total = tl.zeros((GP,), tl.float32)
    y = tl.zeros((GP, D), tl.float32)
    for first in tl.static_range(0, SPLITS, SOME):
        i = first + tl.arange(0, SOME)
        there = (rg < G)[:, None] & (i < SPLITS)[None, :]
        stat = tl.load(stat_ptr + rg[:, None] * SPLITS + i[None, :], mask=there, other=-1e30, cache_modifier=".cg")
        piece = part_ptr + (i * (G * D))[None, :, None] + (rg * D)[:, None, None] + rd[None, None, :]
        part = tl.load(piece, mask=there[:, :, None], other=0.0, cache_modifier=".cg")  # [GP, SOME, D]
        higher = tl.maximum(top, tl.max(stat, 1))
        weight = tl.exp2(stat - higher[:, None])
        before = tl.exp2(top - higher)
        total = total * before + tl.sum(weight, 1)
        y = y * before[:, None] + tl.sum(weight[:, :, None] * part, 1)
        top = higher
    return y / total[:, None]


@triton.jit(do_not_specialize=["ahead"])
def decode_attention(
    qkv_ptr, qn_ptr, kn_ptr, cos_ptr, sin_ptr, k_ptr, v_ptr, ks_ptr, vs_ptr, table_ptr, len_ptr, out_ptr, out_scale_ptr,
    part_ptr, stat_ptr, count_ptr, clear_ptr, tops_ptr, ahead_ptr, ahead, scale, eps, max_pages, window, qkv_stride,
    H: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
    KV: tl.constexpr, WRITE: tl.constexpr, QK_NORM: tl.constexpr, WINDOW: tl.constexpr, CODE: tl.constexpr,
    TOPS: tl.constexpr, AHEAD: tl.constexpr, CLEAR: tl.constexpr, PDL: tl.constexpr, PREFETCH: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """Grid (HK, SPLITS, B).

    Args:
        qkv_ptr: [B, (H + 2 HK) * D] with row stride `qkv_stride`: q, k, v of the new token. WRITE: raw; they are
            normalized (QK_NORM), rotated, and K and V are written to the cache. Else q is ready and K, V are stored.
        cos_ptr, sin_ptr: float32 [positions, D / 2].
        k_ptr: pages [P, HK, PAGE, D]; v_ptr: the same, or for codes [P, HK, D, PAGE].
        KV: ``none``, or the codes of the cache: ``e4m3``, ``int8``; ks, vs float32 [HK]: their scales.
        table_ptr: int32 [B, max_pages]; len_ptr: int32 [B], tokens with the new one; 0: no sequence, nothing is done.
        out_ptr: [B, H * D]; CODE: its codes under out_scale.
        part_ptr: float32 [B, HK, SPLITS, G, D]; stat_ptr: [B, HK, G, SPLITS]; count_ptr: int32 [B * HK], zero.
        tops_ptr: TOPS: float32 [B, 16], row stride 48, raised to the largest magnitudes of out.
        ahead_ptr: uint8; AHEAD: `ahead` times 8 KiB of it are brought to L2 by the way.
        clear_ptr: CLEAR: [B, (H + 2 HK) * D] float32, set to zero by the way: the next layer's product is added there.
        scale: softmax scale * log2(e).
    """
    h = tl.program_id(0)
    sp = tl.program_id(1)
    b = tl.program_id(2)
    G: tl.constexpr = H // HK
    GP: tl.constexpr = 8 if G <= 8 else 16 if G <= 16 else 32  # the group padded to the tile of the matrix units
    TURNED: tl.constexpr = KV != "none"
    rg = tl.arange(0, GP)
    rd = tl.arange(0, D)
    rt = tl.arange(0, PAGE)
    # What no kernel of this step writes is read before the wait; the new token is in none of what is read of the cache.
    n = tl.load(len_ptr + b)
    pos = tl.maximum(n - 1, 0)
    first = 0
    if WINDOW:
        first = tl.maximum(n - window, 0)
    begin = first // PAGE
    pages = (n + PAGE - 1) // PAGE
    per = tl.maximum((pages - begin + SPLITS - 1) // SPLITS, 1)
    p0 = begin + sp * per
    p1 = tl.minimum(pages, p0 + per)
    table = table_ptr + b * max_pages
    page = tl.load(table + tl.minimum(p0, max_pages - 1))
    newest = tl.load(table + tl.maximum(pages - 1, 0))
    if PREFETCH > 0:
        tile: tl.constexpr = PAGE * D * k_ptr.dtype.element_ty.primitive_bitwidth // 8
        for t in range(p0, tl.minimum(p1, p0 + PREFETCH)):
            o = (tl.load(table + t).to(tl.int64) * HK + h) * (PAGE * D)
            prefetch_block(k_ptr + o, tile, PTX)
            prefetch_block(v_ptr + o, tile, PTX)
    mine = h + HK * (sp + SPLITS * b)
    if AHEAD and SPLITS > 1:  # memory has little to do otherwise; else at the end
        prefetch_ahead(ahead_ptr, ahead, mine, HK * SPLITS * tl.num_programs(2), PTX)
    if WRITE:
        half: tl.constexpr = D // 2
        c = tl.load(cos_ptr + pos * half + rd % half)
        s = tl.load(sin_ptr + pos * half + rd % half)
        s = tl.where(rd < half, -s, s)
    ks = 1.0
    vs = 1.0
    if KV != "none":
        ks = tl.load(ks_ptr + h)
        vs = tl.load(vs_ptr + h)
    start_next(PDL)
    wait_previous(PDL)
    row = qkv_ptr + b.to(tl.int64) * qkv_stride
    heads = row + (h * G + tl.minimum(rg, G - 1))[:, None] * D
    if WRITE:
        q = _norm_rope(heads, qn_ptr, c[None, :], s[None, :], rd[None, :], eps, D, QK_NORM)
    else:
        q = tl.load(heads + rd[None, :]).to(tl.float32)
    if PTX:
        q = q.to(tl.float16 if KV != "none" else k_ptr.dtype.element_ty)
    scale *= ks
    m = tl.full((GP,), -1e30, tl.float32)
    l = tl.zeros((PAGE, GP), tl.float32)  # summed up over the rows at the end alone
    acc = tl.zeros((D, GP), tl.float32)
    stored = n - 1 if WRITE else n
    ko = rt[:, None] * D + rd[None, :]
    vo = rd[:, None] * PAGE + rt[None, :] if TURNED else ko
    for t in tl.range(p0, p1, num_stages=STAGES):
        base = (page.to(tl.int64) * HK + h) * (PAGE * D)
        k = tl.load(k_ptr + base + ko)
        v = tl.load(v_ptr + base + vo)
        page = tl.load(table + tl.minimum(t + 1, max_pages - 1))
        scores = tl.dot(k.to(q.dtype), q.T) * scale  # [PAGE, GP]
        token = t * PAGE + rt
        ok = token < stored
        if WINDOW:
            ok = ok & (token >= first)
        scores = tl.where(ok[:, None], scores, -1e30)
        mn = tl.maximum(m, tl.max(scores, 0))
        p = tl.exp2(scores - mn[None, :])
        a = tl.exp2(m - mn)
        l = l * a[None, :] + p
        v = v.to(q.dtype)
        acc = tl.dot(v if TURNED else v.T, p.to(q.dtype), acc * a[None, :])
        m = mn
    if WRITE and sp == SPLITS - 1:  # who has the fewest pages brings the new token
        kn, vn = _new_token(
            row, kn_ptr, k_ptr, v_ptr, newest, pos, h, c, s, ks, vs, eps, n > 0, H, HK, D, PAGE, KV, QK_NORM, PTX
        )
        score = tl.where(n > 0, tl.sum(q.to(tl.float32) * kn[None, :], 1) * scale, -1e30)
        mn = tl.maximum(m, score)
        a = tl.exp2(m - mn)
        p = tl.where(n > 0, tl.exp2(score - mn), 0.0)
        l = l * a[None, :] + tl.where((rt == 0)[:, None], p[None, :], 0.0)
        acc = acc * a[None, :] + vn[:, None] * p[None, :]
        m = mn
    if CLEAR and sp == 0:
        i = tl.arange(0, 2 * GP)[:, None] * D + rd[None, :]
        to = clear_ptr + b.to(tl.int64) * ((H + 2 * HK) * D) + h * ((G + 2) * D) + i
        tl.store(to, tl.zeros((2 * GP, D), tl.float32), mask=i < (G + 2) * D)
    if AHEAD and SPLITS == 1:
        prefetch_ahead(ahead_ptr, ahead, mine, HK * tl.num_programs(2), PTX)
    out = out_ptr + b.to(tl.int64) * (H * D)
    tops = tops_ptr + b * 48
    total = tl.sum(l, 0)
    total = tl.where(total > 0, total, 1.0)
    acc = acc * (vs / total)[None, :]
    if SPLITS == 1:
        _finish(acc.T, out, out_scale_ptr, tops, h * G, G, GP, D, CODE, TOPS, PTX)
    else:
        mine = b * HK + h
        piece = part_ptr + (mine * SPLITS + sp) * (G * D)
        tl.store(piece + rg[:, None] * D + rd[None, :], acc.T, mask=(rg < G)[:, None])
        # a piece counts as much as its sum of exponentials
        tl.store(stat_ptr + (mine * G + rg) * SPLITS + sp, m + tl.log2(total), mask=rg < G)
        tl.debug_barrier()
        done = tl.atomic_add(count_ptr + mine, 1, sem="acq_rel")
        if done == SPLITS - 1:
            GM: tl.constexpr = 1 if G == 1 else 2 if G == 2 else 4 if G <= 4 else GP
            y = _join(part_ptr + mine * (SPLITS * G * D), stat_ptr + mine * (G * SPLITS), SPLITS, G, GM, D)
            _finish(y, out, out_scale_ptr, tops, h * G, G, GM, D, CODE, TOPS, PTX)
            tl.store(count_ptr + mine, 0)

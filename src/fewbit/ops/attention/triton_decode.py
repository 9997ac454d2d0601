"""Decode attention over paged K and V: one new token a sequence, the whole cache read once at the speed of memory.

The query heads of one K/V head are packed into one operand of the matrix units; a long sequence is cut in SPLITS pieces
that the last program to finish joins. What matters for speed: a page is a tile, so that its address is a scalar; the
*next* page's id is carried through the loop; an 8-bit V lies transposed in its page [D, PAGE], otherwise it would be
gathered byte by byte; 8-bit codes become float16 two to an instruction, and their scales multiply scores and output.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fewbit.ops.triton_common import prefetch_ahead, prefetch_block, round_code, start_next, wait_previous


@triton.jit
def _norm_rope(
    x_ptr, g_ptr, cos_ptr, sin_ptr, pos, rd, eps,
    D: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """Head(s) at x_ptr (a block of pointers [..., 1]), normalized and rotated: float32 [..., D]."""
    x = tl.load(x_ptr + rd).to(tl.float32)
    if ROPE:
        half: tl.constexpr = D // 2
        other = (rd + half) % D
        y = tl.load(x_ptr + other).to(tl.float32)
        if NORM:
            rms = tl.rsqrt(tl.sum(x * x, axis=len(x.shape) - 1, keep_dims=True) / D + eps)
            x = x * rms * tl.load(g_ptr + rd).to(tl.float32)
            y = y * rms * tl.load(g_ptr + other).to(tl.float32)
        c = tl.load(cos_ptr + pos * half + rd % half)
        s = tl.load(sin_ptr + pos * half + rd % half)
        x = x * c + tl.where(rd < half, -y, y) * s
    return x


@triton.jit
def _finish(
    y, out_ptr, out_scale_ptr, top_ptr, real, CODE: tl.constexpr, TOPS: tl.constexpr, PTX: tl.constexpr
):  # fmt: skip
    """Store y [GP, D], whose rows `real` are heads."""
    if CODE != "none":
        y = round_code(y / tl.load(out_scale_ptr), CODE, PTX)
    y = y.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr, y, mask=real[:, None])
    if TOPS:
        tl.atomic_max(
            top_ptr, tl.max(tl.max(tl.where(real[:, None], tl.abs(y.to(tl.float32)), 0.0), 1), 0), sem="relaxed"
        )


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
        part_ptr: float32 [B, HK, SPLITS, G, D]; stat_ptr: [B, HK, SPLITS, 2, G]; count_ptr: int32 [B * HK], zero.
        tops_ptr: TOPS: float32 [B, 16], row stride 48, raised to the largest magnitudes of out.
        ahead_ptr: uint8; AHEAD: `ahead` times 8 KiB of it are brought to L2 by the way.
        clear_ptr: CLEAR: [B, (H + 2 HK) * D] float32, set to zero by the way: the next layer's product is added there.
        scale: softmax scale * log2(e).
    """
    h = tl.program_id(0)
    sp = tl.program_id(1)
    b = tl.program_id(2)
    G: tl.constexpr = H // HK
    GP: tl.constexpr = 16  # the group padded to the tile of the matrix units
    n = tl.load(len_ptr + b)
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
    if PREFETCH > 0:  # the first pages come while q is made ready; the new token is in none of what is read of them
        tile: tl.constexpr = PAGE * D * k_ptr.dtype.element_ty.primitive_bitwidth // 8
        for t in range(p0, tl.minimum(p1, p0 + PREFETCH)):
            o = (tl.load(table + t).to(tl.int64) * HK + h) * (PAGE * D)
            prefetch_block(k_ptr + o, tile, PTX)
            prefetch_block(v_ptr + o, tile, PTX)
    start_next(PDL)
    wait_previous(PDL)
    rg = tl.arange(0, GP)
    rd = tl.arange(0, D)
    rt = tl.arange(0, PAGE)
    real = rg < G
    pos = tl.maximum(n - 1, 0)
    ks = 1.0
    vs = 1.0
    if KV != "none":
        ks = tl.load(ks_ptr + h)
        vs = tl.load(vs_ptr + h)
    row = qkv_ptr + b.to(tl.int64) * qkv_stride
    if CLEAR and sp == 0:
        c = tl.arange(0, 2 * GP)[:, None] * D + rd[None, :]
        to = clear_ptr + b.to(tl.int64) * ((H + 2 * HK) * D) + h * ((G + 2) * D) + c
        tl.store(to, tl.zeros((2 * GP, D), tl.float32), mask=c < (G + 2) * D)
    heads = h * G + tl.minimum(rg, G - 1)
    q = _norm_rope(row + heads[:, None] * D, qn_ptr, cos_ptr, sin_ptr, pos, rd[None, :], eps, D, QK_NORM, WRITE)
    if PTX:
        q = q.to(tl.float16 if KV != "none" else k_ptr.dtype.element_ty)
    scale *= ks
    m = tl.full((GP,), -1e30, tl.float32)
    l = tl.zeros((GP,), tl.float32)
    acc = tl.zeros((GP, D), tl.float32)
    stored = n
    if WRITE:  # the program of the last page brings the new token; its scores need not wait for the cache
        stored = n - 1
        last = (p1 == pages) & (p0 < p1)
        kn = _norm_rope(row + (H + h) * D, kn_ptr, cos_ptr, sin_ptr, pos, rd, eps, D, QK_NORM, True)
        vn = tl.load(row + (H + HK + h) * D + rd).to(tl.float32)
        slot = (tl.load(table + tl.maximum(pages - 1, 0)).to(tl.int64) * HK + h) * (PAGE * D)
        at = pos % PAGE
        if KV != "none":
            kn = round_code(kn / ks, KV, PTX)
            vn = round_code(vn / vs, KV, PTX)
        here = (rd < D) & last
        v_at = at * D + rd if KV == "none" else rd * PAGE + at
        tl.store(k_ptr + slot + at * D + rd, kn.to(k_ptr.dtype.element_ty), mask=here)
        tl.store(v_ptr + slot + v_at, vn.to(v_ptr.dtype.element_ty), mask=here)
        if PTX:  # what the cache stores is what is seen
            kn = kn.to(k_ptr.dtype.element_ty).to(tl.float32)
            vn = vn.to(v_ptr.dtype.element_ty).to(tl.float32)
        sn = tl.sum(q.to(tl.float32) * kn[None, :], 1) * scale
        m = tl.where(last, sn, m)
        l = tl.where(last, l + 1.0, l)
        acc = tl.where(last, acc + vn[None, :], acc)
    ko = rt[:, None] * D + rd[None, :]
    vo = ko if KV == "none" else rd[:, None] * PAGE + rt[None, :]
    mine = h + HK * (sp + SPLITS * b)
    if AHEAD and SPLITS > 1:  # memory has little to do otherwise; else at the end
        prefetch_ahead(ahead_ptr, ahead, mine, HK * SPLITS * tl.num_programs(2), PTX)
    for t in tl.range(p0, p1, num_stages=STAGES):
        base = (page.to(tl.int64) * HK + h) * (PAGE * D)
        k = tl.load(k_ptr + base + ko)
        v = tl.load(v_ptr + base + vo)
        page = tl.load(table + tl.minimum(t + 1, max_pages - 1))
        k = k.to(q.dtype)
        v = v.to(q.dtype)
        token = t * PAGE + rt
        s = tl.dot(q, k.T) * scale
        ok = token < stored
        if WINDOW:
            ok = ok & (token >= first)
        s = tl.where(ok[None, :], s, -1e30)
        mn = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - mn[:, None])
        a = tl.exp2(m - mn)
        l = l * a + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v if KV == "none" else v.T, acc * a[:, None])
        m = mn
    if AHEAD and SPLITS == 1:
        prefetch_ahead(ahead_ptr, ahead, mine, HK * tl.num_programs(2), PTX)
    op = out_ptr + (b * H + h * G + rg)[:, None] * D + rd[None, :]
    if SPLITS == 1:
        y = acc * vs / tl.where(l > 0, l, 1.0)[:, None]
        _finish(y, op, out_scale_ptr, tops_ptr + b * 48 + h % 16, real, CODE, TOPS, PTX)
    else:
        mine = (b * HK + h) * SPLITS
        tl.store(part_ptr + ((mine + sp) * G + rg)[:, None] * D + rd[None, :], acc, mask=real[:, None])
        tl.store(stat_ptr + (mine + sp) * 2 * G + rg, m, mask=real)
        tl.store(stat_ptr + (mine + sp) * 2 * G + G + rg, l, mask=real)
        tl.debug_barrier()
        done = tl.atomic_add(count_ptr + b * HK + h, 1, sem="acq_rel")
        if done == SPLITS - 1:
            top = tl.full((GP,), -1e30, tl.float32)
            for i in tl.static_range(SPLITS):
                stat = stat_ptr + (mine + i) * 2 * G + rg
                top = tl.maximum(top, tl.load(stat, mask=real, other=0.0, cache_modifier=".cg"))
            den = tl.zeros((GP,), tl.float32)
            num = tl.zeros((GP, D), tl.float32)
            for i in tl.static_range(SPLITS):
                stat = stat_ptr + (mine + i) * 2 * G + rg
                w = tl.exp2(tl.load(stat, mask=real, other=0.0, cache_modifier=".cg") - top)
                den += w * tl.load(stat + G, mask=real, other=0.0, cache_modifier=".cg")
                piece = part_ptr + ((mine + i) * G + rg)[:, None] * D + rd[None, :]
                num += w[:, None] * tl.load(piece, mask=real[:, None], other=0.0, cache_modifier=".cg")
            y = num * vs / tl.where(den > 0, den, 1.0)[:, None]
            _finish(y, op, out_scale_ptr, tops_ptr + b * 48 + h % 16, real, CODE, TOPS, PTX)
            tl.store(count_ptr + b * HK + h, 0)

"""From the product of many tokens to attention: rotate q and k in place, and write K and V into their pages."""

from __future__ import annotations

import triton
import triton.language as tl

from fewbit.ops.triton_common import e4m3_bits, round_code


@triton.jit
def rotate(
    qkv_ptr, qn_ptr, kn_ptr, cos_ptr, sin_ptr, eps, stride,
    H: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, QK_NORM: tl.constexpr,
):  # fmt: skip
    """Grid (T,). q and k of qkv [T, (H + 2 HK) * D] are normalized (QK_NORM) and rotated in place.

    cos, sin float32 [T, D / 2]; HEADS: H + HK up to a power of two.
    """
    t = tl.program_id(0).to(tl.int64)
    half: tl.constexpr = D // 2
    rh = tl.arange(0, HEADS)
    rd = tl.arange(0, half)
    mask = (rh < H + HK)[:, None] & (rd < half)[None, :]
    at = qkv_ptr + t * stride + rh[:, None] * D + rd[None, :]
    a = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(at + half, mask=mask, other=0.0).to(tl.float32)
    if QK_NORM:
        rms = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / D + eps)[:, None]
        isq = (rh < H)[:, None]
        ga = tl.where(isq, tl.load(qn_ptr + rd)[None, :].to(tl.float32), tl.load(kn_ptr + rd)[None, :].to(tl.float32))
        gb = tl.where(
            isq,
            tl.load(qn_ptr + half + rd)[None, :].to(tl.float32),
            tl.load(kn_ptr + half + rd)[None, :].to(tl.float32),
        )
        a = a * rms * ga
        b = b * rms * gb
    c = tl.load(cos_ptr + t * half + rd)[None, :]
    s = tl.load(sin_ptr + t * half + rd)[None, :]
    tl.store(at, (a * c - b * s).to(qkv_ptr.dtype.element_ty), mask=mask)
    tl.store(at + half, (b * c + a * s).to(qkv_ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_pages(
    k_in, v_in, k_ptr, v_ptr, ks_ptr, vs_ptr, part_ptr, k_stride, v_stride,
    HK: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, KV: tl.constexpr,
):  # fmt: skip
    """Grid (parts, HK). Each part is a run of tokens within one page: int32 (page, first row, first slot, count).

    k_in, v_in: rows [T, HK, D] with the given row strides. Codes (KV) are written back decoded, so that attention sees
    of these tokens what the cache stores of them.
    """
    part = part_ptr + tl.program_id(0) * 4
    h = tl.program_id(1)
    page = tl.load(part).to(tl.int64)
    row = tl.load(part + 1).to(tl.int64)
    at = tl.load(part + 2)
    count = tl.load(part + 3)
    rt = tl.arange(0, PAGE)
    rd = tl.arange(0, D)
    mask = (rt < count)[:, None] & (rd < D)[None, :]
    kp = k_in + (row + rt)[:, None] * k_stride + h * D + rd[None, :]
    vp = v_in + (row + rt)[:, None] * v_stride + h * D + rd[None, :]
    k = tl.load(kp, mask=mask, other=0.0)
    v = tl.load(vp, mask=mask, other=0.0)
    base = (page * HK + h) * (PAGE * D)
    slot = (at + rt)[:, None]
    if KV == "none":
        tl.store(k_ptr + base + slot * D + rd[None, :], k.to(k_ptr.dtype.element_ty), mask=mask)
        tl.store(v_ptr + base + slot * D + rd[None, :], v.to(v_ptr.dtype.element_ty), mask=mask)
    else:
        ks = tl.load(ks_ptr + h)
        vs = tl.load(vs_ptr + h)
        # plain rounding: Triton 3.6's conversion to float8 gives wrong bytes in the layout that the transposed V takes
        kc = round_code(k.to(tl.float32) / ks, KV, False)
        vc = round_code(v.to(tl.float32) / vs, KV, False)
        if KV == "e4m3":
            kb, vb = e4m3_bits(kc), e4m3_bits(vc)
        else:
            kb, vb = kc.to(tl.int8), vc.to(tl.int8)
        tl.store(k_ptr + base + slot * D + rd[None, :], kb, mask=mask)
        tl.store(v_ptr + base + rd[None, :] * PAGE + slot, vb, mask=mask)
        tl.store(kp, (kc * ks).to(k_in.dtype.element_ty), mask=mask)
        tl.store(vp, (vc * vs).to(v_in.dtype.element_ty), mask=mask)

"""Paged decode attention and the writing of pages against plain torch in float64."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from fewbit.model.attend import KVCodec
from fewbit.model.fused import cosines
from fewbit.model.rope import rotate as rotate_plain
from fewbit.numerics.format import FORMATS
from fewbit.numerics.quantspec import KVSpec
from fewbit.ops.attention.decode import decode_attention, splits_of
from fewbit.ops.attention.store import store_pages
from fewbit.ops.linear.gpu import Rounding
from fewbit.ops.rows.rows import rotate
from fewbit.spec.decoder import Attention, Norm, Rope
from interpreter import DEVICE, GPU

ACT = torch.bfloat16 if GPU else torch.float32
KV = ["none", "int8"] + (["fp8"] if GPU else [])
HEADS = [(4, 2, 64), (8, 1, 32), (3, 3, 128)]
MATRIX = [(kv, *heads, window, norm) for kv in KV for heads in HEADS for window in (None, 40) for norm in (False, True)]
QUICK = set(random.Random(0).sample(MATRIX, 5))
CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def codec_of(kv, heads):
    if kv == "none":
        return KVCodec(ACT)
    scales = (torch.rand(heads, device=DEVICE) * 0.01 + 0.03 for _ in range(2))
    return KVCodec(ACT, KVSpec(FORMATS[kv], FORMATS[kv]), *scales)


def pages_of(codec, kv, count, heads, size, depth):
    dtype = ACT if kv == "none" else CODES[kv]
    turned = (count, heads, depth, size) if codec.spec else (count, heads, size, depth)
    made = (torch.zeros(shape, dtype=torch.uint8 if codec.spec else dtype, device=DEVICE).view(dtype)
            for shape in ((count, heads, size, depth), turned))  # fmt: skip
    return list(made)


def exact(q, k, v, a):
    """[heads, D] and [s, kv, D] to [heads, D], float64."""
    group = a.heads // a.kv_heads
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("hd,shd->hs", q.double(), k) * a.scale
    if a.window:
        scores[:, : max(0, scores.shape[1] - a.window)] = float("-inf")
    return torch.einsum("hs,shd->hd", scores.softmax(-1), v)


@pytest.mark.parametrize(
    ("kv", "heads", "kv_heads", "depth", "window", "norm"),
    [pytest.param(*c, marks=[] if c in QUICK else [pytest.mark.slow]) for c in MATRIX],
)
def test_new_token_is_written_and_sees_the_past(kv, heads, kv_heads, depth, window, norm):
    torch.manual_seed(heads)
    size, lengths = 16, [1, 16, 17, 75, 0]
    a = Attention(heads, kv_heads, depth, Rope(10000.0), window, Norm(1e-6) if norm else None)
    codec = codec_of(kv, kv_heads)
    m, width = len(lengths), 6
    k_pages, v_pages = pages_of(codec, kv, m * width, kv_heads, size, depth)
    table = torch.randperm(m * width, device=DEVICE).view(m, width).int()
    norms = {n: torch.rand(depth, device=DEVICE) + 0.5 for n in ("q_norm", "k_norm")} if norm else {}
    cos, sin = cosines(a.position, depth, torch.arange(128, device=DEVICE))
    qkv = torch.randn(m, (heads + 2 * kv_heads) * depth, device=DEVICE)
    out = torch.full((m, heads * depth), float("nan"), device=DEVICE, dtype=ACT)
    clear = torch.ones_like(qkv)
    groups = splits_of(m, kv_heads) * m * heads
    scratch = (
        torch.full((groups * depth,), float("nan"), device=DEVICE),
        torch.full((groups * 2,), float("nan"), device=DEVICE),
        torch.zeros(m * kv_heads, dtype=torch.int32, device=DEVICE),
    )
    expected = []
    for i, length in enumerate(lengths):
        past_k, past_v = (torch.randn(max(length - 1, 0), kv_heads, depth, device=DEVICE, dtype=ACT) for _ in range(2))
        parts = [
            (int(table[i, start // size]), start, 0, min(size, length - 1 - start))
            for start in range(0, length - 1, size)
        ]
        if parts:
            store_pages(past_k, past_v, k_pages, v_pages, codec, torch.tensor(parts, device=DEVICE).int(), size)
        q, k, v = qkv[i].view(-1, depth).split((heads, kv_heads, kv_heads))
        if norm:
            q, k = (
                x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * norms[n]
                for x, n in ((q, "q_norm"), (k, "k_norm"))
            )
        c, s = (torch.cat((x[max(length - 1, 0)],) * 2) for x in (cos, sin))
        q, k = rotate_plain(q, c, s), rotate_plain(k, c, s)
        k, v = codec.load(*codec.store(k[None], v[None]), torch.float32)
        keys, values = torch.cat((past_k.float(), k)), torch.cat((past_v.float(), v))
        expected.append(
            exact(q, keys, values, a).flatten() if length else torch.zeros(heads * depth, device=DEVICE).double()
        )
    decode_attention(
        qkv, out, k_pages, v_pages, codec, table, torch.tensor(lengths, device=DEVICE).int(), a, size, scratch,
        write=(cos, sin, norms), clear=clear,
    )  # fmt: skip
    expected = torch.stack(expected)
    assert out.isfinite().all()
    limit = 1e-2 if GPU or kv == "int8" else 1e-5
    assert (out.double() - expected).norm() / expected.norm() < limit
    assert not clear.any()
    assert not scratch[2].any()
    # without writing: q is ready, K and V are there; the answer is the same
    again = torch.full_like(out, float("nan"))
    ready = qkv.clone()
    for i, length in enumerate(lengths):
        one = slice(max(length - 1, 0), max(length - 1, 0) + 1)
        rotate(
            ready[i : i + 1], cos[one], sin[one], heads, kv_heads, depth, norms.get("q_norm"), norms.get("k_norm"), 1e-6
        )
    known = torch.tensor(lengths, device=DEVICE).int()
    decode_attention(ready.to(ACT), again, k_pages, v_pages, codec, table, known, a, size, scratch)
    assert (again.double() - expected).norm() / expected.norm() < limit


def test_output_as_codes():
    a = Attention(4, 2, 32, Rope(10000.0))
    codec = codec_of("none", 2)
    pages = pages_of(codec, "none", 2, 2, 16, 32)
    qkv = torch.randn(1, 8 * 32, device=DEVICE)
    cos, sin = cosines(a.position, 32, torch.arange(8, device=DEVICE))
    r = Rounding("e4m3" if GPU else "int8", torch.tensor(0.04, device=DEVICE))
    out = torch.zeros(1, 128, device=DEVICE, dtype=r.dtype)
    groups = splits_of(1, 2) * 4
    table, count = (torch.zeros(shape, dtype=torch.int32, device=DEVICE) for shape in ((1, 1), 2))
    length = torch.ones(1, dtype=torch.int32, device=DEVICE)
    scratch = torch.zeros(groups * 32, device=DEVICE), torch.zeros(groups * 2, device=DEVICE), count
    decode_attention(
        qkv, out, *pages, codec, table, length, a, 16, scratch, write=(cos, sin, {}), rounding=r
    )  # fmt: skip
    expected = qkv[:, 6 * 32 :].view(2, 32).repeat_interleave(2, 0).flatten()  # one token: its own values
    assert (out.float() * 0.04 - expected).abs().max() <= (0.15 if GPU else 0.0201)


@pytest.mark.parametrize("kv", KV)
def test_pages_hold_what_the_codec_says_and_the_rows_become_it(kv):
    heads, depth, size = 2, 32, 16
    codec = codec_of(kv, heads)
    k_pages, v_pages = pages_of(codec, kv, 4, heads, size, depth)
    rows = torch.randn(40, heads * 3, depth, device=DEVICE, dtype=ACT)
    k, v = rows[:, :heads], rows[:, heads : 2 * heads]
    plain = [x.clone() for x in (k, v)]
    parts = torch.tensor([(2, 0, 5, 11), (0, 11, 0, 16), (3, 27, 0, 13)], device=DEVICE).int()
    store_pages(k, v, k_pages, v_pages, codec, parts, size)
    stored = codec.store(*plain)
    for x, pages, codes in zip((k, v), (k_pages, v_pages), stored, strict=True):
        turned = codec.spec is not None and pages is v_pages
        by_token = (pages.permute(0, 3, 1, 2) if turned else pages.transpose(1, 2)).reshape(-1, heads, depth)
        slots = torch.tensor([*range(37, 48), *range(16), *range(48, 61)], device=DEVICE)
        found = by_token.contiguous().view(codes.dtype)[slots]
        if kv == "none":
            assert torch.equal(found, codes)
        else:
            back = codec.load(*stored, torch.float32)[0 if pages is k_pages else 1]
            assert (codes.view(torch.int8).int() - found.view(torch.int8).int()).abs().max() <= 1
            assert (x.float() - back).abs().max() < 0.05 if kv == "int8" else True

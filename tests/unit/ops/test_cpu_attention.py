"""Attention over pages on the CPU: against float64, and the same bits on every instruction set and in every cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fewbit.model.attend import KVCodec
from fewbit.numerics.format import ALL, FORMATS
from fewbit.numerics.quantspec import KVSpec
from fewbit.ops.attention.cpu import PagedLayer, Spans, why_not
from fewbit.ops.cpu import build as cpu_build
from fewbit.spec.decoder import Alibi, Attention

BUILT = cpu_build.library()
needs_compiler = pytest.mark.skipif(isinstance(BUILT, str), reason=f"CPU ATTENTION IS NOT TESTED: {BUILT}")
VARIANTS = [] if isinstance(BUILT, str) else BUILT.usable
FP8, INT8 = FORMATS["fp8"], FORMATS["int8"]
A_HEAD = replace(INT8, block=(1, ALL))


def scales(kv_heads: int) -> torch.Tensor:
    return torch.linspace(0.01, 0.03, kv_heads)


CODECS = {
    "float32": lambda heads: KVCodec(torch.float32),
    "float16": lambda heads: KVCodec(torch.float16),
    "bfloat16": lambda heads: KVCodec(torch.bfloat16),
    "int8": lambda heads: KVCodec(torch.bfloat16, KVSpec(INT8, INT8), torch.tensor(0.02), torch.tensor(0.03)),
    "int8 a head": lambda heads: KVCodec(torch.bfloat16, KVSpec(A_HEAD, A_HEAD), scales(heads), scales(heads) * 2),
    "fp8": lambda heads: KVCodec(torch.bfloat16, KVSpec(FP8, FP8), torch.tensor(0.01), torch.tensor(0.004)),
    "k int8, v fp8": lambda heads: KVCodec(torch.bfloat16, KVSpec(INT8, FP8), torch.tensor(0.02), torch.tensor(0.1)),
}
GQA = Attention(8, 2, 64, None)
SHAPES = {
    "grouped": GQA,
    "a head each": Attention(3, 3, 40, None),
    "one for all": Attention(35, 1, 24, None, multiplier=0.3),
    "odd": Attention(6, 2, 13, None),
    "wide": Attention(4, 2, 256, None),
    "window 1": replace(GQA, window=1),
    "window 50": replace(GQA, window=50),
    "window 64": replace(GQA, window=64),
    "window 200": replace(GQA, window=200),
    "capped": replace(GQA, softcap=3.0),
    "sinks": replace(GQA, sinks=True, window=100),
}


class Cache:
    """A cache of pages in any order, whose slots are no numbers until they are written."""

    def __init__(
        self, a: Attention, codec: KVCodec, sequences: list[int], page: int, variant: str | None = None
    ) -> None:
        self.page, self.codec = page, codec
        pages = [-(-length // page) for length in sequences]
        order = torch.randperm(sum(pages), generator=torch.Generator().manual_seed(3)).tolist()
        self.tables = [[order.pop() for _ in range(count)] for count in pages]
        empty = 0x7F if codec.spec else float("nan")  # E4M3: no number
        self.k, self.v = (
            torch.full((sum(pages) * page, a.kv_heads, a.head_dim), empty, dtype=codec.stored_dtype) for _ in range(2)
        )
        self.layer = PagedLayer(a, codec, self.k, self.v, page, variant)

    def slots(self, which: int, first: int, end: int) -> torch.Tensor:
        table, page = self.tables[which], self.page
        return torch.tensor([table[t // page] * page + t % page for t in range(first, end)], dtype=torch.int64)

    def step(self, parts, q, k, v, sinks=None):
        """Rows `first` to `end` of sequences, of each (which, first, end); q, k, v: a list of whole sequences."""
        rows, row, at = [], 0, 0
        for which, first, end in parts:
            rows.append((row, end - first, first, at))
            row += end - first
            at += len(self.tables[which])
        tables = torch.tensor([block for which, _, _ in parts for block in self.tables[which]])
        spans = Spans(rows, torch.cat([self.slots(*part) for part in parts]), tables)
        given = (torch.cat([x[which][first:end] for which, first, end in parts]) for x in (q, k, v))
        return self.layer(*given, spans, sinks).split([end - first for _, first, end in parts])


def drawn(a: Attention, lengths: list[int]):
    """q, k, v of sequences, and sinks; values that differ and scores that matter."""
    random = torch.Generator().manual_seed(sum(lengths) * a.heads + a.head_dim)
    q = [2 * torch.randn(n, a.heads, a.head_dim, generator=random) for n in lengths]
    k, v = ([torch.randn(n, a.kv_heads, a.head_dim, generator=random) for n in lengths] for _ in range(2))
    return q, k, v, torch.randn(a.heads, generator=random) if a.sinks else None


def expected(a: Attention, codec: KVCodec, q, k, v, sinks):
    """The definition, in float64."""
    k, v = (x.double().repeat_interleave(a.heads // a.kv_heads, 1) for x in codec.load(*codec.store(k, v), q.dtype))
    scores = torch.einsum("thd,shd->hts", q.double(), k) * a.scale
    if a.softcap:
        scores = a.softcap * torch.tanh(scores / a.softcap)
    back = torch.arange(len(q))[:, None] - torch.arange(len(q))
    scores[:, (back < 0) | (back >= (a.window or len(q)))] = -torch.inf
    if sinks is not None:
        scores = torch.cat((scores, sinks.double()[:, None, None].expand(-1, len(q), 1)), -1)
    return torch.einsum("hts,shd->thd", scores.softmax(-1)[..., : len(q)], v)


CASES = [("bfloat16", shape) for shape in SHAPES] + [(codec, "grouped") for codec in CODECS if codec != "bfloat16"]
CASES += [("fp8", "odd"), ("int8 a head", "sinks"), ("float16", "odd"), ("float32", "window 50")]


@needs_compiler
@pytest.mark.parametrize(("codec", "shape"), CASES)
def test_is_the_definition_and_the_same_bits_on_every_instruction_set_and_in_every_cut(codec, shape):
    a, lengths = SHAPES[shape], [1, 33, 150, 270]
    made = CODECS[codec](a.kv_heads)
    assert why_not(a, made) is None
    q, k, v, sinks = drawn(a, lengths)
    whole = [(which, 0, n) for which, n in enumerate(lengths)]
    found = {name: Cache(a, made, lengths, 16, name).step(whole, q, k, v, sinks) for name in VARIANTS}
    for name, outs in found.items():
        assert all(torch.equal(x, y) for x, y in zip(outs, found["plain"], strict=True)), name
    for which, out in enumerate(found["plain"]):
        wanted = expected(a, made, q[which], k[which], v[which], sinks)
        torch.testing.assert_close(out.double(), wanted, rtol=0, atol=4e-6 * wanted.abs().max().item())
    for chunk, page in ((1, 5), (7, 16), (16, 128)):  # side by side, in pages of another size
        cache = Cache(a, made, lengths, page)
        steps = [
            cache.step(parts, q, k, v, sinks)
            for at in range(0, max(lengths), chunk)
            if (parts := [(which, at, min(at + chunk, n)) for which, n in enumerate(lengths) if at < n])
        ]
        for which in range(len(lengths)):  # the shortest sequences end first
            pieces = [outs[which - len(lengths) + len(outs)] for outs in steps if len(outs) >= len(lengths) - which]
            assert torch.equal(torch.cat(pieces), found["plain"][which]), (chunk, which)


@needs_compiler
@pytest.mark.parametrize("codec", CODECS)
def test_what_is_stored_is_what_the_codec_stores(codec):
    a = replace(GQA, head_dim=256)
    made = CODECS[codec](a.kv_heads)
    random = torch.Generator().manual_seed(1)
    k = torch.randn(40, 2, 256, generator=random) * torch.logspace(-9, 9, 40, 2)[:, None, None]
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16)  # all numbers of 16 bits, and ties between codes
    ties = torch.cat((every.view(torch.float16).float(), every.view(torch.bfloat16).float()))
    steps = torch.arange(-600, 600) / 2 if made.spec else torch.tensor([65519.0, 65520.0, -65520.0, 1e38])
    scale = 1.0 if made.k_scale is None else made.k_scale.flatten()[0]
    ties = torch.cat((ties[ties.isfinite()], (ties[ties.isfinite()].double() * (1 + 2**-12)).float(), steps * scale))
    ties = ties[ties.isfinite()]
    ties = ties[: len(ties) // 512 * 512].view(-1, 2, 256)
    k = torch.cat((k, ties))
    cache = Cache(a, made, [len(k)], 16)
    cache.step([(0, 0, len(k))], [torch.zeros(len(k), 8, 256)], [k], [k])
    slots = cache.slots(0, 0, len(k))
    for stored, wanted in zip((cache.k, cache.v), made.store(k, k), strict=True):
        whole = torch.uint8 if stored.dtype == torch.uint8 else {2: torch.int16, 4: torch.int32}[stored.itemsize]
        assert torch.equal(stored[slots].view(whole), wanted.view(whole))


@needs_compiler
def test_threads_change_nothing():
    lengths = [300, 40]
    q, k, v, _ = drawn(GQA, lengths)
    made, before = CODECS["bfloat16"](2), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            cache = Cache(GQA, made, lengths, 16)
            first = cache.step([(0, 0, 299), (1, 0, 40)], q, k, v)
            found.append(torch.cat((*first, *cache.step([(0, 299, 300)], q, k, v))))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@needs_compiler
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["k", "v"])
def test_what_is_no_number_stays_none_and_reaches_nobody_else(bad, where):
    lengths = [100, 90]
    q, k, v, _ = drawn(GQA, lengths)
    clean = Cache(GQA, CODECS["bfloat16"](2), lengths, 16).step([(0, 0, 100), (1, 0, 90)], q, k, v)
    (k if where == "k" else v)[0][70, 0] = bad
    found = Cache(GQA, CODECS["bfloat16"](2), lengths, 16).step([(0, 0, 100), (1, 0, 90)], q, k, v)
    assert torch.equal(found[1], clean[1])
    assert torch.equal(found[0][:70], clean[0][:70])
    assert torch.equal(found[0][:, 4:], clean[0][:, 4:])  # of the other head of K and V
    assert not found[0][70:, :4].isfinite().all(-1).any()


@pytest.mark.parametrize(
    ("a", "codec", "reason"),
    [
        (replace(GQA, position=Alibi(8.0)), KVCodec(torch.float32), "no biases by distance"),
        (replace(GQA, head_dim=264), KVCodec(torch.float32), "at most 256 channels, not 264"),
        (GQA, KVCodec(torch.float64), "no K and V in torch.float64"),
        (
            GQA,
            KVCodec(torch.float32, KVSpec(FORMATS["int4_tensor"], INT8)),
            "INT8 and FP8 (E4M3), not k int4_tensor, v int8",
        ),
    ],
)
def test_declines(a, codec, reason):
    assert reason in str(why_not(a, codec))

"""The skinny products against float64: every format, every ending. On a CPU through Triton's interpreter."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

from fewbit.numerics.format import FORMATS
from fewbit.numerics.quantspec import QuantSpec
from fewbit.numerics.reference import fake_quantize, quantize
from fewbit.ops.linear.four import Fp4, Int4, _Int4Linear
from fewbit.ops.linear.gpu import Folded, Residual, Rounding
from fewbit.ops.linear.problem import LinearWeights
from fewbit.ops.linear.wide import Wide
from fewbit.ops.rows.rows import rounded
from interpreter import DEVICE, GPU

EPS = 1e-5
# as Model Optimizer, AutoAWQ and GPTQ store them
FORMATS = FORMATS | {
    "int4_g128_f32": replace(FORMATS["int4_g128"], scale=torch.float32),
    "int4_g128_f16": replace(FORMATS["int4_g128"], scale=torch.float16),
    "int4_g64_asym_f16": replace(FORMATS["int4_g64_asym"], scale=torch.float16),
}
KINDS = [
    (Wide(), None, None, "dynamic"),
    (Wide(), "int8_row", None, "dynamic"),
    (Wide(), "int8_row", "int8_row", "dynamic"),
    (Wide(), "fp8", "fp8", "static"),
    (Wide(), "fp8_row", "fp8_row", "dynamic"),
    (Int4(), "int4_g128", None, "dynamic"),
    (Int4(), "int4_g128", "fp8_row", "dynamic"),
    (Int4(), "int4_g128", "fp8", "static"),
    (Int4(), "int4_g64", None, "dynamic"),
    (Int4(), "int4_g32", None, "dynamic"),
    (Int4(), "int4_g128_asym", None, "dynamic"),
    (Int4(), "int4_g64_asym", None, "dynamic"),
    (Int4(), "int4_g32_asym", None, "dynamic"),
    (Int4(), "int4_g128_f32", None, "dynamic"),
    (Int4(), "int4_g128_f32", "fp8", "static"),
    (Int4(), "int4_g128_f16", None, "dynamic"),
    (Int4(), "int4_g64_asym_f16", None, "dynamic"),
    (Fp4(), "nvfp4", None, "dynamic"),
    (Fp4(), "mxfp4", None, "dynamic"),
    (Fp4(), "nvfp4", "nvfp4", "outer"),
    (Fp4(), "mxfp4", "mxfp4", "dynamic"),
]
SHAPES = [(192, 256), (200, 640)] + ([(4096, 14336)] if GPU else [])
ROWS = [1, 3, 20] + ([100] if GPU else [])
ENDINGS = ("store", "add", "residual", "silu")
MATRIX = [c for c in product(KINDS, ROWS, (False, True), SHAPES, ENDINGS) if c[-1] != "silu" or c[-2][0] % 16 == 0]
QUICK = {id(c) for kind in KINDS for c in random.Random(0).sample([c for c in MATRIX if c[0] is kind], 4)}


def name(kind):
    kernel, weight, input_, how = kind
    return f"{kernel.name}-{weight}-{input_}-{how}"


def make(kind, n, k, gated=False, branch=()):
    kernel, weight, input_, how = kind
    quant = QuantSpec(FORMATS[weight] if weight else None, FORMATS[input_] if input_ else None, how)
    pieces = []
    for rows in (n // 2, n // 2) if gated else (n,):
        w = torch.randn(rows, k, device=DEVICE) * 0.05
        if weight:
            w = quantize(w, FORMATS[weight])
        elif GPU:
            w = w.bfloat16()
        scale = None if how == "dynamic" else torch.tensor(0.011 if how == "static" else 2**-9, device=DEVICE)
        rank = branch[len(pieces)] if branch else 0
        factors = torch.randn(rank, k, device=DEVICE) * 0.05, torch.randn(rows, rank, device=DEVICE)
        pieces.append(
            LinearWeights(quant, w, torch.randn(rows, device=DEVICE), scale, lowrank=factors if rank else None)
        )
    linear = kernel.join(pieces, gated)
    if branch:
        act = torch.bfloat16 if GPU else torch.float32
        linear.beside = torch.cat([b.to(act).double() @ a.to(act).double() for a, b in (p.lowrank for p in pieces)])
    dense = torch.cat([(p.weight.dequantize() if weight else p.weight).double() for p in pieces])
    return linear, dense, torch.cat([p.bias for p in pieces]).double()


def error(found, expected):
    assert found.isfinite().all()
    return float((found.double() - expected).norm() / expected.norm())


def tops_of(x):
    """Magnitudes of which one in each row is the largest."""
    return x.float().abs().unflatten(1, (16, -1)).amax(2)[:, None].repeat(1, 3, 1)[:, 1]


def as_rounded(x, r):
    """What the reference makes of x under a rounding, float64."""
    if r.blocks:
        return fake_quantize(x, FORMATS[r.code], outer=r.scale if r.code == "nvfp4" else None).double()
    fmt = FORMATS["fp8_row" if r.code == "e4m3" else "int8_row"]
    return fake_quantize(x, fmt, scale=None if r.scale is None else r.scale.reshape(1, 1)).double()


def given(linear, x, rms):
    """What `few` is handed, and the number that each row of it stands for, float64."""
    m, r = len(x), linear.rounding
    held = torch.bfloat16 if GPU else torch.float32
    if r is None:
        at_once = linear.tile(m, "store")["gemv"] and isinstance(linear, _Int4Linear)
        return (x if at_once else x.to(held)), x.double() * rms.double()
    exact = x.float() * rms
    seen = as_rounded(exact, r)
    if r.blocks:
        return rounded(exact, r, held), seen
    if linear.rounds_itself(m):
        return (x if isinstance(linear, _Int4Linear) else x.to(held)), seen
    dtype = (torch.bfloat16 if GPU else torch.float32) if isinstance(linear, _Int4Linear) else None
    return rounded(exact, r, dtype), seen


def label(cell):
    kind, rows, norm, (n, k), ending = cell
    return f"{name(kind)} {n}x{k} {rows} {ending}{' norm' * norm}"


@pytest.mark.parametrize(
    "cell", [pytest.param(c, id=label(c), marks=[] if id(c) in QUICK else [pytest.mark.slow]) for c in MATRIX]
)
def test_product(cell):
    kind, rows, norm, (n, k), ending = cell
    torch.manual_seed(rows)
    linear, dense, bias = make(kind, n, k, ending == "silu")
    x = torch.randn(rows, k, device=DEVICE).bfloat16()
    before, clear = torch.rand(rows, 3, 16, device=DEVICE) * k / 8, torch.ones(rows, 3, 16, device=DEVICE)
    rms = torch.rsqrt(before[:, 0].sum(1, keepdim=True) / k + EPS) if norm else torch.ones(rows, 1, device=DEVICE)
    handed, seen = given(linear, x, rms)
    after = torch.zeros(rows, 3, 16, device=DEVICE)
    itself = linear.rounding is None or linear.rounds_itself(rows)
    folded = Folded(before, clear, EPS) if norm and itself else None
    expected = seen @ dense.t() + bias
    # a sum that lies on the border between two codes may fall on either side
    limit = 1.5e-2 if linear.rounding else 8e-3 if GPU else 1e-5
    act = torch.bfloat16 if GPU else torch.float32
    options = {"ending": ending, "norm": folded, "tops": tops_of(x)}
    poisoned = torch.full((rows, n // 2 if ending == "silu" else n), float("nan"), device=DEVICE, dtype=act)
    if ending == "silu":
        linear.few(handed, out := poisoned, stats=after, out_tops=True, **options)
        expected = F.silu(expected[:, : n // 2]) * expected[:, n // 2 :]
        assert torch.equal(after[:, 2].amax(1), out.float().abs().amax(1))
    elif ending == "residual":
        res, g = torch.randn(rows, n, device=DEVICE), torch.rand(n, device=DEVICE)
        count = torch.zeros(4096, dtype=torch.int32, device=DEVICE)
        whole = res.double() + expected
        expected = whole * g.double()
        linear.few(handed, out := poisoned, residual=Residual(res, g, count), stats=after, out_tops=True, **options)
        assert error(res, whole) < limit
        assert error(after[:, 0].sum(1), whole.square().sum(1)) < limit
        assert torch.equal(after[:, 1].amax(1), out.float().abs().amax(1))
        assert not count.any()
    else:
        out = torch.zeros(rows, n, device=DEVICE) if ending == "add" else poisoned
        linear.few(handed, out, **options)
    assert error(out, expected) < limit, linear.tile(rows, ending)
    assert not (folded and clear.any())


@pytest.mark.parametrize("kind", [k for k in KINDS if k[2] is not None and k[3] == "static"], ids=name)
@pytest.mark.parametrize("rows", [1, 5])
def test_silu_can_store_codes(kind, rows):
    linear, dense, bias = make(kind, 256, 256, gated=True)
    x = torch.randn(rows, 256, device=DEVICE).bfloat16()
    handed, seen = given(linear, x, torch.ones(rows, 1, device=DEVICE))
    r = Rounding("e4m3", torch.tensor(0.01, device=DEVICE))
    out = torch.empty(rows, 128, device=DEVICE, dtype=torch.float8_e4m3fn if GPU else torch.float32)
    linear.few(handed, out, ending="silu", out_rounding=r)
    y = seen @ dense.t() + bias
    expected = fake_quantize((F.silu(y[:, :128]) * y[:, 128:]).float(), FORMATS["fp8"], scale=r.scale.reshape(1, 1))
    assert error(out.float() * 0.01, expected.double()) < 2e-2


@pytest.mark.parametrize("rows", [1, 5])
def test_codes_that_were_made_before(rows):
    linear, dense, bias = make(KINDS[3], 192, 256)
    x = torch.randn(rows, 256, device=DEVICE)
    codes = rounded(x, linear.rounding, None if GPU else torch.float32)
    out = torch.full((rows, 192), float("nan"), device=DEVICE)
    linear.few(codes, out)
    assert error(out, codes.x.double() * codes.scale.double() @ dense.t() + bias) < 1e-3


BRANCHED = [KINDS[0], KINDS[3], KINDS[5], KINDS[-4], KINDS[-2]]


@pytest.mark.parametrize("kind", BRANCHED, ids=name)
@pytest.mark.parametrize(("rows", "gated"), [(1, True), (1, False), (5, True), (20, False), *[(300, True)] * GPU])
def test_branches_are_added(kind, rows, gated):
    if kind[0].name == "int4" and rows == 1 and not GPU:
        pytest.skip("reads pairs of bfloat16 as one word")
    n, k = 256, 512
    linear, dense, bias = make(kind, n, k, gated, branch=(5, 3) if gated else (24,))
    assert linear.branch.rank == (16 if gated else 32)
    x = torch.randn(rows, k, device=DEVICE).to(torch.bfloat16 if GPU else torch.float32)
    seen = x.double() if linear.rounding is None else as_rounded(x.float(), linear.rounding)
    expected = seen @ dense.t() + bias + x.double() @ linear.beside.t()
    found = linear.product(x)
    if gated:  # rows lie in blocks of 8 of the one, then of the other
        found = found.unflatten(1, (-1, 2, 8)).transpose(1, 2).flatten(1)
    assert error(found, expected) < (2e-2 if linear.rounding or GPU else 1e-5)


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("norm", [False, True])
def test_the_first_half_of_a_branch(rows, norm):
    from fewbit.ops.linear.triton_branch import shrink

    k, rank = 320, 32
    x, a = torch.randn(rows, k, device=DEVICE), torch.randn(rank, k, device=DEVICE)
    stats = torch.rand(rows, 3, 16, device=DEVICE)
    t, other = torch.zeros(rows, rank, device=DEVICE), torch.ones(rows, 64, device=DEVICE)
    grid = (-(-k // 128), -(-rows // 16))
    shrink[grid](x, a, t, other, stats, rows, k, EPS, BM=16, BK=128, RANK=rank, CLEAR=64, NORM=norm, PDL=0)
    rms = torch.rsqrt(stats[:, 0].double().sum(1, keepdim=True) / k + EPS) if norm else 1.0
    assert error(t, (x.double() * rms) @ a.double().t()) < (2e-3 if GPU else 1e-5)  # TF32
    assert not other.any()


@pytest.mark.skipif(not GPU, reason="library products of a GPU")
@pytest.mark.parametrize("kind", KINDS, ids=name)
def test_many_tokens(kind):
    linear, dense, bias = make(kind, 512, 768)
    x = torch.randn(300, 768, device=DEVICE).bfloat16()
    r = linear.rounding
    seen = x.double() if r is None else as_rounded(x.float(), r)
    found = linear.many(x if r is None else rounded(x, r))
    again = 3e-2 if isinstance(linear, _Int4Linear) and r else 8e-3  # the E4M3 scratch rounds INT4 weights once more
    assert error(found, seen @ dense.t() + bias) < again


@pytest.mark.parametrize("kind", [k for k in KINDS if isinstance(k[0], Int4 | Fp4)], ids=name)
def test_decoding_to_a_scratch(kind):
    linear, dense, _ = make(kind, 200, 640)
    found = linear.decode(torch.bfloat16) if isinstance(kind[0], Int4) else linear.decode()
    assert error(found.float(), dense) < 4e-3

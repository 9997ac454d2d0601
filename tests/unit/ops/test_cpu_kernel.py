"""Products in C on the CPU: against float64, over every format, shape and instruction set."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewbit.numerics.format import ALL, FORMATS, integer_format
from fewbit.numerics.quantspec import QuantSpec
from fewbit.numerics.reference import fake_quantize, input_scale, quantize
from fewbit.ops.cpu import build as cpu_build
from fewbit.ops.device import device_info
from fewbit.ops.linear import LinearProblem, LinearWeights, choose
from fewbit.ops.linear.cpu import Cpu, rounding

BUILT = cpu_build.library()
needs_compiler = pytest.mark.skipif(isinstance(BUILT, str), reason=f"CPU KERNELS ARE NOT TESTED: {BUILT}")
VARIANTS = [] if isinstance(BUILT, str) else BUILT.usable
INT8 = FORMATS["int8_row"]
OTHERS = {
    "int4_g128_f32": replace(FORMATS["int4_g128"], scale=torch.float32),
    "int4_g64_asym_f16": replace(FORMATS["int4_g64_asym"], scale=torch.float16),
    "int3_g64_asym": integer_format(3, (1, 64), asym=True),
    "int5_row": integer_format(5, (1, ALL)),
    "int4_g48": integer_format(4, (1, 48)),
}
TAKEN = [f for f in (FORMATS | OTHERS).values() if f.element.integer or f.element.name == "e2m1"]
FP8, FP8_ROW, NVFP4, MXFP4 = (FORMATS[name] for name in ("fp8", "fp8_row", "nvfp4", "mxfp4"))
SPECS = [
    *(QuantSpec(f) for f in (*TAKEN, FP8, FP8_ROW)),
    *(QuantSpec(INT8, INT8), QuantSpec(FORMATS["int8"], FORMATS["int8"], "static")),
    *(QuantSpec(FP8_ROW, FP8_ROW), QuantSpec(FP8, FP8, "static"), QuantSpec(FP8_ROW, FP8, "static")),
    *(QuantSpec(NVFP4, NVFP4, "outer"), QuantSpec(MXFP4, MXFP4), QuantSpec(FORMATS["int4_g32"], MXFP4)),
]


def problem(quant: QuantSpec, n: int = 64, k: int = 256, exact: bool = False) -> LinearProblem:
    return LinearProblem(quant, n, k, torch.float32, device_info(torch.device("cpu")), exact)


def drawn(quant: QuantSpec, rows: int, n: int, k: int) -> tuple[torch.Tensor, LinearWeights]:
    """Random numbers; new ones on every run where FEWBIT_NEW_EXAMPLES is set: the seed is in a failure's message."""
    new = "FEWBIT_NEW_EXAMPLES" in os.environ
    random = torch.Generator().manual_seed(seed := torch.seed() % 2**32 if new else rows * n + k)
    print(f"seed {seed}")
    x, weight, bias = (torch.randn(*shape, generator=random) for shape in ((rows, k), (n, k), (n,)))
    x[:, 0] *= 20  # an outlier
    scale = input_scale(x.abs().amax() / 2, quant.input) if quant.input and quant.calibrated else None  # some saturate
    assert quant.weight
    return x, LinearWeights(quant, quantize(weight, quant.weight), bias, scale)


def expected(x: torch.Tensor, w: LinearWeights) -> torch.Tensor:
    """The documented numerics in float64."""
    assert w.quant.weight
    assert w.bias is not None
    floats = w.quant.weight.element.name == "e4m3"
    rounded = w.round_input(x) if w.quant.input or floats else fake_quantize(x, rounding(w.quant.weight))
    return rounded.double() @ w.weight.dequantize(torch.float64).T + w.bias


@needs_compiler
@pytest.mark.parametrize("quant", SPECS, ids=str)
def test_is_what_it_says_on_every_instruction_set(quant):
    block = quant.weight.block[1]
    for rows, n, k in ((1, 16, 8 * abs(block)), (3, 41, 5 * block if block > 0 else 203), (13, 130, 3 * abs(block))):
        x, weights = drawn(quant, rows, n, k)
        assert Cpu().why_not(problem(quant, n, k)) is None
        found = {name: (kernel := Cpu(name)).run(x, kernel.prepare(weights, torch.float32)) for name in VARIANTS}
        wanted = expected(x, weights)
        for name, y in found.items():
            assert torch.equal(y, found["plain"]), name  # sums in one order everywhere
        torch.testing.assert_close(found["plain"].double(), wanted, rtol=0, atol=2e-6 * wanted.abs().max().item())


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
def test_weights_as_they_are_stored(dtype):
    for rows, n, k in ((1, 16, 64), (3, 41, 203), (13, 130, 96)):
        random = torch.Generator().manual_seed(rows)
        x, bias = torch.randn(rows, k, generator=random), torch.randn(n, generator=random)
        weights = LinearWeights(QuantSpec(), torch.randn(n, k, generator=random).to(dtype), bias)
        found = {name: (kernel := Cpu(name)).run(x, kernel.prepare(weights, torch.float32)) for name in VARIANTS}
        wanted = x.double() @ weights.weight.double().T + bias
        for name, y in found.items():
            assert torch.equal(y, found["plain"]), name
        torch.testing.assert_close(found["plain"].double(), wanted, rtol=0, atol=2e-6 * wanted.abs().max().item())
        kernel = Cpu()
        assert torch.equal(kernel.run(x[:1], kernel.prepare(weights, torch.float32)), found["plain"][:1])
        taken = sum(
            t.numel() * t.element_size() for t in kernel.prepare(weights, torch.float32).tensors if t is not None
        )
        assert Cpu().weight_bytes(replace(problem(QuantSpec(), n, k), stored=dtype)) == taken


@needs_compiler
@pytest.mark.parametrize(("rows", "k"), [(37, 1024), (70, 8192)], ids=["few", "more_than_a_cache_keeps"])
@pytest.mark.parametrize("quant", [QuantSpec(FORMATS["int4_g128"]), *SPECS[-7:]], ids=str)
def test_a_row_is_the_same_alone_and_among_others_and_on_two_threads(quant, rows, k):
    x, weights = drawn(quant, rows, 76, k)
    kernel = Cpu()
    prepared = kernel.prepare(weights, torch.float32)
    together = kernel.run(x, prepared)
    alone = torch.cat([kernel.run(row[None], prepared) for row in x])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        shared = kernel.run(x, prepared)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(together, alone)
    assert torch.equal(together, shared)


@needs_compiler
def test_all_threads_work_or_one_alone(monkeypatch):
    """A number of threads that changes from call to call costs milliseconds, see `Cpu.run`."""
    calls, given = cpu_build.library().calls, []
    real = calls.fewbit_linear_plain
    monkeypatch.setattr(calls, "fewbit_linear_plain", lambda *a: (given.append(a[4]), real(*a))[1])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        for n in (16, 256, 512, 768, 2048):
            x, weights = drawn(QuantSpec(INT8), 1, n, 1024)
            Cpu("plain").run(x, Cpu().prepare(weights, torch.float32))
    finally:
        torch.set_num_threads(before)
    assert given == [1, 4, 4, 4, 4]


@needs_compiler
@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="this system does not say what its processor has")
def test_instruction_sets_are_those_of_the_processor():
    lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    has = {word for name, _, words in lines if name.strip() in ("flags", "Features") for word in words.split()}
    avx512 = {"avx512f", "avx512bw", "avx512vl", "avx512_vnni"}
    needs = {
        "avx512vnni": avx512,
        "avx512vl": avx512,
        "avxvnni": {"avx2", "fma", "avx_vnni"},
        "avx2": {"avx2", "fma"},
        "neon": {"asimddp"},
    }
    runs = cpu_build.library().calls.fewbit_runs
    assert {name for name in needs if runs(name.encode())} == {name for name in needs if needs[name] <= has}


@needs_compiler
def test_prescales_leading_axes_and_no_rows():
    quant = QuantSpec(FORMATS["int4_g64"], prescale=True)
    x, weights = drawn(quant, 6, 48, 128)
    prescale = torch.rand(128) + 0.5
    kernel = Cpu()
    found = kernel.run(x.view(2, 3, 128), kernel.prepare(replace(weights, prescale=prescale), torch.float32))
    plain = kernel.run(x * prescale, kernel.prepare(weights, torch.float32))
    assert torch.equal(found.view(6, 48), plain)
    assert kernel.run(x[:0], kernel.prepare(weights, torch.float32)).shape == (0, 48)


@needs_compiler
@pytest.mark.parametrize(
    "quant", [QuantSpec(FORMATS["int4_g64"]), QuantSpec(FP8_ROW, FP8_ROW), QuantSpec(MXFP4, MXFP4)]
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(bad, quant):
    x, weights = drawn(quant, 2, 16, 128)
    x[1, 100] = bad
    kernel = Cpu()
    found = kernel.run(x, kernel.prepare(weights, torch.float32))
    assert found[0].isfinite().all()
    assert not found[1].isfinite().any()


@needs_compiler
@pytest.mark.parametrize("quant", SPECS[-6:], ids=str)
def test_inputs_are_rounded_as_numerics_rounds_them(quant):
    """Ties, powers of two and what lies beside them, through a weight of ones."""
    eighths = torch.arange(-64, 64) / 8
    around = torch.cat([eighths * s for s in (2.0**-12, 2.0**-6, 0.875, 1.0, 1.0000001, 2.0**6)])
    x = torch.zeros(2, 32 * len(around))
    x[0, ::32], x[1, 5::32] = around, around.flip(0)
    x[0, 7::32] = 6.0  # the top of a block: scales of one or a power of two
    for scale in (1.0, 0.75):
        k = 32
        weights = LinearWeights(
            quant, quantize(torch.eye(16, k), quant.weight), None, torch.tensor(scale) if quant.calibrated else None
        )
        rows = x.view(-1, k)
        found = Cpu().run(rows, Cpu().prepare(weights, torch.float32))
        wanted = weights.round_input(rows)[:, :16] * weights.weight.dequantize().diagonal()
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)  # another code is another by a twentieth at least


@needs_compiler
def test_a_weight_that_is_no_number_makes_its_row_none():
    x, weights = drawn(QuantSpec(FP8_ROW), 3, 20, 64)
    weights.weight.codes[7, 5] = 0x7F
    found = Cpu().run(x, Cpu().prepare(weights, torch.float32))
    assert found[:, 7].isnan().all()
    assert found.isnan().sum() == 3


@needs_compiler
def test_a_plan_counts_the_memory_that_is_taken():
    for quant in SPECS:
        k = 10 * 128 if quant.weight.block[1] != 48 else 10 * 96
        _, weights = drawn(quant, 1, 77, k)
        prepared = Cpu().prepare(weights, torch.float32)
        taken = sum(t.numel() * t.element_size() for t in prepared.tensors if t is not None)
        assert Cpu().weight_bytes(problem(quant, 77, k)) == taken, quant


@needs_compiler
def test_exact_arithmetic_rounds_no_inputs():
    left, rounded = problem(QuantSpec(INT8)), problem(QuantSpec(INT8, INT8))
    assert choose(left).kernel.name == "cpu"
    assert "in groups of 32" in str(choose(left).kernel.remark(left))
    assert choose(left, "exact").kernel.name == "dense"
    assert ("cpu", "multiplies inputs as INT8, and exact arithmetic was asked for") in choose(left, "exact").declined
    assert choose(rounded).kernel.name == "cpu"
    assert choose(rounded).kernel.remark(rounded) is None  # it rounds what the format says


@pytest.mark.parametrize(
    ("quant", "reason"),
    [
        (QuantSpec(None, INT8), "multiplies inputs in int8_row with no unquantized weights"),
        (QuantSpec(FORMATS["fp8_e5m2"]), "holds integers, E2M1 and E4M3, not fp8_e5m2"),
        (QuantSpec(FORMATS["fp8_block"]), "holds E4M3 with one scale a row, not fp8_block"),
        (QuantSpec(INT8, FP8_ROW), "multiplies no inputs in fp8_row with int8_row"),
        (QuantSpec(FP8, FP8), "cannot round inputs to fp8 (dynamic)"),
        (QuantSpec(NVFP4, FORMATS["nvfp4_g32"], "outer"), "cannot round inputs to nvfp4_g32 (outer) for nvfp4"),
        (QuantSpec(FORMATS["int4_g128"], INT8), "needs weights with a scale a row, not int4_g128"),
        (QuantSpec(integer_format(4, (1, 64), act_order=True)), "needs groups in the order of their columns"),
        (QuantSpec(integer_format(4, (1, 20))), "needs groups of whole eights"),
    ],
    ids=str,
)
def test_declines(quant, reason):
    assert reason in str(Cpu().why_not(problem(quant)))

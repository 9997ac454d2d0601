"""Every kernel of the list, held to the reference over every format that it accepts."""

from __future__ import annotations

import pytest
import torch

from fewbit.errors import UnsupportedError
from fewbit.numerics.format import ALL, FORMATS
from fewbit.numerics.quantspec import QuantSpec
from fewbit.numerics.reference import choose_scale, quantize
from fewbit.ops.device import DeviceInfo, device_info
from fewbit.ops.linear import KERNELS, LinearProblem, LinearWeights, choose
from fewbit.ops.linear.reference import Reference

CPU = torch.device("cpu")
ROWS, N, K = 5, 256, 128  # two blocks of rows and one of columns, even of the largest


def specs() -> list[QuantSpec]:
    found = [QuantSpec()]
    for fmt in FORMATS.values():
        found.append(QuantSpec(fmt))
        if fmt.zero is None and fmt.block[0] in (1, ALL):
            scale = "outer" if fmt.outer else "static" if fmt.block == (ALL, ALL) else "dynamic"
            found.append(QuantSpec(fmt, fmt, scale))
    return found


def problem(quant: QuantSpec, dtype: torch.dtype = torch.float32) -> LinearProblem:
    return LinearProblem(quant, N, K, dtype, device_info(CPU))


def drawn(quant: QuantSpec) -> tuple[torch.Tensor, LinearWeights]:
    random = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=random) for shape in ((ROWS, K), (N, K), (N,)))
    scale = None
    if quant.calibrated:
        stored, outer, _ = choose_scale(x, quant.input)
        scale = outer if quant.input_scale == "outer" else stored.reshape(())
    return x, LinearWeights(quant, quantize(weight, quant.weight) if quant.weight else weight, bias, scale)


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k.device is None], ids=lambda k: k.name)
@pytest.mark.parametrize("quant", specs(), ids=str)
def test_computes_what_the_reference_does(kernel, quant):
    assert kernel.why_not(problem(quant)) is None  # both take everything in float32; one that declines is skipped then
    x, weights = drawn(quant)
    reference = Reference()
    expected = reference.run(x, reference.prepare(weights, torch.float32))
    prepared = kernel.prepare(weights, torch.float32)
    found = kernel.run(x, prepared)
    assert found.shape == (ROWS, N)
    assert found.dtype == x.dtype
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_reference_rounds_inputs_and_weights():
    """By hand, so that the reference is held to something too."""
    quant = QuantSpec(FORMATS["int8_row"], FORMATS["int8_row"], "dynamic")
    x, weights = drawn(quant)
    step = x.abs().amax(-1, keepdim=True) / 127.5
    rounded = (x / step).round().clamp(-128, 127) * step
    expected = rounded @ weights.weight.dequantize().T + weights.bias
    torch.testing.assert_close(Reference().run(x, weights), expected, rtol=1e-5, atol=1e-5)
    assert (expected - (x @ weights.weight.dequantize().T + weights.bias)).abs().max() > 1e-3


def test_the_reference_is_last_and_takes_everything():
    assert isinstance(KERNELS[-1], Reference)
    for quant in specs():
        for dtype in (torch.float32, torch.bfloat16):
            choice = choose(problem(quant, dtype))
            assert choice.kernel.why_not(problem(quant, dtype)) is None
            better = [k for k in KERNELS[: KERNELS.index(choice.kernel)] if k.device in (None, "cpu")]
            assert [name for name, _ in choice.declined] == [kernel.name for kernel in better]


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k.device == "cuda"], ids=lambda k: k.name)
def test_a_kernel_of_a_gpu_says_what_it_misses(kernel):
    assert kernel.why_not(problem(QuantSpec())) == "needs an NVIDIA GPU"
    with pytest.raises(UnsupportedError, match=f"backend '{kernel.name}' cannot run .*needs an NVIDIA GPU"):
        choose(problem(QuantSpec()), kernel.name)
    old = DeviceInfo("cuda", "an old GPU", (7, 5), 1, 1)
    assert "needs compute capability 8.0, this GPU has 7.5" in kernel.why_not(on(old, QuantSpec()))


def test_what_a_gpu_lacks_falls_to_the_next_kernel():
    ampere, hopper = (DeviceInfo("cuda", f"sm_{a}{b}", (a, b), 1, 1) for a, b in ((8, 0), (9, 0)))
    fp8 = QuantSpec(FORMATS["fp8"], FORMATS["fp8"], "static")
    assert choose(on(hopper, fp8)).kernel.name == "wide"
    old = choose(on(ampere, fp8))
    assert old.kernel.name == "reference"
    assert old.declined[0] == ("wide", "FP8 needs compute capability 8.9, this GPU has 8.0")
    assert choose(on(ampere, QuantSpec(FORMATS["int4_g128"]))).kernel.name == "int4"
    assert choose(on(ampere, QuantSpec(FORMATS["int8_row"], FORMATS["int8_row"]))).kernel.name == "wide"
    assert choose(on(hopper, QuantSpec(FORMATS["mxfp4"]))).kernel.name == "fp4"


def on(device: DeviceInfo, quant: QuantSpec) -> LinearProblem:
    return LinearProblem(quant, N, K, torch.bfloat16, device)


def test_a_kernel_that_would_round_once_more_says_so():
    quant = QuantSpec(FORMATS["nvfp4"], FORMATS["nvfp4"], "outer")
    choice = choose(problem(quant, torch.bfloat16))
    assert choice.kernel.name == "reference"
    assert choice.declined[-1] == ("dense", "the dequantized weight does not fit bfloat16 exactly")
    with pytest.raises(UnsupportedError, match=r"backend 'dense' cannot run .* does not fit bfloat16"):
        choose(problem(quant, torch.bfloat16), "dense")
    with pytest.raises(UnsupportedError, match="unknown backend 'dens'; did you mean 'dense'"):
        choose(problem(quant), "dens")

"""Every kernel of the list, held to the reference over every format that it accepts."""

from __future__ import annotations

import pytest
import torch

from fewbit.errors import UnsupportedError
from fewbit.numerics.format import ALL, FORMATS
from fewbit.numerics.quantspec import QuantSpec
from fewbit.numerics.reference import choose_scale, quantize
from fewbit.ops.device import device_info
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


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
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
            better = KERNELS[: KERNELS.index(choice.kernel)]
            assert [name for name, _ in choice.declined] == [kernel.name for kernel in better]


def test_a_kernel_that_would_round_once_more_says_so():
    quant = QuantSpec(FORMATS["nvfp4"], FORMATS["nvfp4"], "outer")
    choice = choose(problem(quant, torch.bfloat16))
    assert choice.kernel.name == "reference"
    assert choice.declined == (("dense", "the dequantized weight does not fit bfloat16 exactly"),)
    with pytest.raises(UnsupportedError, match=r"backend 'dense' cannot run .* does not fit bfloat16"):
        choose(problem(quant, torch.bfloat16), "dense")
    with pytest.raises(UnsupportedError, match="unknown backend 'dens'; did you mean 'dense'"):
        choose(problem(quant), "dens")

"""What a linear kernel is asked, given and gives: the types between the list of kernels and the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.quantspec import QuantSpec
from fewbit.numerics.reference import fake_quantize
from fewbit.ops.device import DeviceInfo


@dataclass(frozen=True)
class LinearProblem:
    """Everything a kernel is chosen by: numerics, n outputs, k inputs, dtype of activations, device.

    `exact`: products of floats, of inputs that nothing but `quant` rounds.
    `stored`: what the checkpoint has an unquantized weight in; None: `dtype`.
    """

    quant: QuantSpec
    n: int
    k: int
    dtype: torch.dtype
    device: DeviceInfo
    exact: bool = False
    stored: torch.dtype | None = None


@dataclass(frozen=True)
class LinearWeights:
    """One linear as the checkpoint has it, on the device.

    Attributes:
        quant: its numerics.
        weight: [n, k].
        bias: [n].
        input_scale: float32 []: the calibrated scale of the input, or the outer one of block-scaled inputs.
        prescale: [k]: what the input is multiplied by before it is rounded.
        lowrank: A [r, k] and B [n, r] of the branch beside the product; `fewbit.model.Linear` adds it where the kernel
            does not.
    """

    quant: QuantSpec
    weight: Tensor | QTensor
    bias: Tensor | None = None
    input_scale: Tensor | None = None
    prescale: Tensor | None = None
    lowrank: tuple[Tensor, Tensor] | None = None

    def round_input(self, x: Tensor) -> Tensor:
        """`x` as the QuantSpec lets the product see it, dtype of `x`."""
        return round_input(x, self.quant, self.input_scale, self.prescale)


def round_input(x: Tensor, quant: QuantSpec, input_scale: Tensor | None, prescale: Tensor | None) -> Tensor:
    """The input of a linear after its prescale and its rounding, [..., k], dtype of `x`."""
    if prescale is not None:
        x = x * prescale.to(x.dtype)
    if quant.input is None:
        return x
    if quant.input_scale == "dynamic":
        return fake_quantize(x, quant.input).to(x.dtype)
    assert input_scale is not None
    if quant.input_scale == "outer":
        return fake_quantize(x, quant.input, outer=input_scale).to(x.dtype)
    return fake_quantize(x, quant.input, scale=input_scale.reshape(1, 1)).to(x.dtype)


class LinearKernel(Protocol):
    """One way to compute ``round_input(x) @ weight.T + bias``."""

    name: str
    device: str | None
    """``cuda`` or ``cpu``; None: any."""

    def why_not(self, problem: LinearProblem) -> str | None:
        """None: can do it; else the reason, for a user to read."""
        ...

    def remark(self, problem: LinearProblem) -> str | None:
        """What a user should know of how it computes: where it rounds more than the format does."""
        ...

    def weight_bytes(self, problem: LinearProblem) -> int:
        """Memory of the prepared weight."""
        ...

    def prepare(self, weights: LinearWeights, dtype: torch.dtype) -> Any:
        """The weights in this kernel's own layout, made once."""
        ...

    def run(self, x: Tensor, prepared: Any) -> Tensor:
        """[..., k] to [..., n], dtype of `x`."""
        ...

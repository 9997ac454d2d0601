"""The definition: dequantize on every call, multiply in float32. Always right, on any device, and slow."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbit.numerics.qtensor import QTensor
from fewbit.ops.linear.problem import LinearProblem, LinearWeights


class Reference:
    """Holds the weights as the checkpoint has them."""

    name = "reference"
    device: str | None = None

    def why_not(self, problem: LinearProblem) -> str | None:
        """It can do everything."""
        return None

    def remark(self, problem: LinearProblem) -> str | None:
        """See `LinearKernel.remark`."""
        return None

    def weight_bytes(self, problem: LinearProblem) -> int:
        """A byte a code, or the stored dtype (at most two bytes, as far as this can know)."""
        return problem.n * problem.k * (1 if problem.quant.weight else 2)

    def prepare(self, weights: LinearWeights, dtype: torch.dtype) -> LinearWeights:
        """As they are."""
        return weights

    def run(self, x: Tensor, prepared: LinearWeights) -> Tensor:
        """See `LinearKernel.run`."""
        weight = prepared.weight.dequantize() if isinstance(prepared.weight, QTensor) else prepared.weight.float()
        bias = None if prepared.bias is None else prepared.bias.float()
        return F.linear(prepared.round_input(x).float(), weight, bias).to(x.dtype)

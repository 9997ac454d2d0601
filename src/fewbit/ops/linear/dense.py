"""Dequantized once, multiplied by the device's own dense GEMM: the numbers of the format at the speed of its dtype."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbit.numerics.qtensor import QTensor
from fewbit.ops.linear.problem import LinearProblem, LinearWeights


@dataclass(frozen=True)
class _Prepared:
    weights: LinearWeights  # `weight` and `bias` in the dtype of activations


class Dense:
    """Holds the dequantized weight in the dtype of activations: on a CPU float32, four bytes a weight."""

    name = "dense"
    device: str | None = None

    def why_not(self, problem: LinearProblem) -> str | None:
        """Declines where dequantizing ahead would round once more than the format does."""
        if problem.dtype != torch.float32 and problem.quant.input is not None:
            return f"the dequantized weight does not fit {_short(problem.dtype)} exactly"
        return None

    def remark(self, problem: LinearProblem) -> str | None:
        """See `LinearKernel.remark`."""
        return None

    def weight_bytes(self, problem: LinearProblem) -> int:
        """See `LinearKernel.weight_bytes`."""
        return problem.n * problem.k * problem.dtype.itemsize

    def prepare(self, weights: LinearWeights, dtype: torch.dtype) -> _Prepared:
        """Dequantize."""
        w = weights.weight
        dense = w.dequantize(dtype) if isinstance(w, QTensor) else w.to(dtype)
        return _Prepared(replace(weights, weight=dense, bias=None if weights.bias is None else weights.bias.to(dtype)))

    def run(self, x: Tensor, prepared: _Prepared) -> Tensor:
        """See `LinearKernel.run`."""
        w = prepared.weights
        assert isinstance(w.weight, Tensor)
        return same_alone(w.round_input(x), w.weight, w.bias)


def same_alone(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` whose rows do not depend, to the last bit, on how many others there are.

    On a CPU the library has other code for a handful of rows (for each of its threads), which adds in another order.
    Filling up few rows to a multiple of four a thread keeps it on one path: an answer is then the same alone and in a
    batch.
    """
    rows, threads = x.shape[0], torch.get_num_threads()
    if x.device.type == "cpu" and x.ndim == 2 and rows < 16 * threads and (more := -rows % (4 * threads)):
        return F.linear(F.pad(x, (0, 0, 0, more)), weight, bias)[:rows]
    return F.linear(x, weight, bias)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

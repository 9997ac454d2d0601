"""SmoothQuant: what is hard to round in activations is moved into weights, where there is room for it.

G. Xiao, J. Lin, M. Seznec, H. Wu, J. Demouth, S. Han, "SmoothQuant: Accurate and Efficient Post-Training Quantization
for Large Language Models", arXiv:2211.10438. A channel j of an input is divided by ``s_j = max|x_j|^alpha /
max|w_j|^(1 - alpha)`` and the weights' columns multiplied by it. With ``alpha: auto`` each group of linears gets the
alpha whose rounded output is nearest on a sample of inputs, or none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewbit.compress.fold import fold, input_groups, quantized
from fewbit.compress.stats import Block
from fewbit.compress.techniques import Needs
from fewbit.errors import RecipeError
from fewbit.numerics.reference import input_scale
from fewbit.ops.linear.problem import round_input
from fewbit.ops.rounding import quantize

_GRID = tuple(step / 10 for step in range(11))


@dataclass(frozen=True)
class Settings:
    """What a recipe may set.

    Attributes:
        alpha: how much of the difficulty moves: 0 none of it that the weights do not ask for, 1 all; or ``auto``.
        inputs: ``all`` that will be rounded, or those that ``norms`` make: with a scale a token the others gain nothing
            and their weights lose (docs/quality.md).
    """

    alpha: float | Literal["auto"] = 0.8
    inputs: Literal["all", "norms"] = "all"

    @property
    def needs(self) -> Needs:
        """See `Technique`."""
        return "sample" if self.alpha == "auto" else "inputs"

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.inputs not in ("all", "norms"):
            raise RecipeError(f"smoothquant: inputs is {self.inputs!r}; known: all, norms")
        if self.alpha == "auto":
            return
        if not isinstance(self.alpha, int | float) or isinstance(self.alpha, bool) or not 0 <= self.alpha <= 1:
            raise RecipeError(f"smoothquant: alpha is {self.alpha!r}; expected a number from 0 to 1, or auto")

    def block(self, block: Block) -> None:
        """See `BlockTechnique.block`. Only inputs that will be rounded are smoothed."""
        for group in input_groups(block):
            names = [name for name in quantized(group, block) if block.quant[name].input is not None]
            if not names or (self.inputs == "norms" and group.linear):
                continue
            inputs = group.tie(torch.stack([block.stats[name].amax for name in names]).amax(0))
            weights = group.tie(torch.stack([block.weights[name].abs().amax(0).float() for name in names]).amax(0))
            scales = [_scale(inputs, weights, alpha) for alpha in (_GRID if self.alpha == "auto" else (self.alpha,))]
            if len(scales) > 1 and not any(_seen(block, name) for name in names):
                continue  # nothing to judge by
            if len(scales) > 1:
                scales.append(torch.ones_like(inputs))  # an input without outliers is best left alone
                scales.sort(key=lambda scale: sum(_output_error(block, name, scale) for name in names))
            fold(block, group, scales[0])


def _seen(block: Block, name: str) -> bool:
    sample = block.stats[name].sample
    return sample is not None and len(sample) > 0


def _scale(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """What columns are multiplied by, [in], for largest magnitudes of inputs and of weights."""
    scale = inputs.pow(alpha) / weights.pow(1 - alpha)
    alive = (inputs > 0) & (weights > 0)
    # the whole does not matter; a mean of 1 keeps norms and weights where they were
    mean = scale[alive].log().mean().exp() if alive.any() else torch.ones(())
    return torch.where(alive, scale / mean.to(scale), 1.0).clamp(1e-5, 1e5)


def _output_error(block: Block, name: str, scale: Tensor) -> float:
    """Of one linear, with weight and input scaled and rounded to nearest: squared, over the sample."""
    quant, stats, weight = block.quant[name], block.stats[name], block.weights[name].float()
    assert quant.weight is not None
    assert quant.input is not None
    assert stats.sample is not None
    reach = input_scale((stats.amax / scale).max(), quant.input) if quant.calibrated else None
    x = round_input(stats.sample / scale, quant, reach, None)
    rounded = quantize(weight * scale, quant.weight).dequantize()
    return (x @ rounded.T - stats.sample @ weight.T).double().square().sum().item()

"""SmoothQuant: what is hard to round in activations is moved into weights, where there is room for it.

G. Xiao, J. Lin, M. Seznec, H. Wu, J. Demouth, S. Han, "SmoothQuant: Accurate and Efficient Post-Training Quantization
for Large Language Models", arXiv:2211.10438. A channel j of an input is divided by ``s_j = max|x_j|^alpha /
max|w_j|^(1 - alpha)`` and the weights' columns multiplied by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fewbit.compress.fold import fold, input_groups, quantized
from fewbit.compress.stats import Block
from fewbit.compress.techniques import Needs
from fewbit.errors import RecipeError


@dataclass(frozen=True)
class Settings:
    """What a recipe may set.

    Attributes:
        alpha: how much of the difficulty moves: 0 none of it that the weights do not ask for, 1 all.
    """

    alpha: float = 0.8
    needs: ClassVar[Needs] = "inputs"

    def __post_init__(self) -> None:
        """Check the settings."""
        if not isinstance(self.alpha, int | float) or isinstance(self.alpha, bool) or not 0 <= self.alpha <= 1:
            raise RecipeError(f"smoothquant: alpha is {self.alpha!r}; expected a number from 0 to 1")

    def block(self, block: Block) -> None:
        """See `BlockTechnique.block`. Only inputs that will be rounded are smoothed."""
        for group in input_groups(block):
            names = [name for name in quantized(group, block) if block.quant[name].input is not None]
            if not names:
                continue
            inputs = group.tie(block.stats[names[0]].amax)
            weights = group.tie(torch.stack([block.weights[name].abs().amax(0).float() for name in names]).amax(0))
            scale = inputs.pow(self.alpha) / weights.pow(1 - self.alpha)
            alive = (inputs > 0) & (weights > 0)
            # the whole does not matter; a mean of 1 keeps norms and weights where they were
            mean = scale[alive].log().mean().exp() if alive.any() else torch.ones(())
            fold(block, group, torch.where(alive, scale / mean.to(scale), 1.0).clamp(1e-5, 1e5))

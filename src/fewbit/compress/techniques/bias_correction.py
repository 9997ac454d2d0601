"""Bias correction: where a linear has a bias, it takes over the mean of the output error.

M. Nagel, M. van Baalen, T. Blankevoort, M. Welling, "Data-Free Quantization Through Weight Equalization and Bias
Correction", arXiv:1906.04721, with the mean of the input taken from the calibration data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fewbit.compress.stats import Stats
from fewbit.compress.techniques import Needs


@dataclass(frozen=True)
class Settings:
    """No settings."""

    needs: ClassVar[Needs] = "inputs"

    def correct(self, bias: Tensor, off: Tensor, stats: Stats) -> Tensor:
        """See `Correction.correct`."""
        return bias.float() - off @ (stats.total / max(stats.tokens, 1))

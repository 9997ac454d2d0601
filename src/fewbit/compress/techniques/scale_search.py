"""Scale search: rounding to nearest under the scale of each block that leaves the least output error.

The error of a column counts as much as its input is large: the diagonal of H = X Xᵀ. For NVFP4 that includes the choice
of J. Cook, J. Guo, G. Xiao, Y. Lin, S. Han, "Four Over Six: More Accurate NVFP4 Quantization with Adaptive Block
Scaling", arXiv:2512.02010: the largest magnitude of a block may become 4 instead of 6.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fewbit.compress.stats import Stats
from fewbit.compress.techniques import Needs
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.quantspec import QuantSpec
from fewbit.numerics.reference import check_fits, choose_scale, quantize


@dataclass(frozen=True)
class Settings:
    """No settings."""

    needs: ClassVar[Needs] = "hessian"

    def layer(self, weight: Tensor, quant: QuantSpec, stats: Stats | None, outer: Tensor | None) -> QTensor:
        """See `LayerTechnique.layer`."""
        assert quant.weight is not None
        assert stats is not None
        check_fits(quant.weight, weight.shape)
        scale, outer, zero = choose_scale(weight, quant.weight, outer, stats.importance())
        return quantize(weight, quant.weight, scale=scale, outer=outer, zero=zero)

"""Rounding to nearest: every weight to the closest number its block can say. Looks at no data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fewbit.compress.stats import Stats
from fewbit.compress.techniques import Needs
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.quantspec import QuantSpec
from fewbit.ops.rounding import quantize


@dataclass(frozen=True)
class Settings:
    """No settings: scales are chosen by `numerics.reference.choose_scale`."""

    needs: ClassVar[Needs] = "none"

    def layer(self, weight: Tensor, quant: QuantSpec, stats: Stats | None, outer: Tensor | None) -> QTensor:
        """See `Technique.layer`."""
        assert quant.weight is not None
        return quantize(weight, quant.weight, outer=outer)

"""SVDQuant: a low-rank branch in the model's dtype beside the quantized weight takes what is hard to round.

M. Li, Y. Lin, Z. Zhang, T. Cai, X. Li, J. Guo, E. Xie, C. Meng, J.-Y. Zhu, S. Han, "SVDQuant: Absorbing Outliers by
Low-Rank Components for 4-Bit Diffusion Models", arXiv:2411.05007. ``W x ≈ Q x̂ + B (A x)``, x̂ the rounded input. The
branch begins as the best one for W itself and is then fitted to what rounding left over, by the output error: with
``H = X Xᵀ = L Lᵀ`` the best branch of rank r for an error E comes from the largest r singular values of E L.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbit.compress.stats import Stats
from fewbit.compress.techniques import LayerTechnique, Needs
from fewbit.errors import RecipeError, UnsupportedError
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.quantspec import QuantSpec
from fewbit.numerics.reference import quantize
from fewbit.ops.rounding import choose_scale

_DAMPING = 0.01  # of H's mean diagonal: directions that the data did not show count a little
_EXTRA, _POWERS = 8, 4  # of the randomized singular value decomposition


@dataclass(frozen=True)
class Settings:
    """What a recipe may set.

    Attributes:
        rank: of the branch.
        rounds: how often it is fitted to what rounding left over.
    """

    rank: int = 32
    rounds: int = 3
    needs: ClassVar[Needs] = "hessian"

    def __post_init__(self) -> None:
        """Check the settings."""
        for name, least in (("rank", 1), ("rounds", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise RecipeError(f"svdquant: {name} is {value!r}; expected a whole number of at least {least}")

    def split(
        self, weight: Tensor, quant: QuantSpec, stats: Stats, outer: Tensor | None, rounding: LayerTechnique,
        dtype: torch.dtype,
    ) -> tuple[QTensor, Tensor, Tensor]:  # fmt: skip
        """A weight float32 [out, in] as codes and a branch: A [rank, in] and B [out, rank], `dtype`.

        Args:
            weight: to be split.
            quant: the numerics wanted.
            stats: with second moments.
            outer: as in `LayerTechnique.layer`.
            rounding: how the rest is rounded at the end.
            dtype: of the branch.
        """
        assert quant.weight is not None
        assert stats.hessian is not None
        factor = _factor(stats.hessian)
        importance = stats.importance()
        a, b = self._branch(weight, factor, dtype)
        for _ in range(self.rounds):
            rest = weight - b.float() @ a.float()
            scale, found, zero = choose_scale(rest, quant.weight, outer, importance)
            left = weight - quantize(rest, quant.weight, scale=scale, outer=found, zero=zero).dequantize()
            a, b = self._branch(left, factor, dtype)
        return rounding.layer(weight - b.float() @ a.float(), quant, stats, outer), a, b

    def _branch(self, error: Tensor, factor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The best A and B for an error [out, in]."""
        with torch.random.fork_rng([error.device] if error.is_cuda else []):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(error @ factor, self.rank + _EXTRA, _POWERS)
        u, s, v = u[:, : self.rank], s[: self.rank].sqrt(), v[:, : self.rank]
        a = torch.linalg.solve_triangular(factor, (v * s).T, upper=False, left=False)  # A L = sqrt(S) Vᵀ
        return a.to(dtype).contiguous(), (u * s).to(dtype).contiguous()  # as a file holds them: the same products


def _factor(hessian: Tensor) -> Tensor:
    """The lower Cholesky factor L of the damped H [in, in], float32.

    Raises:
        UnsupportedError: it has none.
    """
    damped = hessian.double().clone()
    mean = damped.diagonal().mean().clamp_min(1e-30)
    damped.diagonal().add_(mean * _DAMPING)
    lower, failed = torch.linalg.cholesky_ex(damped / mean)
    if failed:
        raise UnsupportedError("SVDQuant cannot factor the inputs' second moments; give it more data")
    found: Tensor = lower.float()
    return found

"""GPTQ: columns are rounded one after another, and those that are still to come make up for the error of each.

E. Frantar, S. Ashkboos, T. Hoefler, D. Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", arXiv:2210.17323. With H = X Xᵀ the sum over the calibration tokens, rounding column i of a row w leaves
the least output error if the later columns move by ``-(w_i - q_i) / U_ii * U_i,i+1:``, U the upper Cholesky factor of
the inverse of H. Scales are those of least error weighted by the diagonal of H.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbit.compress.stats import Stats
from fewbit.compress.techniques import Needs
from fewbit.errors import RecipeError, UnsupportedError
from fewbit.numerics.qtensor import QTensor, block_size, uncoded
from fewbit.numerics.quantspec import QuantSpec
from fewbit.numerics.reference import check_fits
from fewbit.ops.rounding import choose_scale, round_columns

log = logging.getLogger(__name__)
_BLOCK = 128  # columns whose errors are gathered before the rest moves
_ATTEMPTS = 4


@dataclass(frozen=True)
class Settings:
    """What a recipe may set.

    Attributes:
        damping: added to H's diagonal, as a part of its mean.
        act_order: round the columns with the largest inputs first. Scales are then those of the weight as it was; else
            those of a group of columns are chosen when its turn comes.
    """

    damping: float = 0.01
    act_order: bool = True
    needs: ClassVar[Needs] = "hessian"

    def __post_init__(self) -> None:
        """Check the settings."""
        if not isinstance(self.damping, int | float) or not 0 < self.damping <= 1:
            raise RecipeError(f"gptq: damping is {self.damping!r}; expected a number above 0 and up to 1")
        if not isinstance(self.act_order, bool):
            raise RecipeError(f"gptq: act_order is {self.act_order!r}; expected true or false")

    def layer(self, weight: Tensor, quant: QuantSpec, stats: Stats | None, outer: Tensor | None) -> QTensor:
        """See `LayerTechnique.layer`."""
        assert quant.weight is not None
        assert stats is not None
        assert stats.hessian is not None
        fmt = quant.weight
        check_fits(fmt, weight.shape)
        importance = stats.importance()
        scale, outer, zero = choose_scale(weight, fmt, outer, importance)
        later = fmt.block[0] == 1 and fmt.grouped and not self.act_order  # scales are chosen when their turn comes
        rows, group = block_size(fmt, weight.shape)
        step = math.gcd(_BLOCK, group) if later else _BLOCK

        order = torch.arange(weight.shape[1], device=weight.device)
        if self.act_order:
            order = stats.hessian.diagonal().argsort(descending=True, stable=True)
        upper = _factor(stats.hessian, order, self.damping)  # [in, in]
        w = weight[:, order]
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        for start in range(0, w.shape[1], step):
            places = order[start : start + step]
            stop = start + len(places)
            if later and start % group == 0:
                columns = slice(start, start + group)
                at = start // group
                scale[:, at : at + 1], _, z = choose_scale(w[:, columns].contiguous(), fmt, outer, importance[columns])
                if zero is not None and z is not None:
                    zero[:, at : at + 1] = z
            blocks = uncoded(fmt, scale[:, places // group], outer)  # of each column
            s = blocks.scales().repeat_interleave(rows, 0)[: len(w)]
            z = None if zero is None else zero[:, places // group].float().repeat_interleave(rows, 0)[: len(w)]
            codes[:, places], errors = round_columns(w[:, start:stop], upper[start:stop, start:stop], s, z, fmt.element)
            w[:, stop:].addmm_(errors, upper[start:stop, stop:], alpha=-1)
            w[:, start:stop] = errors  # only looked at for what is not finite
        if not torch.isfinite(w).all():
            raise UnsupportedError("GPTQ left the range of float32; give it more data or a larger damping")
        return QTensor(fmt, codes, scale, outer, zero)


def _factor(hessian: Tensor, order: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse of H [in, in] in an order, float32; H is damped until it has one.

    With the rows and columns of H turned about, ``H = L Lᵀ``: the factor is the inverse of L, turned about again.

    Raises:
        UnsupportedError: it has none, however damped.
    """
    about = order.flip(0)
    turned = hessian[about][:, about].double()
    diagonal = turned.diagonal()
    dead = diagonal <= 0  # inputs that were never other than zero: rounded to nearest, and nobody makes up for them
    diagonal[dead] = 1.0
    mean, plain = diagonal.mean(), diagonal.clone()
    for attempt in range(_ATTEMPTS):
        more = damping * 10**attempt
        diagonal.copy_(plain + mean * more)
        lower, failed = torch.linalg.cholesky_ex(turned)
        if not failed:
            break
        if attempt + 1 < _ATTEMPTS:
            log.warning("H is singular at damping %g; trying %g", more, more * 10)
    del turned, diagonal
    if not failed:
        one = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        upper: Tensor = torch.linalg.solve_triangular(lower, one, upper=False).float().flip(0, 1)
        if torch.isfinite(upper).all():
            return upper
    raise UnsupportedError("GPTQ cannot invert the inputs' second moments, however damped; give it more data")

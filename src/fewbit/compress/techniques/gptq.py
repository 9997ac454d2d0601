"""GPTQ: columns are rounded one after another, and those that are still to come make up for the error of each.

E. Frantar, S. Ashkboos, T. Hoefler, D. Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", arXiv:2210.17323. With H = X Xᵀ the sum over the calibration tokens, rounding column i of a row w leaves
the least output error if the later columns move by ``-(w_i - q_i) / U_ii * U_i,i+1:``, U the upper Cholesky factor of
the inverse of H. Scales are those of least error weighted by the diagonal of H.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbit.compress.stats import Stats
from fewbit.compress.techniques import Needs
from fewbit.errors import RecipeError, UnsupportedError
from fewbit.numerics.qtensor import QTensor, spread, uncoded
from fewbit.numerics.quantspec import QuantSpec
from fewbit.numerics.reference import check_fits, choose_scale

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
        columns = weight.shape[1]
        importance = stats.importance()
        scale, outer, zero = choose_scale(weight, fmt, outer, importance)
        scales = (
            spread(uncoded(fmt, scale, outer).scales(), fmt, weight.shape).expand_as(weight).contiguous()
        )  # [out, in]
        zeros = None if zero is None else spread(zero.float(), fmt, weight.shape).expand_as(weight).contiguous()
        later = fmt.block[0] == 1 and fmt.grouped and not self.act_order  # scales are chosen when their turn comes

        hessian = stats.hessian.double()
        order = torch.arange(columns, device=weight.device)
        if self.act_order:
            order = hessian.diagonal().argsort(descending=True, stable=True)
        upper = _factor(hessian[order][:, order], self.damping).float()  # [in, in]
        w = weight.float()[:, order]
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        places = order.tolist()
        for start in range(0, columns, _BLOCK):
            stop = min(start + _BLOCK, columns)
            errors = torch.zeros(len(w), stop - start, device=w.device)  # in units of the columns' inverse
            for i in range(start, stop):
                place = places[i]
                if later and place % fmt.block[1] == 0:
                    # the columns of a group that lie beyond this block have not moved for this block's errors yet
                    group = slice(place, place + fmt.block[1])
                    now = w[:, group].clone()
                    beyond = stop - place
                    if beyond < fmt.block[1]:
                        now[:, beyond:] -= errors[:, : i - start] @ upper[start:i, stop : place + fmt.block[1]]
                    chosen, _, z = choose_scale(now, fmt, outer, importance[group])
                    at = place // fmt.block[1]
                    scale[:, at : at + 1] = chosen
                    scales[:, group] = uncoded(fmt, chosen, outer).scales()
                    if zero is not None and zeros is not None and z is not None:
                        zero[:, at : at + 1] = z
                        zeros[:, group] = z.float()
                column, s = w[:, i], scales[:, place]
                ratio = column / s if zeros is None else column / s + zeros[:, place]
                code = fmt.element.encode(ratio)
                value = fmt.element.decode(code)
                codes[:, place] = code
                error = (column - (value if zeros is None else value - zeros[:, place]) * s) / upper[i, i]
                w[:, i + 1 : stop] -= error[:, None] * upper[i, i + 1 : stop]
                errors[:, i - start] = error
            w[:, stop:] -= errors @ upper[start:stop, stop:]
        if not torch.isfinite(w).all():
            raise UnsupportedError("GPTQ left the range of float32; give it more data or a larger damping")
        return QTensor(fmt, codes, scale, outer, zero)


def _factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse of float64 H [in, in], H damped until it has one.

    Raises:
        UnsupportedError: it has none, however damped.
    """
    diagonal = hessian.diagonal()
    dead = diagonal <= 0  # inputs that were never other than zero: rounded to nearest, and nobody makes up for them
    diagonal[dead] = 1.0
    mean = diagonal.mean()
    for attempt in range(_ATTEMPTS):
        damped = hessian.clone()
        damped.diagonal().add_(mean * damping * 10**attempt)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and torch.isfinite(upper).all():
                found: Tensor = upper
                return found
        if attempt + 1 < _ATTEMPTS:
            log.warning("H is singular at damping %g; trying %g", damping * 10**attempt, damping * 10 ** (attempt + 1))
    raise UnsupportedError("GPTQ cannot invert the inputs' second moments, however damped; give it more data")

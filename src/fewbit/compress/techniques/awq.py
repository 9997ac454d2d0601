"""AWQ: input channels that matter are scaled up before rounding, and ranges of weights are clipped, by output error.

J. Lin, J. Tang, H. Tang, S. Yang, W.-M. Chen, W.-C. Wang, G. Xiao, X. Dang, C. Gan, S. Han, "AWQ: Activation-aware
Weight Quantization for LLM Compression and Acceleration", arXiv:2306.00978. Here the error of a rounded weight Q is
``tr((Q - W) H (Q - W)ᵀ)`` with H = X Xᵀ: the very output error over all calibration tokens, without a pass over them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbit.compress.fold import InputGroup, fold, input_groups, quantized, shared_outers
from fewbit.compress.stats import Block, Stats
from fewbit.compress.techniques import Needs
from fewbit.errors import RecipeError
from fewbit.numerics.format import ALL, Format
from fewbit.numerics.reference import check_fits, outer_scale
from fewbit.ops.device import rough_products
from fewbit.ops.rounding import quantize

_PIECE = {"cpu": 512, "cuda": 1024}  # rows of a weight whose error is taken at once


@dataclass(frozen=True)
class Settings:
    """What a recipe may set.

    Attributes:
        steps: how many exponents from 0 to 1 are tried for the scales.
        clip: whether ranges are clipped; not for q and k, whose products with each other count.
    """

    steps: int = 20
    clip: bool = True
    needs: ClassVar[Needs] = "hessian"

    def __post_init__(self) -> None:
        """Check the settings."""
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or not 1 <= self.steps <= 200:
            raise RecipeError(f"awq: steps is {self.steps!r}; expected a whole number from 1 to 200")
        if not isinstance(self.clip, bool):
            raise RecipeError(f"awq: clip is {self.clip!r}; expected true or false")

    def block(self, block: Block) -> None:
        """See `BlockTechnique.block`."""
        folded: set[str] = set()
        for group in input_groups(block):
            names = quantized(group, block)
            folded.update(names)
            for name in names:
                fmt = block.quant[name].weight
                assert fmt is not None
                check_fits(fmt, block.weights[name].shape)
            fold(block, group, self._scale(block, group, names))
        if self.clip:
            for name, quant in block.quant.items():
                if not name.endswith((".q", ".k")) and name in block.stats and quant.weight is not None:
                    if name not in folded:  # else it has a copy of its own
                        block.weights[name] = block.weights[name].to(torch.float32, copy=True)
                    _clip(block.weights[name], quant.weight, block.stats[name])

    def _scale(self, block: Block, group: InputGroup, names: list[str]) -> Tensor:
        """The best scales of a group among ``rms(x)^r / mean|w|^(1 - r)``, r from 0 to 1, and no scales at all."""
        seen = list({id(s): s for s in (block.stats[name] for name in names)}.values())  # of experts each its own
        square = torch.stack([_hessian(s).diagonal() for s in seen]).sum(0)
        x = group.tie((square / max(sum(s.tokens for s in seen), 1)).sqrt())
        weights = {name: block.weights[name] for name in names}
        w = group.tie(torch.stack([_mean_column(v) for v in weights.values()]).mean(0))
        alive = (x > 0) & (w > 0)
        best = torch.ones_like(x)
        if not alive.any():
            return best
        least = self._error(block, weights, best)
        for step in range(self.steps + 1):
            r = step / self.steps
            scale = x.pow(r) / w.pow(1 - r)
            scale = torch.where(alive, scale / (scale[alive].amax() * scale[alive].amin()).sqrt(), 1.0)
            scale = scale.clamp(1e-4, 1e4)
            error = self._error(block, weights, scale)
            if error < least:
                best, least = scale, error
        return best

    def _error(self, block: Block, weights: dict[str, Tensor], scale: Tensor) -> float:
        """The output error of a group's linears, rounded under a scale."""
        outers: dict[str, Tensor] = {}
        for owner in {name.rpartition(".")[0] for name in weights}:  # of experts each its own
            some = {name: w for name, w in weights.items() if name.startswith(f"{owner}.")}
            outers |= shared_outers(some, block.quant, scale)
        total = torch.zeros((), dtype=torch.float64, device=scale.device)
        for name, w in weights.items():
            fmt = block.quant[name].weight
            assert fmt is not None
            hessian = _hessian(block.stats[name])
            for piece in (part.float() for part in _pieces(w, fmt)):
                off = quantize(piece * scale, fmt, outer=outers.get(name)).dequantize().div_(scale).sub_(piece)
                with rough_products():
                    total += (off @ hessian).mul_(off).sum(dtype=torch.float64)
        return float(total)


def _mean_column(weight: Tensor) -> Tensor:
    """The mean of each column, [in], of magnitudes in units of their row's largest."""
    total = torch.zeros(weight.shape[1], device=weight.device)
    for piece in weight.split(_PIECE[weight.device.type]):
        size = piece.float().abs()
        total += (size / size.amax(1, keepdim=True).clamp_min(1e-30)).sum(0)
    return total / len(weight)


def _pieces(weight: Tensor, fmt: Format) -> tuple[Tensor, ...]:
    """Some rows at a time; all at once where rows share a scale."""
    rows = len(weight) if fmt.block[0] == ALL else max(_PIECE[weight.device.type], fmt.block[0])
    parts: tuple[Tensor, ...] = weight.split(rows)
    return parts


def _hessian(stats: Stats) -> Tensor:
    assert stats.hessian is not None
    return stats.hessian


def _clip(weight: Tensor, fmt: Format, stats: Stats) -> None:
    """Cut the largest magnitudes of each row's group (or row) to where the rounded output is closest, in place.

    Error terms between groups are left out: each group is judged by its own block of H.
    """
    if fmt.block[0] != 1:  # rows that share a scale share a range
        return
    columns = weight.shape[1]
    size = fmt.block[1] if fmt.grouped else columns
    hessian = _hessian(stats)
    blocks = torch.stack([hessian[i : i + size, i : i + size] for i in range(0, columns, size)])  # [groups, g, g]
    outer = outer_scale(weight.abs().amax(), fmt) if fmt.outer else None
    for piece in _pieces(weight, fmt):
        groups = piece.view(len(piece), -1, size)  # [out, groups, g]
        top = groups.abs().amax(-1, keepdim=True)
        best, least = groups, None
        for shrink in range(10):
            cut = groups.clamp(-top * (1 - shrink / 20), top * (1 - shrink / 20))
            off = quantize(cut.reshape(piece.shape), fmt, outer=outer).dequantize().view_as(groups) - groups
            error = (torch.einsum("ogi,gij->ogj", off, blocks) * off).sum(-1, keepdim=True)
            if least is None:
                least = error
                continue
            better = error < least
            best, least = torch.where(better, cut, best), torch.where(better, error, least)
        piece.copy_(best.reshape(piece.shape))

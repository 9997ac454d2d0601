"""How far a calibrated scale reaches: to the largest magnitude seen, or less far for the sake of all the others.

One scale for all tokens (of a ``static`` input, of K or V) has to be chosen from what calibration saw. ``max`` loses
nothing and wastes codes on a few outliers. The others cut the range: at a ``percentile`` of all magnitudes; where the
mean squared error (``mse``) is least; or where the divergence (``entropy``) between the distributions before and after
is least (S. Migacz, "8-bit Inference with TensorRT", GTC 2017).

What is remembered is a histogram over the magnitudes that bfloat16 can say: it needs no range beforehand, two of them
are added up, and every bin is known to 0.4 %.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fewbit.numerics.format import Format
from fewbit.numerics.qtensor import uncoded
from fewbit.numerics.reference import amax_scale, round_to

Method = Literal["max", "percentile", "mse", "entropy"]
_BINS = 0x7F80  # bfloat16 numbers below infinity, by their bits
_RANGES = 128  # candidates of a search, from an eighth of the largest magnitude up to all of it
_LINEAR = 2048  # bins of equal width for the divergence


class Histogram:
    """Counts of magnitudes.

    Args:
        rows: 1, or the heads of K or V, each of which has counts of its own.
        device: where to count.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.counts = torch.zeros(rows, _BINS, dtype=torch.int64, device=device)

    def see(self, x: Tensor) -> None:
        """Count x: [T, rows, n], or any shape where there is one row."""
        x = x.reshape(1, -1) if len(self.counts) == 1 else x.transpose(0, 1).flatten(1)  # [rows, ...]
        bins = x.abs().bfloat16().view(torch.int16).long().clamp_max_(_BINS - 1)  # float32 may round up to infinity
        bins += torch.arange(len(bins), device=x.device)[:, None] * _BINS
        self.counts += torch.bincount(bins.flatten(), minlength=self.counts.numel()).view_as(self.counts)

    def reach(self, fmt: Format, method: Method, percentile: float) -> Tensor:
        """The magnitude that the scale of each row has to cover, float32 [rows].

        Args:
            fmt: what will be rounded to; one scale a row.
            method: see above.
            percentile: of the magnitudes other than zero, in per cent.
        """
        return torch.stack([_reach(row, fmt, method, percentile) for row in self.counts])


def _reach(counts: Tensor, fmt: Format, method: Method, percentile: float) -> Tensor:
    """Of one row of counts. Zeros do not count: every format says them exactly."""
    used = counts.nonzero()[:, 0]
    used = used[used > 0]
    if not len(used):
        return torch.zeros((), device=counts.device)
    values, n = used.to(torch.int16).view(torch.bfloat16).float(), counts[used].double()  # ascending
    if method == "max":
        return values[-1]
    if method == "percentile":
        return values[(n.cumsum(0) >= n.sum() * (percentile / 100)).nonzero()[0, 0]]
    ranges = values[-1] * torch.linspace(1 / 8, 1, _RANGES, device=values.device)
    if method == "mse":
        losses = [(n * (_rounded(values, reach, fmt) - values).double().square()).sum() for reach in ranges]
    else:
        width = values[-1] / _LINEAR
        place = (values / width).long().clamp_max(_LINEAR - 1)
        linear = torch.zeros(_LINEAR, dtype=torch.float64, device=n.device).index_add_(0, place, n)
        middles = (torch.arange(_LINEAR, device=n.device) + 0.5) * width
        losses = [_divergence(linear, middles, reach, fmt) for reach in ranges]
    return ranges[int(torch.stack(losses).argmin())]


def _rounded(values: Tensor, reach: Tensor, fmt: Format) -> Tensor:
    scale = amax_scale(reach, fmt)
    return round_to(values[None], uncoded(fmt, scale.reshape(1, 1))).dequantize()[0]


def _divergence(counts: Tensor, middles: Tensor, reach: Tensor, fmt: Format) -> Tensor:
    """KL divergence of what is left of a distribution, in nats: what one code stands for is spread over its bins."""
    inside = middles <= reach
    kept, before = counts[inside], counts[inside].clone()
    before[-1] += counts[~inside].sum()  # what is beyond becomes the largest number
    _, code = _rounded(middles[inside], reach, fmt).unique(return_inverse=True)
    bins = int(code.max()) + 1
    alive = (kept > 0).double()
    total = torch.zeros(bins, dtype=torch.float64, device=kept.device).index_add_(0, code, kept)
    shared = torch.zeros_like(total).index_add_(0, code, alive)
    after = alive * (total / shared.clamp_min(1))[code]
    p, q = before / before.sum(), after / after.sum().clamp_min(1e-30)
    there = p > 0
    return (p[there] * (p[there] / q[there].clamp_min(1e-12)).log()).sum()

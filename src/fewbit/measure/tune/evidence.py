"""What the windows seen so far say of a candidate's quality on all of them: figures and intervals.

Every quality figure is an increasing function of a mean over windows. The windows are a sample without replacement of
those that will be looked at, in a random order, so the interval of a mean is Student's with the finite population's
factor (W. G. Cochran, "Sampling Techniques", 3rd ed., 1977, section 2.6); once all are seen it is a point.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np


@dataclass(frozen=True)
class Window:
    """Means over the tokens of one window.

    Attributes:
        loss: negative log-likelihood under the candidate, in nats.
        base: the same under the model it was made from.
        kl: KL(base || candidate), in nats.
        top1: fraction of positions at which both would choose the same token.
    """

    loss: float
    base: float
    kl: float
    top1: float


_SCORES: dict[str, tuple[Callable[[Window], float], Callable[[float], float]]] = {
    "recovery": (lambda w: w.base - w.loss, math.exp),
    "perplexity": (lambda w: w.loss, math.exp),
    "kl": (lambda w: w.kl, lambda mean: mean),
    "top1": (lambda w: w.top1, lambda mean: mean),
}
"""Of each quality figure: what a window adds to a mean, and the figure as an increasing function of it."""


def quality(windows: Sequence[Window]) -> dict[str, float]:
    """Every quality figure on these windows."""
    return {name: of(float(np.mean([score(w) for w in windows]))) for name, (score, of) in _SCORES.items()}


def interval(name: str, windows: Sequence[Window], total: int, risk: float) -> tuple[float, float]:
    """In which a quality figure on all `total` windows lies, but for a chance of `risk`."""
    score, of = _SCORES[name]
    low, high = mean_interval([score(w) for w in windows], total, risk)
    return _safe(of, low), _safe(of, high)


def difference(name: str, a: Sequence[Window], b: Sequence[Window], total: int, risk: float) -> tuple[float, float]:
    """In which the difference a - b of the means behind a figure lies, on the windows that both have seen."""
    score, _ = _SCORES[name]
    return mean_interval([score(x) - score(y) for x, y in zip(a, b, strict=False)], total, risk)


def mean_interval(values: Sequence[float], total: int, risk: float) -> tuple[float, float]:
    """In which the mean of `total` numbers lies, of which these are a random sample without replacement.

    Args:
        values: the sample.
        total: how many there are in all.
        risk: chance that the mean lies outside, were the numbers normal.
    """
    n = len(values)
    if n < 2 < total:
        return -math.inf, math.inf
    mean = float(np.mean(values))
    if n >= total:
        return mean, mean
    error = float(np.std(values, ddof=1)) / math.sqrt(n) * math.sqrt(1 - n / total)
    reach = student(n - 1, risk) * error
    return mean - reach, mean + reach


@cache
def student(df: int, risk: float) -> float:
    """The t with P(|T| > t) = risk for Student's distribution with `df` degrees of freedom.

    With t = sqrt(df) tan(x) the density becomes a multiple of cos(x)^(df - 1), which is integrated numerically.
    """
    # the rest below pi / 2 that is left out weighs far less than any risk asked for; finer steps near it
    rest = np.geomspace(math.pi / 2, 1e-9, 20_001)
    angle = math.pi / 2 - rest
    density = np.sin(rest) ** (df - 1)
    area = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(angle))])
    beyond = 1 - area / area[-1]
    at = float(np.interp(math.log(risk), np.log(np.maximum(beyond, 1e-300))[::-1], np.log(rest)[::-1]))
    return math.sqrt(df) / math.tan(math.exp(at))


def _safe(of: Callable[[float], float], value: float) -> float:
    try:
        return of(value)
    except OverflowError:
        return math.inf

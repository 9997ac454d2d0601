"""What the windows and questions seen so far say of a candidate's quality on all of them: figures and intervals.

Every quality figure is an increasing function of a mean over windows, or over questions. They are a sample without
replacement of those that will be looked at, in a random order, so the interval of a mean is Student's with the finite
population's factor (W. G. Cochran, "Sampling Techniques", 3rd ed., 1977, section 2.6); once all are seen it is a point.
Questions have weights, and those of the ones seen need not average what they do over all: a mean is then the ratio of
the weighted sum to the sum of the weights, and its error that of w (x - mean) / mean(w) (the same, chapter 6).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

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


@dataclass(frozen=True)
class Answer:
    """A question of the tasks.

    Attributes:
        score: 1 if the candidate has it right, else 0.
        base: the same of the model it was made from.
        weight: with which it counts, so that a mean over all questions is the mean of the tasks' accuracies.
        whole: that mean of the base, over all questions.
    """

    score: float
    base: float
    weight: float
    whole: float


_Of = Callable[[float], float]
_WINDOWS: dict[str, tuple[Callable[[Window], float], _Of]] = {
    "recovery": (lambda w: w.base - w.loss, math.exp),
    "perplexity": (lambda w: w.loss, math.exp),
    "kl": (lambda w: w.kl, lambda mean: mean),
    "top1": (lambda w: w.top1, lambda mean: mean),
}
"""Of each quality figure: what a window adds to a mean, and the figure as an increasing function of it."""
_ANSWERS: dict[str, tuple[Callable[[Answer], float], _Of]] = {
    "score": (lambda a: a.score, lambda mean: mean),
    "score_recovery": (lambda a: (a.score - a.base) / a.whole, lambda mean: 1 + mean),
}
"""The same of a question."""
_SCORES: dict[str, tuple[Callable[[Any], float], _Of]] = {**_WINDOWS, **_ANSWERS}
Seen = Sequence[Window] | Sequence[Answer]


def quality(seen: Seen) -> dict[str, float]:
    """Every quality figure on these windows, or on these questions."""
    figures = _ANSWERS if isinstance(seen[0], Answer) else _WINDOWS
    found, weights = ((name, *_SCORES[name]) for name in figures), _weights(seen)
    return {name: of(float(np.average([score(one) for one in seen], weights=weights))) for name, score, of in found}


def interval(name: str, seen: Seen, total: int, risk: float) -> tuple[float, float]:
    """In which a quality figure on all `total` windows or questions lies, but for a chance of `risk`."""
    score, of = _SCORES[name]
    ends = [score(replace(one, score=right, base=1 - right)) for one in _answer(seen) for right in (0.0, 1.0)]
    low, high = mean_interval([score(one) for one in seen], total, risk, ends, _weights(seen))
    return _safe(of, low), _safe(of, high)


def difference(name: str, a: Seen, b: Seen, total: int, risk: float) -> tuple[float, float]:
    """In which the difference a - b of the means behind a figure lies, on what both have seen."""
    score, _ = _SCORES[name]
    # one lost, one won: of the same question, so beside the same answer of the base
    reach = [score(replace(one, score=1.0)) - score(replace(one, score=0.0)) for one in _answer(a)]
    values = [score(x) - score(y) for x, y in zip(a, b, strict=False)]
    return mean_interval(values, total, risk, [*(-one for one in reach), *reach], _weights(a[: len(values)]))


def _answer(seen: Seen) -> list[Answer]:
    """An answer, to say the worst and the best that one can be; of windows nobody knows that, so none."""
    return [one for one in seen[:1] if isinstance(one, Answer)]


def _weights(seen: Seen) -> list[float] | None:
    """Of answers; windows count alike."""
    return [one.weight for one in seen if isinstance(one, Answer)] or None


def mean_interval(
    values: Sequence[float], total: int, risk: float, ends: Sequence[float] = (),
    weights: Sequence[float] | None = None,
) -> tuple[float, float]:  # fmt: skip
    """In which the mean of `total` numbers lies, of which these are a random sample without replacement.

    Args:
        values: the sample.
        total: how many there are in all.
        risk: chance that the mean lies outside, were the numbers normal.
        ends: the least and the largest that a number can be. They are then counted among the numbers, each t^2 / 2
            times, so that an interval keeps a width where all that was seen is equal (Agresti and Coull 1998).
        weights: of the values; None: they count alike.
    """
    n = len(values)
    if n < 2 and n < total:
        return -math.inf, math.inf
    mean = float(np.average(values, weights=weights))
    if n >= total:
        return mean, mean
    reach = student(n - 1, risk) * math.sqrt(1 - n / total)
    shares = np.ones(n) if weights is None else np.array(weights) / np.mean(weights)
    spread = mean + shares * (np.array(values) - mean)
    if not ends:
        error = float(np.std(spread, ddof=1)) / math.sqrt(n)
    else:
        spread = np.concatenate([spread, mean + shares.max() * (np.array(ends) - mean)])
        times = [1.0] * n + [reach * reach / 2] * len(ends)
        mean, count = float(np.average(spread, weights=times)), sum(times)
        error = math.sqrt(float(np.average((spread - mean) ** 2, weights=times)) / count)
    return mean - reach * error, mean + reach * error


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

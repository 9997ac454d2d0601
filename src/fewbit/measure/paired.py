"""Two models on the same items: how far their scores differ, how sure that is, and how many answers changed.

Both saw the same items, so what counts is where they differ: an interval for the difference of means by resampling
items, and McNemar's exact test of the flips (McNemar 1947). Two models of equal accuracy may still disagree on many
items, so the flips are reported beside the means (Dutta et al. 2024, "Accuracy is not all you need").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
_ROWS = 1 << 22  # numbers drawn at a time


@dataclass(frozen=True)
class Paired:
    """A model against its base, over the same items.

    Attributes:
        items: How many.
        base, model: Mean scores.
        difference: model - base.
        low, high: 95 % interval of the difference.
        recovery: model / base; None where the base scored nothing.
        recovery_low, recovery_high: Its 95 % interval.
        lost, won: Items that only the base, and only the model, has right; None where scores are not 0 or 1.
        p: Of McNemar's exact test, two-sided: how likely so uneven flips are if both are equally good.
    """

    items: int
    base: float
    model: float
    difference: float
    low: float
    high: float
    recovery: float | None
    recovery_low: float | None
    recovery_high: float | None
    lost: int | None = None
    won: int | None = None
    p: float | None = None

    @property
    def flips(self) -> float | None:
        """Fraction of items whose answer went from right to wrong or back."""
        return None if self.lost is None or self.won is None else (self.lost + self.won) / self.items

    def figures(self) -> dict[str, float | int | None]:
        """Everything, as JSON has it."""
        return asdict(self) | {"flips": self.flips}


def paired(base: Sequence[float], model: Sequence[float], seed: int = 0) -> Paired:
    """Compare the scores of the same items, in the same order.

    Args:
        base: One score an item; 0 and 1 for wrong and right.
        model: The same of the other model.
        seed: Of the resampling: the same scores give the same interval.

    Raises:
        ValueError: There are no items, or not equally many.
    """
    if len(base) != len(model) or not base:
        raise ValueError(f"scores of the same items are compared, got {len(base)} and {len(model)}")
    x, y = np.asarray(base, dtype=np.float64), np.asarray(model, dtype=np.float64)
    means = _resampled(np.stack([x, y], -1), np.random.default_rng(seed))  # [RESAMPLES, 2]
    low, high = _interval(means[:, 1] - means[:, 0])
    recovery = recovery_low = recovery_high = None
    if x.mean() > 0:
        recovery = float(y.mean() / x.mean())
        usable = means[:, 0] > 0
        recovery_low, recovery_high = _interval(means[usable, 1] / means[usable, 0])
    lost = won = p = None
    if set(np.unique(x)) | set(np.unique(y)) <= {0.0, 1.0}:
        lost, won = int((x > y).sum()), int((y > x).sum())
        p = mcnemar(lost, won)
    difference = float(y.mean() - x.mean())
    return Paired(
        len(x), float(x.mean()), float(y.mean()), difference, low, high, recovery, recovery_low, recovery_high,
        lost, won, p,
    )  # fmt: skip


def mcnemar(lost: int, won: int) -> float:
    """The exact two-sided test: the chance that `lost + won` fair coins fall at least as unevenly."""
    n, few = lost + won, min(lost, won)
    tail = sum(math.comb(n, k) for k in range(few + 1))
    return float(min(1.0, 2 * tail / 2**n))


def interval(scores: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of a mean, by resampling items."""
    values = np.asarray(scores, dtype=np.float64)
    return _interval(_resampled(values[:, None], np.random.default_rng(seed))[:, 0])


def _resampled(columns: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Column means of resampled rows, [RESAMPLES, columns]. Equal rows are drawn together: most scores are 0 or 1."""
    kinds, counts = np.unique(columns, axis=0, return_counts=True)
    n = len(columns)
    at_once = max(1, _ROWS // len(kinds))
    parts = [
        rng.multinomial(n, counts / n, size=min(at_once, RESAMPLES - start)) @ kinds / n
        for start in range(0, RESAMPLES, at_once)
    ]
    return np.concatenate(parts)


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)

"""Two models on the same items: how far their scores differ, how sure that is, and how many answers changed.

Both saw the same items, so what counts is where they differ: an interval for the difference of means, and McNemar's
exact test of the flips (McNemar 1947). Two models of equal accuracy may still disagree on many items, so the flips are
reported beside the means (Dutta et al. 2024, "Accuracy is not all you need").

Scores of 0 and 1 have score intervals, which keep their width where nothing varies: all right, all wrong, no flips
(Wilson 1927; Tango 1998 for the difference; Nam and Blackwelder 2002 for the ratio). Other scores are resampled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
Z = NormalDist().inv_cdf((1 + LEVEL) / 2)
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
        seed: Of the resampling of scores that are not 0 or 1: the same scores give the same interval.

    Raises:
        ValueError: There are no items, or not equally many.
    """
    if len(base) != len(model) or not base:
        raise ValueError(f"scores of the same items are compared, got {len(base)} and {len(model)}")
    x, y = np.asarray(base, dtype=np.float64), np.asarray(model, dtype=np.float64)
    recovery = recovery_low = recovery_high = lost = won = p = None
    if binary := _binary(x) and _binary(y):
        lost, won = int((x > y).sum()), int((y > x).sum())
        p = mcnemar(lost, won)
        low, high = difference_interval(lost, won, len(x))
    else:
        means = _resampled(np.stack([x, y], -1), np.random.default_rng(seed))  # [RESAMPLES, 2]
        low, high = _interval(means[:, 1] - means[:, 0])
    if x.mean() > 0:
        recovery = float(y.mean() / x.mean())
        if binary:
            assert lost is not None
            assert won is not None
            recovery_low, recovery_high = ratio_interval(lost, won, int((x * y).sum()))
        else:
            usable = means[:, 0] > 0
            recovery_low, recovery_high = _interval(means[usable, 1] / means[usable, 0])
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
    """The 95 % interval of a mean: Wilson's of scores 0 and 1, of others by resampling items."""
    values = np.asarray(scores, dtype=np.float64)
    if _binary(values):
        return wilson(float(values.sum()), len(values))
    return _interval(_resampled(values[:, None], np.random.default_rng(seed))[:, 0])


def wilson(right: float, items: int, z: float = Z) -> tuple[float, float]:
    """The score interval of a share, `right` of `items` (Wilson 1927)."""
    middle, reach = right + z * z / 2, z * math.sqrt(right * (1 - right / items) + z * z / 4)
    return max(0.0, (middle - reach) / (items + z * z)), min(1.0, (middle + reach) / (items + z * z))


def difference_interval(lost: int, won: int, items: int) -> tuple[float, float]:
    """The score interval of (won - lost) / items, shares of the same items (Tango 1998): what the test keeps."""

    def kept(value: float) -> bool:
        """Whether a difference is no further from what was seen than Z of its own standard deviations."""
        b = (2 * items - won + lost) * value - won - lost
        c = -lost * value * (1 - value)
        share = (math.sqrt(max(b * b - 8 * items * c, 0.0)) - b) / (4 * items)  # of items lost, likeliest under it
        spread = max(items * (2 * share + value * (1 - value)), 0.0)
        return (won - lost - items * value) ** 2 <= Z * Z * spread

    seen = (won - lost) / items
    return _furthest(kept, seen, -1.0), _furthest(kept, seen, 1.0)


def ratio_interval(lost: int, won: int, both: int) -> tuple[float, float]:
    """The score interval of (both + won) / (both + lost), shares of the same items (Nam and Blackwelder 2002).

    Items that neither has right say nothing of it. The base must have one right.
    """
    items, model, base = both + lost + won, both + won, both + lost

    def kept(part: float) -> bool:
        """The same of a ratio r, as r / (1 + r), which is finite."""
        ratio = part / (1 - part)
        more = ratio - 1
        b = (ratio + 1) * more * base - won - lost
        root = math.sqrt(max(b * b + 4 * items * (ratio + 1) * lost * more, 0.0))
        share = (root - b) / (2 * items * (ratio + 1))  # of these items lost, likeliest under it
        return (model - ratio * base) ** 2 <= Z * Z * max(items * ((ratio + 1) * share + more), 0.0)

    seen = model / (model + base)
    low, high = _furthest(kept, seen, 0.0), _furthest(kept, seen, 1.0)
    return low / (1 - low), high / (1 - high)


def _furthest(kept: Callable[[float], bool], inner: float, outer: float) -> float:
    """The last value on the way from `inner` to `outer` that is kept."""
    for _ in range(60):
        middle = (inner + outer) / 2
        inner, outer = (middle, outer) if kept(middle) else (inner, middle)
    return inner


def _binary(values: np.ndarray) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())


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

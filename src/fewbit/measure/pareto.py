"""Which of several candidates are worth a look when no single figure decides: the Pareto front.

Every coordinate is a cost: smaller is better. A figure of which more is better goes in negated. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether `a` is no worse than `b` in any coordinate and better in at least one."""
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def pareto(points: Sequence[Sequence[float]]) -> list[int]:
    """The points that none of the others dominates, in the order given; equal points stay together.

    Args:
        points: the costs of each, all of one length.

    Returns:
        Their indices.

    Raises:
        ValueError: a coordinate is no number (NaN), or the points are not of one length.
    """
    if any(math.isnan(x) for point in points for x in point):
        raise ValueError("a coordinate is NaN, which is neither better nor worse than anything")
    return [i for i, point in enumerate(points) if not any(dominates(other, point) for other in points)]

"""When requests are sent: a schedule drawn beforehand, so that a slow server cannot thin out its own load."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fewbit.errors import RequestError


@dataclass(frozen=True)
class Ramp:
    """A rate that changes from the first request to the last."""

    kind: Literal["linear", "exponential"]
    start: float
    end: float

    def __post_init__(self) -> None:
        if not (0 < self.start < math.inf and 0 < self.end < math.inf):
            raise RequestError(f"a ramp from {self.start:g} to {self.end:g} requests/s: expected rates above 0")

    def rate(self, progress: float) -> float:
        """Requests per second after this share of the requests."""
        if self.kind == "linear":
            return self.start + (self.end - self.start) * progress
        return float(self.start * (self.end / self.start) ** progress)


def schedule(
    count: int, rate: float, *, burstiness: float = 1.0, ramp: Ramp | None = None, seed: int = 0
) -> list[float]:
    """Seconds after the start at which each of `count` requests is due, as `vllm bench serve` draws them.

    Gaps are gamma distributed with shape `burstiness` and mean 1 / rate. All are stretched so that the last request
    comes at count / rate, which takes the luck of the draw out of the mean rate; with a ramp they are left as drawn.

    Args:
        count: requests.
        rate: requests per second; infinite: all at once. Left out of account with a ramp.
        burstiness: 1: a Poisson process; below 1: in bursts; above: more even; infinite: even.
        ramp: how the rate changes.
        seed: of the draw.

    Raises:
        RequestError: a rate or a burstiness that is not above 0.
    """
    if not rate > 0 or not burstiness > 0:
        raise RequestError(f"rate {rate:g} and burstiness {burstiness:g}: expected numbers above 0")
    progress = [index / max(count - 1, 1) for index in range(count)]
    means = np.array([1 / (ramp.rate(part) if ramp else rate) for part in progress])
    draw = np.random.default_rng(seed)
    gaps = means if math.isinf(burstiness) else draw.gamma(burstiness, means / burstiness)
    due = np.cumsum(gaps)
    if ramp is None and count and math.isfinite(rate):
        due *= count / rate / due[-1]
    return [float(moment) for moment in due]

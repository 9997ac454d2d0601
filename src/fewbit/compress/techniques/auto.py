"""Automatic mixed precision: each linear gets the candidate that keeps the model closest within a budget.

What a candidate costs is measured: the KL divergence of the model with that one group of linears quantized, or in one
backward pass an estimate of it (see `fewbit.compress.sensitivity`). Costs are taken to add up; the cheapest choice
within the budget is then found exactly. After AutoQuantize of NVIDIA Model Optimizer, which scores by gradients, and
Z. Dong et al., "HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks", arXiv:1911.03852.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np

from fewbit.compress.techniques import Needs
from fewbit.errors import RecipeError, UnsupportedError

Score = Literal["kl", "gradient"]


@dataclass(frozen=True)
class Settings:
    """What a recipe may set.

    Attributes:
        bits: the budget: true bits a weight, scales included, over all linears but the head; 5 unless another is set.
        tokens_per_s: another budget: what all sequences of the table of `times` together are to reach at least.
        times: a file of step times that ``fewbit bench step`` measured.
        candidates: names of built-in recipes, whose numerics they are, or ``none``: as it was.
        score: ``kl``: every candidate is measured; ``gradient``: all are estimated at once.
        windows: of the calibration data, on which is measured.
    """

    bits: float | None = None
    tokens_per_s: float | None = None
    times: str | None = None
    candidates: tuple[str, ...] = ("nvfp4", "fp8", "none")
    score: Score = "kl"
    windows: int = 8
    needs: ClassVar[Needs] = "none"

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.bits is None and self.tokens_per_s is None:
            object.__setattr__(self, "bits", 5.0)
        if self.bits is not None and self.tokens_per_s is not None:
            raise RecipeError("auto: bits and tokens_per_s are both set; a budget is one of them")
        if self.bits is not None and not (_number(self.bits) and self.bits <= 32):
            raise RecipeError(f"auto: bits is {self.bits!r}; expected a number above 0 and up to 32")
        if self.tokens_per_s is not None and not _number(self.tokens_per_s):
            raise RecipeError(f"auto: tokens_per_s is {self.tokens_per_s!r}; expected a number above 0")
        if (self.tokens_per_s is None) != (self.times is None) or not isinstance(self.times, str | None):
            raise RecipeError(
                "auto: tokens_per_s and times go together: a speed, and the file that fewbit bench step wrote"
            )
        names = self.candidates
        if not isinstance(names, list | tuple) or len(set(names)) < 2 or not all(isinstance(n, str) for n in names):
            raise RecipeError(f"auto: candidates is {names!r}; expected a list of two or more recipes, or none")
        object.__setattr__(self, "candidates", tuple(dict.fromkeys(names)))
        if self.score not in get_args(Score):
            raise RecipeError(f"auto: score is {self.score!r}; known: {', '.join(get_args(Score))}")
        if not isinstance(self.windows, int) or isinstance(self.windows, bool) or self.windows < 1:
            raise RecipeError(f"auto: windows is {self.windows!r}; expected a whole number of at least 1")


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


@dataclass(frozen=True)
class Option:
    """One candidate for one group of linears: its bits in all, its loss in nats, and its time if that counts.

    The time is in nanoseconds, beyond that of the fastest candidate.
    """

    candidate: str
    bits: int
    loss: float
    time: int | None = None

    @property
    def cost(self) -> int:
        """What it takes of the budget."""
        return self.bits if self.time is None else self.time


def cheapest(units: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """One option of each unit with the least loss in all within a budget, of bits or time: a multiple-choice knapsack.

    Exact. Unit by unit all sums are kept that no other beats in both cost and loss, and that could still beat a known
    solution: the least loss that the units to come may add is bounded by letting their choices be mixed.

    Raises:
        UnsupportedError: even the smallest options exceed the budget.
    """
    least = sum(min(o.cost for o in unit) for unit in units)
    if least > budget:
        raise UnsupportedError(f"the smallest candidates take {least}, the budget is {budget}")
    bounds = [_relaxed(units[i:]) for i in range(len(units) + 1)]
    # sums of the same losses in other orders differ in their last bits: to keep too much is only slower
    largest = sum(max(o.loss for o in unit) for unit in units)
    known = _greedy(units, budget) * (1 + 1e-9) + 1e-12 * largest
    bits, loss = np.zeros(1, np.int64), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []  # of each sum: where it came from, and by which option
    for i, unit in enumerate(units):
        all_bits = (bits[:, None] + np.array([o.cost for o in unit])).ravel()
        all_loss = (loss[:, None] + np.array([o.loss for o in unit])).ravel()
        possible = all_loss + bounds[i + 1](budget - all_bits) <= known
        order = np.flatnonzero(possible)
        order = order[np.lexsort((all_loss[order], all_bits[order]))]
        best = np.minimum.accumulate(np.append(np.inf, all_loss[order]))[:-1]
        order = order[all_loss[order] < best]  # strictly less loss than everything that takes no more bits
        bits, loss = all_bits[order], all_loss[order]
        steps.append((order // len(unit), order % len(unit)))
    at, chosen = len(bits) - 1, []  # the most bits have the least loss
    for came, option in reversed(steps):
        chosen.append(int(option[at]))
        at = int(came[at])
    return chosen[::-1]


def _hull(unit: Sequence[Option]) -> list[Option]:
    """The options on the lower convex hull of loss over bits, from the fewest bits on."""
    hull: list[Option] = []
    for option in sorted(unit, key=lambda o: (o.cost, o.loss)):
        if hull and (option.loss >= hull[-1].loss):
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-2], option):
            hull.pop()
        hull.append(option)
    return hull


def _gain(a: Option, b: Option) -> float:
    """Loss saved by each bit on the way from a to b."""
    return (a.loss - b.loss) / max(b.cost - a.cost, 1)


def _relaxed(units: Sequence[Sequence[Option]]) -> Callable[[np.ndarray], np.ndarray]:
    """The least loss of units within budgets, were mixtures of options allowed; infinite where nothing fits."""
    hulls = [_hull(unit) for unit in units]
    pieces = sorted(((a, b) for hull in hulls for a, b in itertools.pairwise(hull)), key=lambda p: -_gain(*p))
    bits = np.cumsum([sum(hull[0].cost for hull in hulls), *(b.cost - a.cost for a, b in pieces)])
    loss = np.cumsum([sum(hull[0].loss for hull in hulls), *(b.loss - a.loss for a, b in pieces)])
    return lambda budgets: np.where(budgets < bits[0], np.inf, np.interp(budgets, bits, loss))


def _greedy(units: Sequence[Sequence[Option]], budget: int) -> float:
    """The loss of a good choice: the largest gains first, as long as they fit."""
    hulls = [_hull(unit) for unit in units]
    left = budget - sum(hull[0].cost for hull in hulls)
    loss = sum(hull[0].loss for hull in hulls)
    steps = [(i, a, b) for i, hull in enumerate(hulls) for a, b in itertools.pairwise(hull)]
    blocked: set[int] = set()
    for i, a, b in sorted(steps, key=lambda s: -_gain(s[1], s[2])):
        if i not in blocked and b.cost - a.cost <= left:
            left -= b.cost - a.cost
            loss += b.loss - a.loss
        else:
            blocked.add(i)  # its later steps begin where this one ends
    return loss

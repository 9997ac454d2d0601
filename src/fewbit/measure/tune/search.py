"""The search of `fewbit tune`: cheap measurements of all candidates first, dear ones of those that may still win.

Facts of the files and speed are measured once and are what they are: a candidate that misses a target on them is out
before any quality is measured. Quality is measured on a growing number of windows, and of questions of tasks where the
goal names their score, doubled from round to round as in successive halving (K. Jamieson and A. Talwalkar,
"Non-stochastic Best Arm Identification and Hyperparameter Optimization", arXiv:1502.07943). Who goes on is not decided
by rank but as in a race (O. Maron and A. Moore, "Hoeffding Races", NIPS 1993): a candidate is dropped once an interval
says that it misses a target or that another one is no worse in every figure and better in one. The intervals are paired
where two candidates are compared, for both saw the same windows and questions. With risk R in all for a candidate, each
of its comparisons gets R by their number (Bonferroni).
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from fewbit.errors import FewbitError, UnsupportedError
from fewbit.measure.journal import Journal
from fewbit.measure.pareto import pareto
from fewbit.measure.tune.candidates import Candidate
from fewbit.measure.tune.evidence import Answer, Seen, Window, difference, interval, quality
from fewbit.measure.tune.goal import Figure, Goal

JOURNALLED = ("candidate", "stage")
"""What names a line of the journal: a candidate, and what was measured of it."""
RISK = 0.05
"""How likely a candidate may be dropped wrongly, all looks at it taken together."""
FIRST_WINDOWS = 6
"""Windows of the first round at least."""
BASE = "as it was"
"""The row of the model that is to be made small."""


class OutOfTimeError(Exception):
    """The budget has ended; what was under way has been given up."""


class LostError(FewbitError):
    """A measurement ended without saying why (killed, out of memory): a later search may try it again."""


class Measurer(Protocol):
    """Who measures. Each method but `forget` raises FewbitError where a candidate cannot be measured, and why."""

    def base(self) -> dict[str, float]:
        """Facts and speed of the model itself."""

    def make(self, candidate: Candidate) -> dict[str, Any]:
        """Make a candidate's checkpoint: ``figures``, the facts of it; ``recipe``, the text that makes it again."""

    def speed(self, candidate: Candidate) -> dict[str, float]:
        """Its speed."""

    def quality(self, candidate: Candidate, start: int, stop: int) -> list[Window]:
        """What it makes of some of the windows."""

    def answers(self, candidate: Candidate | None, start: int, stop: int) -> list[float]:
        """1 or 0 for some of the questions: whether it has them right. None: the model itself."""

    def forget(self, candidate: Candidate) -> None:
        """Its checkpoint is not needed any more, unless what beat it fails: it is then made again."""


@dataclass
class Row:
    """What is known of a candidate.

    Attributes:
        name: of the candidate.
        figures: by name; those of quality on the windows seen so far.
        windows: what was seen.
        scores: 1 or 0 for each question that was asked.
        recipe: the text that makes it again.
        out: why it is not in the race any more; None: it is.
        failed: whether `out` says that it could not be measured.
    """

    name: str
    figures: dict[str, float] = field(default_factory=dict)
    windows: list[Window] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    recipe: str | None = None
    out: str | None = None
    failed: bool = False


@dataclass
class Outcome:
    """How a search ended.

    Attributes:
        rows: of all candidates, in their order.
        base: of the model itself.
        front: names on the Pareto front over the goal's axes, among those that were not dropped.
        best: the name of the winner; None: nothing meets the targets.
        nearest: where nothing does: names, the nearest first.
        whole: whether every candidate was measured as far as it had to be; else the time was up.
    """

    rows: list[Row]
    base: Row
    front: list[str]
    best: str | None
    nearest: list[str]
    whole: bool

    def row(self, name: str) -> Row:
        """The row of a name."""
        return next(row for row in self.rows if row.name == name)


def rounds(windows: int) -> list[int]:
    """How many windows have been seen after each round: doubled, up to all of them."""
    seen, found = max(FIRST_WINDOWS, windows // 8), []
    while seen < windows:
        found.append(seen)
        seen *= 2
    return [*found, windows]


class Search:
    """One search.

    Args:
        candidates: what to try.
        goal: what is wanted.
        measurer: who measures.
        journal: what is known already, and where it is kept; its names are `JOURNALLED`.
        windows: how many a candidate's quality is measured on.
        weights: of the questions of tasks, see `evidence.Answer`; none where the goal does not name their score.
        exhaustive: measure everything of everybody.
        tell: told in words what is going on.
    """

    def __init__(
        self, candidates: Sequence[Candidate], goal: Goal, measurer: Measurer, journal: Journal, windows: int,
        weights: Sequence[float] = (), *, exhaustive: bool = False, tell: Callable[[str], None] = lambda text: None,
    ) -> None:  # fmt: skip
        assert bool(weights) == goal.asks
        self.candidates = {candidate.name: candidate for candidate in candidates}
        self.goal, self.measurer, self.journal, self.total = goal, measurer, journal, windows
        self.weights, self.exhaustive, self.tell = weights, exhaustive, tell
        self.rows = {name: Row(name) for name in self.candidates}
        self.base, self.base_score = Row(BASE), 0.0
        self.answers: defaultdict[str, list[Answer]] = defaultdict(list)
        self.beaten: defaultdict[str, list[Row]] = defaultdict(list)
        looks = len(rounds(windows)) * (len(self.rows) + len(goal.targets))
        self.risk = RISK / looks

    def run(self) -> Outcome:
        """Search."""
        whole = True
        try:
            self.base.figures |= self._once(BASE, "speed", lambda: {"figures": self.measurer.base()})["figures"]
            for row in self.rows.values():
                self._cheap(row)
            steps = [self.total] if self.exhaustive else rounds(self.total)
            if self.weights and self._alive():
                self._ask_base(steps)
            for seen in steps:
                # one by one: a failure puts those back that it had beaten, wherever they had come to
                while behind := [row for row in self._alive() if len(row.windows) < seen]:
                    self._look(min(behind, key=lambda r: self._objective(r.figures)), seen)
        except OutOfTimeError:
            whole = False
        return self._outcome(whole)

    # ---- measuring ----

    def _cheap(self, row: Row) -> None:
        """Make a candidate, and time it."""
        candidate = self.candidates[row.name]
        made = self._tried(row, "make", lambda: self.measurer.make(candidate))
        if made is None:
            return
        row.figures |= made["figures"]
        row.recipe = made["recipe"]
        if self._drop_missed(row):
            return
        timed = self._tried(row, "speed", lambda: {"figures": self.measurer.speed(candidate)})
        if timed is not None:
            row.figures |= timed["figures"]
            self._drop_missed(row)

    def _ask_base(self, steps: Sequence[int]) -> None:
        """All questions for the model itself: what a candidate recovers is a share of that score."""
        base = self.base
        for last in dict.fromkeys(map(self._questions, steps)):
            stage, ask = self._asking(base, last)
            base.scores += self._once(BASE, stage, ask)["scores"]
        if not any(base.scores):
            raise UnsupportedError("the model as it was has no question right; choose tasks that it knows something of")
        self.base_score = float(np.mean(np.multiply(base.scores, self.weights)))
        base.figures |= quality(self._answers(base))

    def _questions(self, seen: int) -> int:
        """How many questions have been asked when so many windows have been seen: the same share."""
        return math.ceil(len(self.weights) * seen / self.total)

    def _asking(self, row: Row, last: int) -> tuple[str, Callable[[], Mapping[str, Any]]]:
        """A stage in which a row is asked the questions up to `last`, and what does it."""
        candidate, first = self.candidates.get(row.name), len(row.scores)
        return f"tasks {first}:{last}", lambda: {"scores": self.measurer.answers(candidate, first, last)}

    def _look(self, row: Row, seen: int) -> None:
        """More windows and questions for a candidate, if it may still win."""
        if self._hopeless(row):
            return
        start = len(row.windows)
        candidate, stage = self.candidates[row.name], f"quality {start}:{seen}"
        found = self._tried(
            row, stage, lambda: {"windows": [vars(w) for w in self.measurer.quality(candidate, start, seen)]}
        )
        if found is None:
            return
        row.windows += [Window(**window) for window in found["windows"]]
        row.figures |= quality(row.windows)
        if (last := self._questions(seen)) > len(row.scores):
            found = self._tried(row, *self._asking(row, last))
            if found is None:
                return
            row.scores += found["scores"]
            row.figures |= quality(self._answers(row))
        self._hopeless(row)

    def _tried(self, row: Row, stage: str, measure: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any] | None:
        """What a measurement gives; None: it cannot be, and the row says why."""
        found = self._once(row.name, stage, measure)
        if "error" in found:
            row.out, row.failed = found["error"], True
            self.measurer.forget(self.candidates[row.name])
            for one in self.beaten.pop(row.name, ()):
                one.out = None
                self.tell(f"{one.name}: back, since {row.name} failed")
            return None
        return found

    def _once(self, name: str, stage: str, measure: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        if known := self.journal.find(name, stage):
            return known
        self.tell(f"{name}: {stage}")
        start = time.monotonic()
        try:
            found = measure()
        except FewbitError as error:
            if name == BASE:
                raise
            found = {"error": str(error)}
            if isinstance(error, LostError):
                return found
        took = round(time.monotonic() - start, 3)
        return self.journal.add({"candidate": name, "stage": stage, **found, "seconds": took})

    # ---- deciding ----

    def _alive(self) -> list[Row]:
        return [row for row in self.rows.values() if row.out is None]

    def _objective(self, figures: Mapping[str, float]) -> float:
        """The objective's cost; qualities are not known before the first round."""
        axis = self.goal.objective
        return axis.cost(figures[axis.name]) if axis.name in figures else 0.0

    def _drop_missed(self, row: Row) -> bool:
        """Drop a candidate that misses a target on figures that are what they are."""
        missed = [t for t in self.goal.missed(row.figures) if not t.figure.sampled]
        if missed and not self.exhaustive:
            self._drop(row, "misses " + ", ".join(f"{t} ({row.figures[t.figure.name]:.4g})" for t in missed))
        return row.out is not None

    def _hopeless(self, row: Row) -> bool:
        """Drop a candidate whose quality is surely too low, or that another one surely beats."""
        if self.exhaustive or len(row.windows) == self.total:
            return False
        for target in self.goal.targets:
            figure = target.figure
            if figure.sampled and (evidence := self._evidence(row, figure)):
                low, high = interval(figure.name, evidence, self._whole(figure), self.risk)
                best = high if figure.higher else low
                if not target.met(best):
                    self._drop(row, f"misses {target} ({low:.4g} to {high:.4g})")
                    return True
        for other in self.rows.values():
            if other is not row and not other.failed and self._beats(other, row):
                self.beaten[other.name].append(row)
                self._drop(row, f"{other.name} is better")
                return True
        return False

    def _beats(self, a: Row, b: Row) -> bool:
        """Whether `a` is no worse than `b` in every axis and better in one, of qualities as good as surely."""
        if not b.windows or len(a.windows) < len(b.windows) or len(a.scores) < len(b.scores):
            return False
        better = False
        for axis in self.goal.axes:
            if axis.sampled:
                both = self._evidence(a, axis), self._evidence(b, axis)
                low, high = difference(axis.name, *both, self._whole(axis), self.risk)
                worst = low if axis.higher else -high
            else:
                worst = axis.cost(b.figures[axis.name]) - axis.cost(a.figures[axis.name])
            if worst < 0:
                return False
            better |= worst > 0
        return better

    def _evidence(self, row: Row, figure: Figure) -> Seen:
        """What is known of a row that a figure comes from."""
        return self._answers(row) if figure.kind == "tasks" else row.windows

    def _whole(self, figure: Figure) -> int:
        """How much of that there is in all."""
        return len(self.weights) if figure.kind == "tasks" else self.total

    def _answers(self, row: Row) -> list[Answer]:
        known = self.answers[row.name]  # made once: every pair of candidates is looked at in every round
        new = slice(len(known), len(row.scores))
        more = zip(row.scores[new], self.base.scores[new], self.weights[new], strict=True)
        known += [Answer(*one, self.base_score) for one in more]
        return known

    def _drop(self, row: Row, why: str) -> None:
        row.out = why
        self.tell(f"{row.name}: out after {len(row.windows)} of {self.total} windows: {why}")
        self.measurer.forget(self.candidates[row.name])

    def _outcome(self, whole: bool) -> Outcome:
        rows = list(self.rows.values())
        done = [row for row in self._alive() if all(axis.name in row.figures for axis in self.goal.axes)]
        if longest := max((row.windows for row in rows), key=len, default=[]):
            self.base.figures |= quality([Window(w.base, w.base, 0.0, 1.0) for w in longest])
        costs = [self.goal.costs(row.figures) for row in done]
        front = [done[i].name for i in pareto(costs)]
        # in the order of the axes, the objective first: the least in that order is beaten by nobody
        ranked = sorted(zip(costs, done, strict=True), key=lambda pair: pair[0])
        best = next((row.name for _, row in ranked if not self.goal.missed(row.figures)), None)
        tried = [row for row in rows if row.figures and not row.failed]
        nearest = sorted(tried, key=self._distance)[:3] if best is None else []
        return Outcome(rows, self.base, front, best, [row.name for row in nearest], whole)

    def _distance(self, row: Row) -> tuple[float, float]:
        known = [t for t in self.goal.targets if t.figure.name in row.figures]
        return sum(t.shortfall(row.figures[t.figure.name]) for t in known), -len(known)

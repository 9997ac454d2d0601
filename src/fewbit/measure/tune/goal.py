"""What `fewbit tune` is asked for: figures, targets on them, and the one figure that is to be best."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fewbit.errors import RecipeError, nearest_name

Kind = Literal["quality", "tasks", "speed", "fact"]
"""How a figure is found: on windows of text, on questions of tasks, by timing the engine, or from the files."""


@dataclass(frozen=True)
class Figure:
    """Something that is measured of a candidate.

    Attributes:
        name: as targets have it, unit at the end.
        higher: whether more is better.
        kind: see `Kind`.
        words: what it is.
    """

    name: str
    higher: bool
    kind: Kind
    words: str

    @property
    def sampled(self) -> bool:
        """Whether it is known only up to an interval until everything has been looked at."""
        return self.kind in ("quality", "tasks")

    def cost(self, value: float) -> float:
        """The value turned so that less is better."""
        return -value if self.higher else value


FIGURES = {
    figure.name: figure
    for figure in (
        Figure("recovery", True, "quality", "perplexity of the base model / that of the candidate, on the same text"),
        Figure("perplexity", False, "quality", "exp of the mean negative log-likelihood of a token"),
        Figure("kl", False, "quality", "mean KL divergence from the base model's next-token distribution, in nats"),
        Figure("top1", True, "quality", "fraction of positions at which both models would choose the same token"),
        Figure("score", True, "tasks", "mean accuracy of the tasks of --tasks"),
        Figure("score_recovery", True, "tasks", "score of the candidate / that of the base model"),
        Figure("ttft_ms", False, "speed", "mean time to the first token of a request"),
        Figure("time_per_token_ms", False, "speed", "mean time between tokens of a request after its first"),
        Figure("tokens_per_s", True, "speed", "tokens generated for all sequences together, over the whole time"),
        Figure("memory_gb", False, "fact", "weights as the kernels hold them, K and V, and workspace; 10^9 bytes"),
        Figure("bits_per_weight", False, "fact", "true bits of a weight, scales included, over all linears of layers"),
    )
}
_FRACTIONS = ("recovery", "top1", "score", "score_recovery")
_UNITS = ("_ms", "_gb")
_TARGET = re.compile(r"\s*([A-Za-z0-9_]+)\s*([<>=!]+)\s*([^\s<>=]+)\s*")


@dataclass(frozen=True)
class Target:
    """A bound that a candidate has to keep."""

    figure: Figure
    limit: float

    def met(self, value: float) -> bool:
        """Whether a value keeps it."""
        return self.figure.cost(value) <= self.figure.cost(self.limit)

    def shortfall(self, value: float) -> float:
        """How far a value is from it, as a fraction of the limit; 0 where it is met."""
        return max(self.figure.cost(value) - self.figure.cost(self.limit), 0.0) / abs(self.limit)

    def __str__(self) -> str:
        return f"{self.figure.name}{'>=' if self.figure.higher else '<='}{self.limit:g}"


@dataclass(frozen=True)
class Goal:
    """Targets that have to be met, and the figure that is to be best among those that meet them."""

    targets: tuple[Target, ...]
    objective: Figure

    @property
    def axes(self) -> tuple[Figure, ...]:
        """What candidates are compared by: the objective, the targets' figures, and a quality in any case."""
        named = dict.fromkeys((self.objective, *(target.figure for target in self.targets)))
        if not any(figure.sampled for figure in named):
            named[FIGURES["recovery"]] = None
        return tuple(named)

    @property
    def asks(self) -> bool:
        """Whether it is about the score of tasks."""
        return any(axis.kind == "tasks" for axis in self.axes)

    def costs(self, figures: Mapping[str, float]) -> tuple[float, ...]:
        """The axes' values, each turned so that less is better."""
        return tuple(axis.cost(figures[axis.name]) for axis in self.axes)

    def missed(self, figures: Mapping[str, float]) -> list[Target]:
        """Targets that values miss; figures that are not known yet miss none."""
        return [t for t in self.targets if t.figure.name in figures and not t.met(figures[t.figure.name])]

    def __str__(self) -> str:
        best = "highest" if self.objective.higher else "lowest"
        return f"{best} {self.objective.name} with {', '.join(map(str, self.targets))}"


def read_goal(targets: str, minimize: str | None = None, maximize: str | None = None) -> Goal:
    """A goal as the command line has it: ``recovery>=0.99, ttft_ms<=200``, and the name of a figure.

    The unit at the end of a name may be left out of `minimize` and `maximize`.

    Raises:
        RecipeError: anything in it is wrong; the message says what may stand there.
    """
    if minimize and maximize:
        raise RecipeError("--minimize and --maximize are both given; one figure can be best, the others take targets")
    parts = targets.split(",")
    if not targets.strip():
        raise RecipeError(f"--target is empty; expected bounds such as recovery>=0.99, of {', '.join(FIGURES)}")
    found = [_target(part) for part in parts]
    names = [target.figure.name for target in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise RecipeError(f"--target {targets}: {twice} stands twice; give it one bound")
    option, wanted = ("--maximize", maximize) if maximize else ("--minimize", minimize or "time_per_token_ms")
    figure = FIGURES.get(wanted) or next((FIGURES[wanted + u] for u in _UNITS if wanted + u in FIGURES), None)
    if figure is None:
        raise RecipeError(f"{option} {wanted}: no such figure; {_known(wanted)}")
    if figure.higher != (option == "--maximize"):
        more, other = ("more", "--maximize") if figure.higher else ("less", "--minimize")
        raise RecipeError(f"{option} {wanted}: {more} of it is better; use {other} {wanted}")
    return Goal(tuple(found), figure)


def _target(text: str) -> Target:
    where = f"--target '{text.strip()}'"
    match = _TARGET.fullmatch(text)
    if match is None:
        raise RecipeError(f"{where}: expected NAME>=NUMBER or NAME<=NUMBER, by commas, of {', '.join(FIGURES)}")
    name, sign, value = match.groups()
    figure = FIGURES.get(name)
    if figure is None:
        raise RecipeError(f"{where}: no such figure; {_known(name)}")
    if sign != (right := ">=" if figure.higher else "<="):
        better = "more" if figure.higher else "less"
        raise RecipeError(f"{where}: {better} of {name} is better, so its target is {name}{right}NUMBER")
    try:
        limit = float(value)
    except ValueError:
        limit = math.nan
    if not (math.isfinite(limit) and limit > 0):
        raise RecipeError(f"{where}: expected a number above 0, got {value}")
    if name in _FRACTIONS and limit > 1:
        raise RecipeError(f"{where}: {name} is a fraction; expected at most 1, such as 0.99")
    return Target(figure, limit)


def _known(name: str) -> str:
    """The names, the nearest first said where there is one."""
    hint = nearest_name(name, FIGURES)
    known = f"known: {', '.join(FIGURES)}"
    return f"{hint} {known}" if hint.startswith("did you") else known

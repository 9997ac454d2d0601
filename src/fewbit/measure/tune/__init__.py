"""Choosing a recipe by measuring: what `fewbit tune` does."""

from fewbit.measure.tune.candidates import Candidate, candidates, kv_names, names
from fewbit.measure.tune.evidence import Window
from fewbit.measure.tune.goal import FIGURES, Figure, Goal, Target, read_goal
from fewbit.measure.tune.process import Protocol, Workers
from fewbit.measure.tune.questions import Questions, questions
from fewbit.measure.tune.search import (
    BASE,
    JOURNALLED,
    LostError,
    Measurer,
    Outcome,
    OutOfTimeError,
    Row,
    Search,
    rounds,
)

__all__ = [
    "BASE",
    "FIGURES",
    "JOURNALLED",
    "Candidate",
    "Figure",
    "Goal",
    "LostError",
    "Measurer",
    "OutOfTimeError",
    "Outcome",
    "Protocol",
    "Questions",
    "Row",
    "Search",
    "Target",
    "Window",
    "Workers",
    "candidates",
    "kv_names",
    "names",
    "questions",
    "read_goal",
    "rounds",
]

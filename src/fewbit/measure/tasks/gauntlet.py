"""The Eval Gauntlet (llm-foundry, v0.3): five categories of tasks and one composite score.

score of a task = (accuracy - baseline) / (1 - baseline), of a category the mean of its tasks', the composite the mean
of the categories'. It is a composite only with every task of the list: what is missing is named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from statistics import fmean

import yaml

from fewbit.errors import RecipeError
from fewbit.measure.tasks.run import Result
from fewbit.measure.tasks.task import Task, task_of


@dataclass(frozen=True)
class Gauntlet:
    """The tasks whose files are there, by category, and the names of the others."""

    categories: Mapping[str, tuple[Task, ...]]
    missing: Mapping[str, tuple[str, ...]]

    @property
    def tasks(self) -> list[Task]:
        """All that can be run."""
        return [task for tasks in self.categories.values() for task in tasks]


@dataclass(frozen=True)
class Composite:
    """What a model is worth.

    Attributes:
        categories: Score of each; of those tasks that were run.
        score: The mean over all categories; None if one of them has no task at all.
        complete: Whether every question of every task of the list was asked: only then the score is the published one.
    """

    categories: Mapping[str, float]
    score: float | None
    complete: bool


def gauntlet(folder: Path) -> Gauntlet:
    """The tasks of the list whose files lie in `folder`, in its subfolders, as .jsonl or .jsonl.gz.

    Raises:
        RecipeError: None of them does.
    """
    text = resources.files("fewbit.measure.tasks").joinpath("gauntlet.yaml").read_text("utf8")
    found: dict[str, tuple[Task, ...]] = {}
    missing: dict[str, tuple[str, ...]] = {}
    for category, described in yaml.safe_load(text).items():
        tasks = [task_of(folder, fields, "gauntlet.yaml") for fields in described]
        packed = [replace(t, file=t.file.with_name(t.file.name + ".gz")) for t in tasks]
        there = [
            t if t.file.is_file() else p
            for t, p in zip(tasks, packed, strict=True)
            if t.file.is_file() or p.file.is_file()
        ]
        names = {t.name for t in there}
        found[category], missing[category] = tuple(there), tuple(t.name for t in tasks if t.name not in names)
    if not any(found.values()):
        raise RecipeError(f"{folder}: none of the gauntlet's files, such as world_knowledge/arc_easy.jsonl")
    return Gauntlet(found, missing)


def composite(described: Gauntlet, results: Mapping[str, Result]) -> Composite:
    """The scores from the results by task name."""
    scores: dict[str, float] = {}
    for category, tasks in described.categories.items():
        run = [results[task.name].above_chance for task in tasks if task.name in results]
        if run:
            scores[category] = fmean(run)
    everything = not any(described.missing.values()) and all(
        t.name in results and results[t.name].whole for t in described.tasks
    )
    score = fmean(scores.values()) if len(scores) == len(described.categories) else None
    return Composite(scores, score, everything)

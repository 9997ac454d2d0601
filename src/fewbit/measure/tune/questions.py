"""The questions of tasks where a goal names their score: which, in which order, and whether a model has them right."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

from fewbit.errors import RecipeError
from fewbit.measure.journal import digest
from fewbit.measure.tasks.prompts import Prompts
from fewbit.measure.tasks.run import Outcome, Result, run_task
from fewbit.measure.tasks.source import Source, known, opened
from fewbit.measure.tasks.suite import Suite, check_all, suite_of
from fewbit.measure.tasks.task import Item


@dataclass(frozen=True)
class Questions:
    """Questions of tasks in a random order, of each task in proportion: what is asked first is a sample of all.

    Attributes:
        tasks: as `suite_of` takes them.
        data: the folder of their data.
        seed: of the solved examples and the order.
        order: name of a task and number of a row.
        weights: of each question, 1 on average, with which a mean is the mean of the tasks' accuracies.
        about: a word for what decides the answers besides the model.
    """

    tasks: tuple[str, ...]
    data: str | None
    seed: int
    order: tuple[tuple[str, int], ...]
    weights: tuple[float, ...]
    about: str

    def __len__(self) -> int:
        return len(self.order)

    def write(self, file: Path) -> None:
        """For `read`, in another process."""
        file.write_text(json.dumps(asdict(self)), "utf8")

    @classmethod
    def read(cls, file: Path) -> Self:
        """What `write` wrote."""
        return cls(**json.loads(file.read_text("utf8")))


def questions(
    tasks: tuple[str, ...], data: Path | None, source: Source, limit: int | None = None, seed: int = 0
) -> Questions:
    """The questions of some tasks.

    Args:
        tasks: ``mmlu``, ``gauntlet`` or files that describe tasks.
        data: the folder of their data.
        source: the model that is to be made small.
        limit: questions of each task.
        seed: of everything drawn.

    Raises:
        RecipeError: tasks that are measured otherwise or run programs, or a question that does not fit the model.
    """
    suite = _suite(tasks, data, seed)
    chosen: dict[str, list[Item]] = {}
    check_all(suite, asyncio.run(known(source)), limit, seed, chosen)
    total, placed = sum(map(len, chosen.values())), []
    for entry in suite.entries:
        items = chosen[entry.name]
        right = Result(entry.task, tuple(Outcome(item.index, 1.0, "", item.group) for item in items))
        weighed = list(zip(items, right.scores, strict=True))
        random.Random(f"{seed}/{entry.name}/tune").shuffle(weighed)
        for place, (item, weight) in enumerate(weighed):
            whole = weight * total / (len(chosen) * len(items))
            placed.append(((place + 0.5) / len(items), (entry.name, item.index), whole))
    placed.sort(key=lambda one: one[0])
    order, weights = tuple(at for _, at, _ in placed), tuple(weight for *_, weight in placed)
    about = digest([[entry.task.fingerprint() for entry in suite.entries], order, seed])
    return Questions(tasks, None if data is None else str(data), seed, order, weights, about)


def answers(
    asked: Questions, start: int, stop: int, source: Source, progress: Callable[[str, int, int], None]
) -> list[float]:
    """1 or 0 for each of some questions: whether a model has it right."""
    return asyncio.run(_answers(asked, asked.order[start:stop], source, progress))


async def _answers(
    asked: Questions, order: tuple[tuple[str, int], ...], source: Source, progress: Callable[[str, int, int], None]
) -> list[float]:
    wanted = {(name, index) for name, index in order}
    found: dict[tuple[str, int], float] = {}
    async with opened(source) as model:
        for entry in _suite(asked.tasks, None if asked.data is None else Path(asked.data), asked.seed).entries:
            items = [item for item in entry.chosen(model, None, asked.seed) if (entry.name, item.index) in wanted]
            prompts = Prompts(entry.task, model.tokenizer, model.length, asked.seed)
            result = await run_task(entry.task, items, prompts, model.answerer, progress=progress)
            found |= {(entry.name, outcome.index): outcome.score for outcome in result.outcomes}
    return [found[name, index] for name, index in order]


def _suite(tasks: tuple[str, ...], data: Path | None, seed: int) -> Suite:
    for name in tasks:
        listed = name in ("mmlu", "gauntlet")
        if not listed and not name.endswith((".yaml", ".yml")):
            raise RecipeError(f"--tasks {name}: tune asks mmlu, gauntlet and FILE.yaml; for others see fewbit eval")
        if listed and (data is None or not data.is_dir()):
            raise RecipeError(
                f"--tasks {name} reads local files: give the folder that holds them with --task-data FOLDER"
            )
    suite = suite_of(tasks, data, seed=seed, allow_code=True, allow_unconfined=True)
    if running := [entry.name for entry in suite.entries if entry.task.kind == "code"]:
        raise RecipeError(f"--tasks: {running[0]} runs programs that a model wrote, which tune does not; leave it out")
    return replace(suite, gauntlet=None)

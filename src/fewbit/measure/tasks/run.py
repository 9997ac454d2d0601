"""Running a task: every item asked, many at a time, each outcome on disk as soon as it is known."""

from __future__ import annotations

import asyncio
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fewbit.measure.journal import Journal
from fewbit.measure.paired import interval
from fewbit.measure.tasks.answer import Answerer, Likelihood, several
from fewbit.measure.tasks.prompts import Prompts
from fewbit.measure.tasks.sandbox import run_program
from fewbit.measure.tasks.task import Item, Task

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Outcome:
    """What came of one item.

    Attributes:
        index: Of its row.
        score: 1 if right, else 0.
        given: What the model chose or said.
        group: The item's.
        shots: Solved examples that stood before it: fewer than the task's where they did not fit.
    """

    index: int
    score: float
    given: str
    group: str | None = None
    shots: int = 0


@dataclass(frozen=True)
class Result:
    """What a model made of a task.

    Attributes:
        task: Which.
        outcomes: In the order of the items.
        whole: Whether these are all items of the task.
    """

    task: Task
    outcomes: tuple[Outcome, ...]
    whole: bool = True

    @property
    def scores(self) -> list[float]:
        """One for each item, whose mean is the task's score: of a mean over groups those of small groups weigh more."""
        if not self.task.by_group:
            return [o.score for o in self.outcomes]
        sizes = Counter(o.group for o in self.outcomes)
        return [o.score * len(self.outcomes) / (len(sizes) * sizes[o.group]) for o in self.outcomes]

    @property
    def accuracy(self) -> float:
        """The mean over all items, or of a task by groups over these."""
        return sum(self.scores) / len(self.outcomes)

    @property
    def interval(self) -> tuple[float, float]:
        """Its 95 % interval, over items."""
        return interval(self.scores)

    @property
    def above_chance(self) -> float:
        """(accuracy - baseline) / (1 - baseline): 0 is guessing, 1 is all right."""
        return (self.accuracy - self.task.baseline) / (1 - self.task.baseline)

    @property
    def groups(self) -> dict[str, float]:
        """Accuracy of each group."""
        found: dict[str, list[float]] = {}
        for o in self.outcomes:
            if o.group is not None:
                found.setdefault(o.group, []).append(o.score)
        return {group: sum(scores) / len(scores) for group, scores in found.items()}


async def run_task(
    task: Task,
    items: Sequence[Item],
    prompts: Prompts,
    answerer: Answerer,
    *,
    journal: Path | None = None,
    key: Mapping[str, Any] | None = None,
    at_once: int = 64,
    progress: Progress = lambda name, done, total: None,
) -> Result:
    """Ask a model everything.

    Args:
        task: What.
        items: Which of its items.
        prompts: Of this task and the model's tokenizer.
        answerer: The model.
        journal: A file of outcomes, one a line, that a stopped run goes on with; None: nothing is kept.
        key: What decides the outcomes besides the task: the model, what runs it; a journal of another is refused.
        at_once: Items under way at a time.
        progress: Told name, items done, items in all.

    Raises:
        RecipeError: The journal is of something else or in use, or a question does not fit the model.
        FewbitError: The model could not go on; what was known is in the journal.
    """
    asked = {**(key or {}), **task.fingerprint()}
    with nullcontext() if journal is None else Journal(journal, asked, ("index",), check=_check) as kept:
        lines = [line for item in items if kept is not None and (line := kept.find(item.index))]
        known = {line["index"]: Outcome(**line) for line in lines}
        todo = [item for item in items if item.index not in known]
        before = len(items) - len(todo)
        progress(task.name, before, len(items))

        async def one(item: Item) -> None:
            answered = await ask(task, item, prompts, answerer)
            known[item.index] = outcome = replace(answered, shots=prompts.shown.get(item.index, 0))
            if kept is not None:
                kept.add(asdict(outcome))

        await several([one(item) for item in todo], at_once, lambda n: progress(task.name, before + n, len(items)))
    return Result(task, tuple(known[item.index] for item in items))


def _check(line: Mapping[str, Any]) -> None:
    """Whether a line of a journal is an outcome."""
    found = Outcome(**line)
    whole = isinstance(found.index, int) and isinstance(found.shots, int) and isinstance(found.given, str)
    if not whole or not isinstance(found.score, (int, float)) or not isinstance(found.group, str | None):
        raise TypeError("a field of another type")


async def ask(task: Task, item: Item, prompts: Prompts, answerer: Answerer) -> Outcome:
    """One item."""
    if task.kind == "generation":
        said = await answerer.text(prompts.question(item), task.max_tokens, task.stop)
        return Outcome(item.index, float(is_right(task, item, said)), said, item.group)
    if task.kind == "code":
        said = await answerer.text(prompts.question(item), task.max_tokens, task.stop)
        ran = await asyncio.to_thread(run_program, f"{item.contexts[0]}{said}\n{item.answers[0]}")
        return Outcome(item.index, float(ran.finished), said, item.group)
    first, *others = prompts.continuations(item)
    # the first alone: it leaves the context that the others share in the engine's prefix cache
    found = [await answerer.likelihood(first)]
    found += await asyncio.gather(*(answerer.likelihood(one) for one in others))
    if task.kind == "language_modeling":
        return Outcome(item.index, float(found[0].greedy), repr(found[0].total), item.group)
    best = choose(found, task)
    return Outcome(item.index, float(best == item.gold), str(best), item.group)


def choose(found: Sequence[Likelihood], task: Task) -> int:
    """The likeliest of several, after dividing by length as the task says; of equals the first."""

    def value(one: Likelihood) -> float:
        if task.length == "none":
            return one.total
        return one.total / (one.tokens if task.length == "tokens" else max(one.characters, 1))

    return max(range(len(found)), key=lambda i: (value(found[i]), -i))


def is_right(task: Task, item: Item, said: str) -> bool:
    """Whether a generated text is one of the accepted answers."""
    if task.reasoning:
        said = said.rpartition(task.reasoning)[2]
    clean = normalized if task.normalize else str.strip
    text, answers = clean(said), tuple(clean(answer) for answer in item.answers)
    if task.match == "begins":  # everything begins with an alias of which nothing is left
        return text.startswith(tuple(filter(None, answers)))
    return text in answers


def normalized(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces: what SQuAD's and TriviaQA's scripts compare."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())

"""Several tasks at once: which are meant, asking a model all of them, and what came of it, alone and against a base."""

from __future__ import annotations

import asyncio
import functools
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any, get_args

from fewbit.errors import RecipeError, nearest_name
from fewbit.measure.paired import paired
from fewbit.measure.rows import file_hash
from fewbit.measure.tasks.gauntlet import Gauntlet, composite, gauntlet
from fewbit.measure.tasks.mmlu import Scorer, mmlu
from fewbit.measure.tasks.needle import Needle
from fewbit.measure.tasks.programs import programs
from fewbit.measure.tasks.prompts import Prompts
from fewbit.measure.tasks.run import Progress, Result, run_task
from fewbit.measure.tasks.sandbox import missing
from fewbit.measure.tasks.source import Asked, Known
from fewbit.measure.tasks.task import Item, Task, read_tasks
from fewbit.text import Tokenizer

NAMES = ("perplexity", "mmlu", "gauntlet", "needle", "code", "lm-eval:NAME", "FILE.yaml")
HARNESS = "lm-eval:"
GAUNTLET = "gauntlet/"


@dataclass(frozen=True)
class Entry:
    """A task by the name that reports call it.

    Attributes:
        name: Unique; also of its journal.
        task: What is asked and how it is scored.
        items: Makes its questions for a tokenizer; None: they are the rows of its file.
        about: What decides those questions besides the task's own fields.
    """

    name: str
    task: Task
    items: Callable[[Tokenizer, int], list[Item]] | None = None
    about: str = ""

    def chosen(self, asked: Asked | Known, limit: int | None, seed: int) -> list[Item]:
        """The questions, of which a limit takes some: drawn, and those of a smaller limit are among them."""
        found = self.task.items() if self.items is None else self.items(asked.tokenizer, asked.length)
        if limit is None or limit >= len(found):
            return found
        order = random.Random(f"{seed}/{self.task.name}/limit").sample(range(len(found)), len(found))
        return [found[i] for i in sorted(order[:limit])]


@dataclass(frozen=True)
class Suite:
    """What is to be measured.

    Attributes:
        entries: Tasks that are asked here.
        gauntlet: The list that some of them belong to.
        harness: Names of tasks that lm-eval runs.
        perplexity: Whether a text is to be predicted as well.
    """

    entries: tuple[Entry, ...]
    gauntlet: Gauntlet | None = None
    harness: tuple[str, ...] = ()
    perplexity: bool = False


def suite_of(
    names: Sequence[str],
    root: Path | None = None,
    *,
    scorer: Scorer = "loglikelihood",
    text: Path | None = None,
    needle: Needle | None = None,
    seed: int = 0,
    allow_code: bool = False,
    allow_unconfined: bool = False,
) -> Suite:
    """The tasks that a user names.

    Args:
        names: Of `NAMES`.
        root: The folder that holds the folders mmlu, gauntlet and code, or is one of them.
        scorer: How MMLU and the needle find the model's answer.
        text: Of the needle.
        needle: Its lengths and depths; None: as it is by default.
        seed: Of what is drawn.
        allow_code: Whether programs that a model wrote may be run here.
        allow_unconfined: Whether also where the system cannot keep them from the network and from files.

    Raises:
        RecipeError: A name is unknown or comes twice, or what it needs was not given.
    """
    entries: list[Entry] = []
    listed: Gauntlet | None = None
    harness = tuple(name.removeprefix(HARNESS) for name in names if name.startswith(HARNESS))
    if "" in harness:
        raise RecipeError("--tasks lm-eval: needs a task of lm-eval, such as lm-eval:arc_easy")
    for name in names:
        if name.startswith(HARNESS) or name == "perplexity":
            continue
        if name == "mmlu":
            entries.append(Entry(name, mmlu(_folder(root, name), scorer)))
        elif name == "gauntlet":
            listed = gauntlet(_folder(root, name))
            entries += [Entry(f"{GAUNTLET}{task.name}", task) for task in listed.tasks]
        elif name == "needle":
            made = replace(needle or Needle(), scorer=scorer, seed=seed)
            if text is None:
                raise RecipeError("--tasks needle hides a sentence in a text: give it with --text FILE")
            entries.append(Entry(name, made.task(text), functools.partial(made.items, text), str(made)))
        elif name == "code":
            entries.append(Entry(name, *programs(_folder(root, name))))
        elif name.endswith((".yaml", ".yml")):
            entries += [Entry(task.name, task) for task in read_tasks(Path(name))]
        else:
            raise RecipeError(f"--tasks {name}: {nearest_name(name, NAMES)}")
    seen = [entry.name for entry in entries] + list(harness)
    for name in seen:
        if seen.count(name) > 1:
            raise RecipeError(f"--tasks: two tasks are called '{name}'; name each once, or rename one in its file")
    if running := [entry.name for entry in entries if entry.task.kind == "code"]:
        _check_running(running[0], allow_code, allow_unconfined)
    return Suite(tuple(entries), listed, harness, "perplexity" in names)


def _check_running(name: str, allow_code: bool, allow_unconfined: bool) -> None:
    """Whether a task may run programs here."""
    if not allow_code:
        raise RecipeError(
            f"--tasks {name}: runs programs that a model wrote; where that may be, give --allow-code-execution"
        )
    if not allow_unconfined and (fault := missing()):
        raise RecipeError(f"--tasks {name}: on this system {fault}; where that may be, give --allow-unconfined-code")


def check_scorer(text: str) -> Scorer:
    """The scorer a user means."""
    if text not in get_args(Scorer):
        raise RecipeError(f"--scorer {text}: {nearest_name(text, get_args(Scorer))}")
    return text  # type: ignore[return-value]


def check_all(
    suite: Suite, known: Known, limit: int | None = None, seed: int = 0, items: dict[str, list[Item]] | None = None
) -> None:
    """Whether every question fits a model, before it is asked the first one. The arguments are those of `ask_all`.

    Raises:
        RecipeError: One does not.
    """
    chosen = {} if items is None else items
    for entry in suite.entries:
        if entry.name not in chosen:
            chosen[entry.name] = entry.chosen(known, limit, seed)
        prompts = Prompts(replace(entry.task, shots=0), known.tokenizer, known.length, seed)
        for item in chosen[entry.name]:
            _ = (prompts.question if entry.task.kind in ("generation", "code") else prompts.continuations)(item)


async def ask_all(
    suite: Suite,
    asked: Asked,
    *,
    folder: Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    at_once: int = 64,
    items: dict[str, list[Item]] | None = None,
    progress: Progress = lambda name, done, total: None,
) -> dict[str, Result]:
    """A model's results by the names of the entries.

    Args:
        suite: What to ask.
        asked: Whom.
        folder: Of the journals, from which a run that was stopped goes on.
        limit: Questions of each task.
        seed: Of the solved examples and of what the limit takes.
        at_once: Questions under way at a time.
        items: Filled with the questions of each entry, and taken from where it has them: a model and its base are
            asked the same ones.
        progress: Told task, questions done, questions in all.

    Raises:
        FewbitError: A question does not fit, a journal is of something else, or the model could not go on.
    """
    results, chosen = {}, {} if items is None else items
    for entry in suite.entries:
        if entry.name not in chosen:  # reading rows and making texts takes a while; nobody else is to wait for it
            chosen[entry.name] = await asyncio.to_thread(entry.chosen, asked, limit, seed)
        result = await run_task(
            entry.task,
            chosen[entry.name],
            Prompts(entry.task, asked.tokenizer, asked.length, seed),
            asked.answerer,
            journal=None if folder is None else folder / f"{entry.name}.jsonl",
            key={**asked.key, "seed": seed, "about": entry.about},
            at_once=at_once,
            progress=progress,
        )
        results[entry.name] = replace(result, whole=limit is None)
    return results


def report(
    suite: Suite, results: Mapping[str, Result], base: Mapping[str, Result] | None = None, seed: int = 0
) -> dict[str, Any]:
    """The results as the JSON object of `fewbit eval` has them: ``tasks`` by name and, where it was run, ``gauntlet``.

    Args:
        suite: What was asked.
        results: The model's.
        base: The other model's.
        seed: Of the resampling behind the intervals.
    """
    tasks: dict[str, Any] = {}
    for entry in suite.entries:
        made = _figures(entry, results[entry.name])
        if base is not None:
            other = base[entry.name]
            made["base"] = {"accuracy": other.accuracy, "interval": list(other.interval), "groups": other.groups} | {
                "shown": _shown(other)
            }
            if (pair := compared(results[entry.name], other, seed)) is not None:
                made["paired"] = pair
        tasks[entry.name] = made
    found: dict[str, Any] = {"tasks": tasks}
    if suite.gauntlet is not None:
        found["gauntlet"] = _composite(suite.gauntlet, results) | {
            "missing": {category: list(names) for category, names in suite.gauntlet.missing.items() if names}
        }
        if base is not None:
            found["gauntlet"]["base"] = _composite(suite.gauntlet, base)
    return found


def compared(result: Result, base: Result, seed: int = 0) -> dict[str, Any] | None:
    """Two models on the same questions: `Paired.figures`, over those that both saw with equally many examples.

    None: there is no such question.

    Raises:
        RecipeError: They answered different questions.
    """
    if [o.index for o in result.outcomes] != [o.index for o in base.outcomes]:
        raise RecipeError(f"task '{result.task.name}': the two models were asked different questions")
    same = [a.shots == b.shots for a, b in zip(result.outcomes, base.outcomes, strict=True)]
    if not any(same):
        return None
    result, base = (replace(r, outcomes=tuple(compress(r.outcomes, same))) for r in (result, base))
    found = paired(base.scores, result.scores, seed)
    if result.task.by_group:  # weighted scores are not 0 or 1; the answers are right or wrong all the same
        plain = paired([o.score for o in base.outcomes], [o.score for o in result.outcomes], seed)
        found = replace(found, lost=plain.lost, won=plain.won, p=plain.p)
    return found.figures()


def _figures(entry: Entry, result: Result) -> dict[str, Any]:
    task = entry.task
    files = {"file": task.file} | ({} if task.examples is None else {"examples": task.examples})
    return {
        "kind": task.kind,
        "items": len(result.outcomes),
        "accuracy": result.accuracy,
        "interval": list(result.interval),
        "baseline": task.baseline,
        "above_chance": result.above_chance,
        "shots": task.shots,
        "shown": _shown(result),
        "scored_by": "generate" if task.kind in ("generation", "code") else "loglikelihood",
        "groups": result.groups,
        "data": {name: {"path": str(path), "sha256": file_hash(path)} for name, path in files.items()},
    }


def _shown(result: Result) -> dict[str, int]:
    """How many questions had how many examples before them."""
    return {str(shots): n for shots, n in sorted(Counter(o.shots for o in result.outcomes).items())}


def _composite(listed: Gauntlet, results: Mapping[str, Result]) -> dict[str, Any]:
    mine = {name.removeprefix(GAUNTLET): r for name, r in results.items() if name.startswith(GAUNTLET)}
    return asdict(composite(listed, mine))


def _folder(root: Path | None, name: str) -> Path:
    """Where the files of a task lie: in a folder of its name, or in the one that was given."""
    if root is None:
        raise RecipeError(f"--tasks {name} reads local files: give the folder that holds them with --data FOLDER")
    if not root.is_dir():
        raise RecipeError(f"--data {root}: no such folder; --tasks {name} reads {name}/ in it")
    inside = root / name
    return inside if inside.is_dir() else root

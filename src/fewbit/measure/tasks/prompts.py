"""From items to prompts: solved examples, then the question, as many examples as fit."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from fewbit.errors import RecipeError
from fewbit.measure.tasks.task import Item, Task
from fewbit.text import Tokenizer


@dataclass(frozen=True)
class Continuation:
    """A text and what may follow it, in tokens."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    characters: int  # of what follows


class Prompts:
    """The prompts of a task for one tokenizer.

    Args:
        task: Whose.
        tokenizer: Of the model.
        length: Most tokens of a prompt and what follows it.
        seed: From which the examples of each item are drawn, whatever other items there are.
    """

    def __init__(self, task: Task, tokenizer: Tokenizer, length: int, seed: int = 0) -> None:
        self._task, self._tokenizer, self._length, self._seed = task, tokenizer, length, seed
        self.shown: dict[int, int] = {}  # examples that fitted before the item of an index
        self._solved = task.solved() if task.shots else []
        self._groups: dict[str | None, list[Item]] = {}
        for item in self._solved:
            self._groups.setdefault(item.group, []).append(item)

    def examples(self, item: Item) -> list[Item]:
        """The solved examples that stand before an item: never the item itself."""
        task = self._task
        if not task.shots:
            return []
        if task.first_shots:
            found = self._groups.get(item.group, [])[: task.shots]
        else:
            solved = self._groups.get(item.group, []) if task.by_group else self._solved
            others = [s for s in solved if task.examples is not None or s.index != item.index]
            rng = random.Random(f"{self._seed}/{task.name}/{item.index}")
            found = rng.sample(others, min(task.shots, len(others)))
        return found

    def text(self, item: Item, examples: Sequence[Item], context: int = 0) -> str:
        """The prompt up to where the answer begins, without the spaces that end the delimiter."""
        task = self._task
        parts = [task.before + self._shown(example) for example in examples]
        parts.append(task.before + item.contexts[context] + task.delimiter.rstrip(" "))
        return task.preamble.replace("{group}", (item.group or "").replace("_", " ")) + task.between.join(parts)

    def continuations(self, item: Item) -> list[Continuation]:
        """One for each choice (or each context of a schema), all with the same examples.

        Raises:
            RecipeError: The question alone is too long.
        """
        answers = item.answers if self._task.kind == "multiple_choice" else item.answers[:1]
        space = " " if self._task.delimiter.endswith(" ") else ""
        examples = self.examples(item)
        while True:
            made = [
                self._split(self.text(item, examples, c), space + answer)
                for c in range(len(item.contexts))
                for answer in answers
            ]
            longest = max(len(m.context) + len(m.continuation) for m in made)
            if longest <= self._length:
                self.shown[item.index] = len(examples)
                return made
            if not examples:
                raise RecipeError(self._too_long(item, longest))
            examples = examples[:-1]  # the last one goes first, as in MMLU's own script

    def question(self, item: Item) -> list[int]:
        """Tokens of a prompt that a text of `max_tokens` may follow.

        Raises:
            RecipeError: The question alone is too long.
        """
        examples = self.examples(item)
        while True:
            ids = self._tokenizer.encode(self.text(item, examples))
            if len(ids) + self._task.max_tokens <= self._length:
                self.shown[item.index] = len(examples)
                return ids
            if not examples:
                raise RecipeError(self._too_long(item, len(ids) + self._task.max_tokens))
            examples = examples[:-1]

    def _shown(self, example: Item) -> str:
        """A question with its answer."""
        task = self._task
        context = example.contexts[example.gold] if task.kind == "schema" else example.contexts[0]
        answer = example.answers[example.gold] if task.kind == "multiple_choice" else example.answers[0]
        if example.thought and task.reasoning:
            answer = example.thought + task.reasoning + answer
        return context + task.delimiter + answer

    def _split(self, context: str, continuation: str) -> Continuation:
        """Tokens of both, cut where the context's own tokens end, as lm-eval cuts them.

        A token that reaches over the border belongs to the continuation.
        """
        encode = self._tokenizer.encode
        before, whole = encode(context), encode(context + continuation)
        at = min(len(before), len(whole) - 1)
        while at > 0 and before[:at] != whole[:at]:
            at -= 1
        if at == 0:
            raise RecipeError(f"task '{self._task.name}': nothing stands before the answer, not even an opening token")
        return Continuation(tuple(whole[:at]), tuple(whole[at:]), len(continuation))

    def _too_long(self, item: Item, tokens: int) -> str:
        return (
            f"task '{self._task.name}', row {item.index + 1}: {tokens} tokens without any example, and the model takes "
            f"{self._length}; raise --max-model-len or leave the task out"
        )

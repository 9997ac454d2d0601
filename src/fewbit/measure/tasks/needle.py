"""A needle in a haystack: one sentence with a number, somewhere in a long text, asked for at its end.

Every length is tried with the needle at every depth. Text, places and numbers follow from the seed alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fewbit.errors import RecipeError
from fewbit.measure.tasks.mmlu import Scorer
from fewbit.measure.tasks.task import Item, Task
from fewbit.text import Tokenizer
from fewbit.text.windows import read_documents

LENGTHS = (512, 1024, 2048, 4096)
CHOICES = 8
ANSWER_TOKENS = 12
NAMES = ("Amsel", "Bergen", "Calder", "Dorset", "Elmira", "Fenwick", "Garda", "Halden", "Ivrea", "Jasper")
_SLACK = 8  # tokens that may join or split where texts meet


@dataclass(frozen=True)
class Needle:
    """Which texts are made.

    Attributes:
        lengths: Tokens of the whole prompts; None: those of `LENGTHS` that the model takes.
        depths: Where the needle lies, in percent of the text before the question.
        repeats: Texts for each length and depth, each with a number and a passage of its own.
        scorer: ``generate``: the number must be what is generated; ``loglikelihood``: the likeliest of eight numbers.
        seed: Of passages and numbers.
    """

    lengths: tuple[int, ...] | None = None
    depths: tuple[int, ...] = (0, 25, 50, 75, 100)
    repeats: int = 4
    scorer: Scorer = "loglikelihood"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.lengths == () or not self.depths or self.repeats < 1:
            raise RecipeError("a needle needs lengths, depths and at least one text of each")
        for depth in self.depths:
            if not 0 <= depth <= 100:
                raise RecipeError(f"--needle-depths {depth}: expected percent, 0 to 100")

    def task(self, text: Path) -> Task:
        """How the answers are scored."""
        generated = self.scorer == "generate"
        return Task(
            name="needle",
            kind="generation" if generated else "multiple_choice",
            file=text,
            baseline=0.0 if generated else 1 / CHOICES,
            length="none",
            max_tokens=ANSWER_TOKENS,
            match="begins",
        )

    def items(self, file: Path, tokenizer: Tokenizer, longest: int) -> list[Item]:
        """The questions, in groups named as ``2048@50``: tokens and percent.

        Raises:
            RecipeError: A length leaves no room for text, the model does not take it, or the file has too little text.
        """
        longest -= ANSWER_TOKENS if self.scorer == "generate" else 0
        lengths = tuple(n for n in LENGTHS if n <= longest) if self.lengths is None else self.lengths
        if not lengths or max(lengths) > longest:
            wanted = max(lengths or LENGTHS)
            raise RecipeError(f"--needle-lengths {wanted}: the model takes {longest} tokens; give shorter ones")
        passages = _Passages(file, tokenizer, max(lengths))
        found: list[Item] = []
        for length in lengths:
            for depth in self.depths:
                for number in range(self.repeats):
                    rng = random.Random(f"{self.seed}/needle/{length}/{depth}/{number}")
                    found.append(self._item(len(found), length, depth, rng, passages, tokenizer))
        return found

    def _item(
        self, index: int, length: int, depth: int, rng: random.Random, passages: _Passages, tokenizer: Tokenizer
    ) -> Item:
        name = rng.choice(NAMES)
        numbers = rng.sample(range(1000, 10000), CHOICES)
        secret = f"secret number of {name} is {numbers[0]}"
        needle = f" The {secret}. Remember it: the {secret}."
        question = f"\n\nQuestion: What is the secret number of {name}?\nAnswer: The secret number of {name} is"
        given = len(tokenizer.encode(needle + question + f" {numbers[0]}")) + _SLACK
        if length < given + 16:
            raise RecipeError(
                f"--needle-lengths {length}: needle and question alone take {given} tokens; make it longer"
            )
        words = passages.words(length - given, rng)
        at = _sentence(words, round(len(words) * depth / 100))
        text = " ".join(words[:at]) + needle + " " + " ".join(words[at:]) + question
        choices, gold, group = [str(n) for n in numbers], 0, f"{length}@{depth}"
        if self.scorer == "generate":
            return Item(index, (text,), tuple(choices[:1]), 0, group)
        gold = rng.randrange(CHOICES)  # the right one may stand anywhere: of equals the first is taken
        choices[0], choices[gold] = choices[gold], choices[0]
        return Item(index, (text,), tuple(choices), gold, group)


class _Passages:
    """Runs of words of a text, by how many tokens they take."""

    def __init__(self, file: Path, tokenizer: Tokenizer, tokens: int) -> None:
        self._tokenizer, self._file = tokenizer, file
        self._words: list[str] = []
        for text in _texts(file):
            self._words += text.split()
            if len(self._words) > 8 * tokens + 20_000:  # enough for passages that differ
                break
        if not self._words:
            raise RecipeError(f"{file}: no text to hide a needle in; rows of token ids will not do")

    def words(self, tokens: int, rng: random.Random) -> list[str]:
        """Words that take at most so many tokens, and would take more with the next one."""
        start = rng.randrange(max(1, len(self._words) - tokens))
        low, high = 0, min(tokens, len(self._words) - start)
        if self._size(start, high) < tokens and start + high >= len(self._words):
            raise RecipeError(f"{self._file}: has fewer words than {tokens} tokens need; give a longer text")
        while low < high:
            middle = (low + high + 1) // 2
            if self._size(start, middle) <= tokens:
                low = middle
            else:
                high = middle - 1
        return self._words[start : start + low]

    def _size(self, start: int, count: int) -> int:
        return len(self._tokenizer.encode(" ".join(self._words[start : start + count]), add_special_tokens=False))


def _texts(file: Path) -> Iterator[str]:
    return (document for document in read_documents(file) if isinstance(document, str))


def _sentence(words: list[str], at: int) -> int:
    """The place nearest to `at` where a sentence ends, or the text begins or ends."""
    places = [0, len(words), *(i + 1 for i, word in enumerate(words) if word.rstrip("\"')").endswith((".", "!", "?")))]
    return min(places, key=lambda place: (abs(place - at), place))

r"""A task: a file of questions with known answers, how they are put to a model, and what counts as right.

    name: arc_easy
    kind: multiple_choice
    file: arc_easy.jsonl.gz      # beside the description
    shots: 3
    baseline: 0.25
    delimiter: "\nAnswer: "

Every field but the first three has a default; a description is a YAML file with one such object, or a list of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from fewbit.errors import RecipeError, nearest_name
from fewbit.measure.rows import file_hash, rows

Kind = Literal["multiple_choice", "schema", "language_modeling", "generation", "code"]
Length = Literal["tokens", "characters", "none"]
Match = Literal["equal", "begins"]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Task:
    """How a file becomes a score. The names of the kinds and their scoring are the Eval Gauntlet's (llm-foundry).

    Attributes:
        name: What reports call it.
        kind: ``multiple_choice``: which of `choices` after `query` is likeliest is compared with `gold`; ``schema``:
            after which of `context_options` the `continuation` is likeliest; ``language_modeling``: whether greedy
            decoding of `context` gives every token of `continuation`; ``generation``: whether the text generated after
            `context` is `answer` or one of `aliases`; ``code``: whether `test` passes after `prompt` and the text
            generated behind it, run in a process of its own (`sandbox`).
        file: Its rows, JSON Lines.
        examples: Where solved examples come from; None: other rows of `file`.
        shots: How many of them stand before the question.
        first_shots: Take the first ones of the same group, as MMLU does, rather than draw them.
        by_group: The score is the unweighted mean over the groups, and examples come from the question's own group.
        baseline: What guessing scores.
        preamble: Before everything; ``{group}`` in it is the row's group, its _ as spaces.
        before: Before each question.
        delimiter: Between question and answer. Spaces at its end are part of the answer's tokens.
        between: Between examples.
        length: What the log-likelihood of a choice is divided by: its tokens, its characters, or nothing.
        letters: Write the choices below the question as lettered lines; the answers are the letters, compared as
            continuations or, in a ``generation``, generated.
        stop: Where a generated text ends.
        max_tokens: Longest generated text.
        reasoning: What stands between a chain of thought and the answer; of a generated text, what follows it counts.
        match: When a generated text is right: it is ``equal`` to an accepted answer, or ``begins`` with one.
        normalize: Compare in lower case, without punctuation, articles and extra spaces.
        fields: Names of the file's fields where they are not those above: ``query: question``.
    """

    name: str
    kind: Kind
    file: Path
    examples: Path | None = None
    shots: int = 0
    first_shots: bool = False
    by_group: bool = False
    baseline: float = 0.0
    preamble: str = ""
    before: str = ""
    delimiter: str = " "
    between: str = "\n"
    length: Length = "tokens"
    letters: bool = False
    stop: tuple[str, ...] = ()
    max_tokens: int = 64
    reasoning: str = ""
    match: Match = "equal"
    normalize: bool = False
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        where = f"task '{self.name}'"
        if self.kind not in get_args(Kind):
            raise RecipeError(f"{where}: unknown kind '{self.kind}': {nearest_name(str(self.kind), get_args(Kind))}")
        for name, words in (("length", get_args(Length)), ("match", get_args(Match))):
            if getattr(self, name) not in words:
                raise RecipeError(f"{where}: {name} must be one of {', '.join(words)}, got '{getattr(self, name)}'")
        if self.shots < 0 or self.max_tokens < 1:
            raise RecipeError(f"{where}: shots must be at least 0 and max_tokens at least 1")
        if not 0 <= self.baseline < 1:
            raise RecipeError(f"{where}: baseline must lie in [0, 1), got {self.baseline}")
        if self.letters and self.kind not in ("multiple_choice", "generation"):
            raise RecipeError(f"{where}: letters are for multiple_choice and generation, not {self.kind}")

    def items(self) -> list[Item]:
        """The questions.

        Raises:
            RecipeError: The file cannot be read, or a row lacks something.
        """
        return self._items(self.file)

    def solved(self) -> list[Item]:
        """The examples that may stand before a question; those of `file` itself if no others are named."""
        return self.items() if self.examples is None else self._items(self.examples)

    def fingerprint(self) -> dict[str, str]:
        """What decides the questions: the settings and the files' hashes."""
        files = {"file": self.file} | ({} if self.examples is None else {"examples": self.examples})
        settings = {f.name: str(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name not in files}
        return settings | {name: file_hash(path) for name, path in files.items()}

    def _items(self, path: Path) -> list[Item]:
        found = []
        for index, (where, row) in enumerate(rows(path)):
            try:
                found.append(self._item(index, row))
            except (KeyError, TypeError, ValueError) as e:
                fault = f"no field {e}" if isinstance(e, KeyError) else str(e)
                raise RecipeError(f"{where}: {fault} (a task of kind {self.kind})") from e
        return found

    def _item(self, index: int, row: Mapping[str, Any]) -> Item:
        def get(name: str) -> Any:
            return row[self.fields.get(name, name)]

        group = row.get(self.fields.get("category", "category"))
        if self.by_group and group is None:
            raise KeyError(self.fields.get("category", "category"))
        group = None if group is None else str(group)
        if self.kind == "multiple_choice" or self.letters:
            query, choices = _text(get("query")), tuple(map(_text, get("choices")))
            gold = _gold(get("gold"), len(choices))
            if self.letters:
                lines = (f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
                query, choices = "\n".join((query, *lines)), tuple(LETTERS[: len(choices)])
            if self.kind == "generation":
                return Item(index, (query,), (choices[gold],), 0, group)
            return Item(index, (query,), choices, gold, group)
        if self.kind == "schema":
            contexts = tuple(map(_text, get("context_options")))
            return Item(index, contexts, (_text(get("continuation")),), _gold(get("gold"), len(contexts)), group)
        if self.kind == "language_modeling":
            return Item(index, (_text(get("context")),), (_text(get("continuation")),), 0, group)
        if self.kind == "code":
            entry = row.get(self.fields.get("entry_point", "entry_point"))
            call = "" if entry is None else f"\ncheck({_text(entry)})\n"
            return Item(index, (_text(get("prompt")),), (_text(get("test")) + call,), 0, group)
        answer = _text(get("answer"))
        aliases = tuple(map(_text, row.get(self.fields.get("aliases", "aliases"), ())))
        thought = row.get(self.fields.get("chain_of_thought", "chain_of_thought"), "")
        return Item(index, (_text(get("context")),), (answer, *aliases), 0, group, _text(thought))


@dataclass(frozen=True)
class Item:
    """A question.

    Attributes:
        index: Of its row.
        contexts: What is asked: one text, or the alternatives of a schema.
        answers: What may follow: the choices, the one continuation, all that are accepted, or the tests of a program.
        gold: The right one of the choices, or of the contexts.
        group: A subject or category, for a score of its own.
        thought: The reasoning that leads to the answer, shown in examples.
    """

    index: int
    contexts: tuple[str, ...]
    answers: tuple[str, ...]
    gold: int
    group: str | None = None
    thought: str = ""


def read_tasks(path: Path) -> list[Task]:
    """The tasks that a YAML file describes; the files they name lie beside it.

    Raises:
        RecipeError: It cannot be read, or describes something else.
    """
    try:
        given = yaml.safe_load(path.read_text("utf8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise RecipeError(f"{path}: not a description of tasks ({str(e).splitlines()[0]})") from e
    described = given if isinstance(given, list) else [given]
    if not described:
        raise RecipeError(f"{path}: describes no task")
    return [task_of(path.parent, fields, str(path)) for fields in described]


def task_of(folder: Path, fields: Any, where: str) -> Task:
    """A task from its description. folder: of its files; where: the description stands, for error messages."""
    if not isinstance(fields, dict):
        raise RecipeError(f"{where}: a task is an object of fields, got {type(fields).__name__}")
    known = {field.name: field for field in dataclasses.fields(Task)}
    for name in fields:
        if name not in known:
            raise RecipeError(f"{where}: unknown field '{name}': {nearest_name(str(name), known)}")
    for name in ("name", "kind", "file"):
        if not isinstance(fields.get(name), str):
            raise RecipeError(f"{where}: a task needs '{name}', a text")
    made = dict(fields)
    for name in ("file", "examples"):
        if made.get(name) is not None:
            made[name] = folder / str(made[name])
    for name, value in made.items():
        wanted = _WANTED.get(str(known[name].type))
        if wanted is not None and (not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted)):
            raise RecipeError(f"{where}: '{name}' must be {_WORDS[wanted[0]]}, got {value!r}")
    made["stop"] = tuple(made.get("stop", ()))
    return Task(**made)


_WANTED: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "bool": (bool,),
    "float": (float, int),
    "tuple[str, ...]": (list,),
    "Mapping[str, str]": (dict,),
}
_WORDS = {
    str: "a text",
    int: "a whole number",
    bool: "true or false",
    float: "a number",
    list: "a list",
    dict: "an object",
}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected a text, got {value!r}"[:200])
    return value


def _gold(value: Any, choices: int) -> int:
    if type(value) is not int or not 0 <= value < choices:
        raise ValueError(f"the right answer must be a number below {choices}, got {value!r}")
    return value

"""Data sets to make load of: one file each, found by looking into this folder.

A module holds ``read`` (see `Reader`), ``FILE`` (whether it reads one), ``EXACT`` (whether the lengths of its answers
are part of it, so that a model may not end them sooner) and ``USES`` (fields of `Wanted` that mean something to it,
beyond those that do to all). Its docstring says what a row looks like.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Protocol, cast

from fewbit.errors import RequestError, nearest_name
from fewbit.text import Tokenizer

OUTPUT_TOKENS = 128
"""Of an answer whose length nobody says."""


@dataclass(frozen=True)
class Sample:
    """One prompt.

    Attributes:
        prompt: text, token ids, or a list of chat messages.
        output_tokens: asked for at most.
        prompt_tokens: as counted here; None: not counted.
        at: seconds after the start of a trace.
    """

    prompt: str | tuple[int, ...] | list[dict[str, Any]]
    output_tokens: int = OUTPUT_TOKENS
    prompt_tokens: int | None = None
    at: float | None = None


@dataclass(frozen=True)
class Wanted:
    """What to make a load of.

    Attributes:
        count: samples.
        path: the file, where there is one.
        tokenizer: the model's, where it is known.
        seed: of whatever is drawn.
        input_tokens, output_tokens: lengths, where the data set has none of its own or they are to replace them.
        range_ratio: lengths are uniform within this share around those.
        prefix_tokens: tokens that all random prompts begin with.
        as_text: whether random prompts are text, not token ids.
    """

    count: int
    path: Path | None = None
    tokenizer: Tokenizer | None = None
    seed: int = 0
    input_tokens: int | None = None
    output_tokens: int | None = None
    range_ratio: float = 0.0
    prefix_tokens: int = 0
    as_text: bool = False

    @property
    def file(self) -> Path:
        """The file, for a data set that is one."""
        assert self.path is not None
        return self.path

    def need_tokenizer(self, why: str) -> Tokenizer:
        """The tokenizer.

        Raises:
            RequestError: there is none.
        """
        if self.tokenizer is None:
            raise RequestError(f"{why}: give the model's directory with --tokenizer DIR")
        return self.tokenizer

    def count_tokens(self, text: str) -> int | None:
        """Tokens of a prompt, if there is a tokenizer."""
        return None if self.tokenizer is None else len(self.tokenizer.encode(text))


class Reader(Protocol):
    """What a module of this folder offers."""

    FILE: bool
    EXACT: bool
    USES: frozenset[str]

    def read(self, wanted: Wanted) -> list[Sample]:
        """Exactly `wanted.count` samples.

        Raises:
            RequestError: the file is missing, broken or holds nothing that fits; a bad row is named by its line.
        """
        ...


@functools.cache
def datasets() -> dict[str, Reader]:
    """Every data set by its file's name."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    return {name: cast("Reader", importlib.import_module(f"{__name__}.{name}")) for name in names}


def dataset_named(name: str, path: Path | None) -> Reader:
    """The data set a user means.

    Raises:
        RequestError: there is none of that name, it needs a file, or has no use for one.
    """
    if name not in datasets():
        raise RequestError(f"no data set '{name}'; {nearest_name(name, datasets())}")
    found = datasets()[name]
    if found.FILE and path is None:
        raise RequestError(f"data set {name} is read from a file: give it with --dataset-path FILE")
    if not found.FILE and path is not None:
        raise RequestError(f"data set {name} reads no file; leave out --dataset-path, or name what {path} holds")
    return found


def length_in(row: dict[str, Any], name: str, where: str, least: int = 1) -> int | None:
    """A whole number in a row; None: it is not there.

    Raises:
        RequestError: it is no whole number, or too small.
    """
    value = row.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise RequestError(f"{where}: {name} is {value!r}; expected a whole number from {least} on")
    return value


def ids_in(value: Any, where: str) -> tuple[int, ...]:
    """Token ids.

    Raises:
        RequestError: they are none.
    """
    fine = isinstance(value, list) and value and all(type(token) is int and token >= 0 for token in value)
    if not fine:
        raise RequestError(f"{where}: expected token ids, a list of whole numbers that is not empty")
    return tuple(value)


def drawn(samples: Sequence[Sample], wanted: Wanted) -> list[Sample]:
    """`wanted.count` of the samples in a random order; only once all are used, some come again."""
    draw = Random(wanted.seed)
    found: list[Sample] = []
    while len(found) < wanted.count:
        found += draw.sample(samples, len(samples))
    return found[: wanted.count]


def distinct(samples: Sequence[Sample]) -> int:
    """How many different prompts there are."""
    return len({json.dumps(sample.prompt) for sample in samples})


def fingerprint(samples: Sequence[Sample]) -> str:
    """A hash of what is asked: equal ones mean equal loads."""
    whole = hashlib.sha256()
    for sample in samples:
        whole.update(json.dumps([sample.prompt, sample.output_tokens, sample.at]).encode())
    return whole.hexdigest()

"""Who answers: an engine, asked for many things at a time; and what was answered before."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from fewbit.engine.client import EngineClient
from fewbit.engine.types import GenerateRequest, SamplingParams, TokenLogprobs
from fewbit.errors import FewbitError
from fewbit.measure.journal import Journal, digest
from fewbit.measure.tasks.prompts import Continuation
from fewbit.text import Tokenizer
from fewbit.text.stream import TextStream

T = TypeVar("T")


class AnswerError(FewbitError):
    """A model could not go on with a question."""


@dataclass(frozen=True)
class Likelihood:
    """What a model thinks of a continuation.

    Attributes:
        each: Natural-log probability of each of its tokens.
        greedy: Whether greedy decoding gives exactly these tokens.
        characters: How many.
    """

    each: tuple[float, ...]
    greedy: bool
    characters: int

    @property
    def total(self) -> float:
        """Natural-log probability of all of it."""
        return sum(self.each)

    @property
    def tokens(self) -> int:
        """How many."""
        return len(self.each)


class Answerer(Protocol):
    """A model that can be asked."""

    async def likelihood(self, asked: Continuation) -> Likelihood:
        """What it thinks of a continuation."""
        ...

    async def text(self, prompt: Sequence[int], max_tokens: int, stop: Sequence[str]) -> str:
        """What it generates, always the likeliest token, up to a stop string, the end or the limit."""
        ...


async def several(work: Sequence[Coroutine[Any, Any, T]], at_once: int, done: Callable[[int], None]) -> list[T]:
    """The results of coroutines, of which some run at a time; a fault of one ends the others.

    Args:
        work: What to run, in this order.
        at_once: How many are under way at a time.
        done: Told how many have ended; of those that end without waiting, as what a journal holds, once and first.
    """
    found: dict[int, T] = {}
    todo, told = iter(enumerate(work)), 0

    def tell() -> None:
        nonlocal told
        if told < len(found):
            told = len(found)
            done(told)

    async def take() -> None:
        for number, one in todo:  # one iterator for all: each takes the next
            found[number] = await one
            asyncio.get_running_loop().call_soon(tell)  # after the others' first steps

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(at_once, len(work))):
                group.create_task(take())
    except ExceptionGroup as many:
        raise many.exceptions[0] from None
    finally:
        for _, one in todo:
            one.close()
    tell()
    return [found[number] for number in range(len(work))]


class EngineAnswerer:
    """Asks an engine. Contexts that several questions share are computed once, as far as its prefix cache reaches."""

    def __init__(self, client: EngineClient, tokenizer: Tokenizer) -> None:
        self._client, self._tokenizer = client, tokenizer
        self._names = (f"task-{os.getpid()}-{n}" for n in itertools.count())

    async def likelihood(self, asked: Continuation) -> Likelihood:
        """See `Answerer`."""
        params = SamplingParams(max_tokens=0, temperature=0, prompt_logprobs=1, prompt_logprobs_from=len(asked.context))
        request = GenerateRequest(id=next(self._names), prompt=asked.context + asked.continuation, params=params)
        found: list[TokenLogprobs] = []
        async with aclosing(await self._client.submit(request)) as stream:
            async for event in stream:
                found += event.prompt_logprobs
                if event.ending is not None and event.ending.reason != "length":
                    raise AnswerError(event.ending.detail or "the engine ended a question early")
        assert len(found) == len(asked.continuation)
        greedy = all(entry.chosen >= entry.top[0][1] for entry in found)
        return Likelihood(tuple(entry.chosen for entry in found), greedy, asked.characters)

    async def text(self, prompt: Sequence[int], max_tokens: int, stop: Sequence[str]) -> str:
        """See `Answerer`."""
        params = SamplingParams(max_tokens=max_tokens, temperature=0)
        request = GenerateRequest(id=next(self._names), prompt=tuple(prompt), params=params)
        text, made = TextStream(self._tokenizer, stop, after=tuple(prompt)), ""
        async with aclosing(await self._client.submit(request)) as stream:
            async for event in stream:
                if event.token is not None:
                    made += text.push(event.token)
                if text.stopped is not None:
                    return made
                if event.ending is not None and event.ending.reason not in ("stop", "length"):
                    raise AnswerError(event.ending.detail or "the engine ended a question early")
        return made + text.finish()


class JournalledAnswerer:
    """Asks another answerer what a journal does not hold, and keeps the answers there.

    Args:
        answerer: Who is asked.
        journal: Of answers of this model, named by `NAMES`: a hash of the tokens and whatever else was asked.
    """

    NAMES = ("asked",)

    def __init__(self, answerer: Answerer, journal: Journal) -> None:
        self._answerer, self._journal = answerer, journal

    async def likelihood(self, asked: Continuation) -> Likelihood:
        """See `Answerer`."""
        name = digest([asked.context, asked.continuation])
        if (line := self._journal.find(name)) is None:
            found = await self._answerer.likelihood(asked)
            line = self._journal.add({"asked": name, "each": found.each, "greedy": found.greedy})
        return Likelihood(tuple(line["each"]), line["greedy"], asked.characters)

    async def text(self, prompt: Sequence[int], max_tokens: int, stop: Sequence[str]) -> str:
        """See `Answerer`."""
        name = digest([prompt, max_tokens, stop])
        if (line := self._journal.find(name)) is None:
            said = await self._answerer.text(prompt, max_tokens, stop)
            line = self._journal.add({"asked": name, "text": said})
        return str(line["text"])

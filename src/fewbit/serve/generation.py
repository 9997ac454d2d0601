"""What both protocols do: submit prompts, turn tokens into text as they come, end at a stop string.

`start` submits all jobs of a request (errors are raised before any answer begins), `pieces` and `collect` read them.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from fewbit.engine.types import Ending, Event, GenerateRequest, OverloadedError, SamplingParams, TokenLogprobs
from fewbit.errors import FewbitError, RequestError
from fewbit.serve.exchange import RequestTimeoutError, current
from fewbit.serve.metrics import ModelMetrics, Progress
from fewbit.serve.problems import GenerationError
from fewbit.text import TextStream, Tokenizer

if TYPE_CHECKING:
    from fewbit.engine.client import EngineClient, Stream

_ENTRY_BYTES = 64  # of a token and its log-probability in an answer
_ENDING_S = 2.0  # how long the ending of a request that was cut at a stop string is waited for


@dataclass(frozen=True)
class Job:
    """One prompt to continue, and how its text is cut."""

    prompt: tuple[int, ...]
    params: SamplingParams
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    continues: bool = False  # whether the text goes on with the prompt's, or is one of its own (an answer in a chat)
    visible: frozenset[int] = frozenset()  # special tokens that are text all the same
    priority: int = 0
    salt: str = ""

    def size_bytes(self, tokens: int) -> int:
        """About how long an answer is that tells of so many tokens."""
        told = max(self.params.logprobs or 0, self.params.prompt_logprobs or 0)
        return _ENTRY_BYTES * tokens * (1 + told)


@dataclass(frozen=True)
class Finish:
    """How a text ended, and its token counts."""

    reason: Literal["stop", "length"]
    stop_reason: str | int | None  # the stop string or stop token; None for the end of the text or the limit
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Piece:
    """What one event brought: text that may be sent (perhaps none yet), a token, the end."""

    text: str
    token: int | None = None
    logprobs: TokenLogprobs | None = None
    finish: Finish | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # of the prompt's tokens from the second on, a part of them


@dataclass
class Result:
    """A whole text."""

    finish: Finish
    text: str = ""
    ids: list[int] = field(default_factory=list)
    tokens: list[tuple[int, TokenLogprobs]] = field(default_factory=list)  # only where log-probabilities were asked for
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # from the prompt's second token on


class Running:
    """One submitted job."""

    def __init__(
        self, client: EngineClient, tokenizer: Tokenizer, job: Job, stream: Stream, progress: Progress
    ) -> None:
        self._client, self._tokenizer, self._job, self._stream = client, tokenizer, job, stream
        self._progress, self._exchange = progress, current()

    def abort(self) -> None:
        """End it; whoever reads its pieces gets an OverloadedError."""
        self._client.abort(self._stream.id)

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The pieces until the end. Leaving early aborts the request.

        Raises:
            RequestError: What it asks for turned out to be impossible.
            GenerationError: The engine failed on this request.
            OverloadedError: The engine is shutting down.
            EngineDownError: The engine is gone.
            RequestTimeoutError: The request's time is up.
        """
        job, params = self._job, self._job.params
        after = job.prompt if job.continues else ()
        text = TextStream(
            self._tokenizer, job.stop, job.include_stop, job.skip_special_tokens, params.min_tokens, after, job.visible
        )
        count = 0
        try:
            async with aclosing(self._stream):
                while (event := await self._next()) is not None:
                    new, ending = "", event.ending
                    if event.token is not None:
                        count += 1
                        self._progress.token()
                        self._exchange.token()
                        new = text.push(event.token)
                    finish = None
                    if ending is None and text.stopped is not None:
                        ending = await self._cut()
                    elif ending is not None and text.stopped is None:
                        new += self._last_text(text, ending)
                    if ending is not None:
                        finish = self._finish(text.stopped, ending, count)
                        self._progress.end(finish.reason, finish.prompt_tokens, finish.output_tokens)
                        self._exchange.completed(finish.prompt_tokens, finish.output_tokens, finish.cached_tokens)
                    yield Piece(new, event.token, event.logprobs, finish, event.prompt_logprobs)
                    if finish is not None:
                        return
            raise GenerationError("the engine ended the request without saying why")
        except RequestTimeoutError:
            self._progress.close("timed_out")
            raise
        except (GenerationError, FewbitError):
            self._progress.close("failed")
            raise
        finally:
            self._progress.close()

    async def _next(self) -> Event | None:
        """The next event; None: there is no more.

        Raises:
            RequestTimeoutError: It does not come in time.
        """
        if self._exchange.deadline is None:
            return await anext(self._stream, None)
        async with self._exchange.in_time():
            return await anext(self._stream, None)

    def _last_text(self, text: TextStream, ending: Ending) -> str:
        """The text held back, and the stop token's own where it was asked for."""
        new = ""
        if self._job.include_stop and ending.stop_token in self._job.params.stop_token_ids:
            new = text.push(ending.stop_token)
        return new + text.finish()

    async def _cut(self) -> Ending:
        """A stop string is complete: abort, and let the engine say what the prefix cache saved."""
        self.abort()
        try:
            async with asyncio.timeout(_ENDING_S):
                async for event in self._stream:
                    if event.ending is not None:
                        return event.ending
        except TimeoutError:
            pass
        return Ending("abort", prompt_tokens=len(self._job.prompt))

    def _finish(self, stopped: str | None, ending: Ending, count: int) -> Finish:
        prompt, cached = len(self._job.prompt), ending.cached_tokens
        if stopped is not None:
            return Finish("stop", stopped, prompt, count, cached)
        if ending.reason == "error" and ending.impossible:
            raise RequestError(ending.detail)
        if ending.reason == "error":
            self._client.health()  # raises where it is not this request that failed, but the engine that is gone
            raise GenerationError(ending.detail or "the engine failed on this request")
        if ending.reason == "abort":
            raise OverloadedError(ending.detail or "the request was ended because the engine is shutting down")
        named = ending.stop_token in self._job.params.stop_token_ids
        return Finish(ending.reason, ending.stop_token if named else None, prompt, ending.output_tokens, cached)


async def start(
    client: EngineClient, tokenizer: Tokenizer, metrics: ModelMetrics, jobs: Sequence[Job]
) -> list[Running]:
    """Submit all jobs, or none.

    Raises:
        RequestError: There are more than may ever wait, or the engine refuses one of them, and says why.
        OverloadedError: Too many requests are waiting.
        EngineDownError: There is no engine.
        RequestTimeoutError: The request's time is up.
    """
    client.health()
    if len(jobs) > (most := client.info.max_queued):
        raise RequestError(f"{len(jobs)} texts are asked for, and at most {most} may wait (max_queued): ask for fewer")
    progress = [metrics.begin() for _ in jobs]
    # all at once: the engine answers between its steps
    submits = [asyncio.create_task(client.submit(_request(job))) for job in jobs]
    try:
        async with current().in_time():
            streams = await asyncio.gather(*submits)
    except BaseException:
        for submit in submits:
            submit.cancel()
        for found in await asyncio.gather(*submits, return_exceptions=True):
            if not isinstance(found, BaseException):
                found.close()
        raise
    return [Running(client, tokenizer, *each) for each in zip(jobs, streams, progress, strict=True)]


def _request(job: Job) -> GenerateRequest:
    return GenerateRequest(
        id=uuid.uuid4().hex, prompt=job.prompt, params=job.params, priority=job.priority, salt=job.salt
    )


async def pieces(running: Sequence[Running]) -> AsyncGenerator[tuple[int, Piece], None]:
    """The pieces of all jobs as they come, each with its job's index. Leaving early aborts all of them."""
    if len(running) == 1:
        async with aclosing(running[0].pieces()) as only:
            async for piece in only:
                yield 0, piece
        return
    queue: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue(maxsize=2 * len(running))

    async def pump(index: int) -> None:
        try:
            async with aclosing(running[index].pieces()) as own:
                async for piece in own:
                    await queue.put((index, piece))
        except Exception as e:  # house: it is raised below, where all are read
            await queue.put((index, e))

    tasks = [asyncio.create_task(pump(i)) for i in range(len(running))]
    try:
        left = len(tasks)
        while left:
            index, got = await queue.get()
            if isinstance(got, Exception):
                raise got
            left -= got.finish is not None
            yield index, got
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def collect(running: Sequence[Running]) -> list[Result]:
    """The whole texts, in the order of the jobs."""
    texts: list[list[str]] = [[] for _ in running]
    found: list[Result | None] = [None for _ in running]
    ids: list[list[int]] = [[] for _ in running]
    tokens: list[list[tuple[int, TokenLogprobs]]] = [[] for _ in running]
    prompts: list[list[TokenLogprobs]] = [[] for _ in running]
    async with aclosing(pieces(running)) as all_pieces:
        async for i, piece in all_pieces:
            texts[i].append(piece.text)
            prompts[i] += piece.prompt_logprobs
            if piece.token is not None:
                ids[i].append(piece.token)
                if piece.logprobs is not None:
                    tokens[i].append((piece.token, piece.logprobs))
            if piece.finish is not None:
                found[i] = Result(piece.finish, "".join(texts[i]), ids[i], tokens[i], prompts[i])
    return [result for result in found if result is not None]

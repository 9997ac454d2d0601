"""Generating in this process, texts in and texts out: `Engine`. What a request may say is what HTTP lets it say."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator, Sequence
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from fewbit.checkpoint import locate, text_folder
from fewbit.engine.client import InProcessClient
from fewbit.engine.config import EngineOptions
from fewbit.engine.engine import open_engine
from fewbit.engine.types import EngineDownError, Stats, TokenLogprobs
from fewbit.errors import RecipeError, RequestError, nearest_name
from fewbit.ops.device import device_named, gpu_count
from fewbit.serve.generation import Job, Piece, collect
from fewbit.serve.metrics import Metrics
from fewbit.serve.openai import Chat, ChatRequest, Completion, CompletionRequest, jobs_of, parsed
from fewbit.serve.service import Service
from fewbit.text import Tokenizer

T = TypeVar("T")
Prompt = str | Sequence[int] | Sequence[dict[str, Any]]
"""A text to continue, its token ids, or the messages of a chat to answer."""

_OF_HTTP = frozenset(
    (
        *("model", "stream", "stream_options", "echo", "tools", "tool_choice", "parallel_tool_calls", "request_id"),
        *("return_token_ids", "return_tokens_as_token_ids"),
    )
)


@dataclasses.dataclass(frozen=True)
class Usage:
    """Token counts of one answer."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  # of the prompt, found in the prefix cache


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the model made of one prompt.

    Attributes:
        text: Up to a stop string, which is not part of it.
        token_ids: Of the generated tokens.
        logprobs: One a token, if `logprobs` was asked for.
        prompt_logprobs: One a token of the prompt from the second on, if they were asked for.
        finish_reason: "stop" or "length".
        stop_reason: The stop string or stop token; None for the end of the text or the limit.
        usage: Token counts.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...]
    finish_reason: str
    stop_reason: str | int | None
    usage: Usage


class Engine:
    """A model, ready to generate in this process.

        with fewbit.Engine("models/storyteller") as engine:
            for answer in engine.generate(["Once upon a time", "The old king"], max_tokens=40):
                print(answer.text)

    Everything may be called from any thread, also where an event loop runs (a notebook).
    """

    def __init__(self, model: str | Path, *, device: str | None = None, **options: Any) -> None:
        """Open a model.

        Args:
            model: Its directory, or a Hub id.
            device: ``cpu`` or ``cuda:N``; None: a GPU if there is one.
            **options: Of `fewbit.engine.config.EngineOptions`: ``max_batch``, ``max_model_len``, ``kv_bytes``, ...

        Raises:
            FewbitError: The model cannot be opened, an option is wrong or unknown, or it does not fit.
        """
        known = {field.name for field in dataclasses.fields(EngineOptions)}
        for name in options:
            if name not in known:
                raise RecipeError(f"unknown option '{name}': {nearest_name(name, known)}")
        where = str(device_named(device or ("cuda:0" if gpu_count() else "cpu")))
        settings = EngineOptions(device=where, **options)
        self._room = asyncio.Semaphore(max(1, settings.max_queued // 2))  # who finds none waits, and is not refused
        path = Path(locate(str(model)))
        self.tokenizer = Tokenizer.load(text_folder(path))
        client = InProcessClient(open_engine(path, settings))
        name = path.resolve().name
        self._service = Service(client, self.tokenizer, name, Metrics().of(name))
        # A loop of its own: the caller may have none, or one that is running.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fewbit-generate", daemon=True)
        self._thread.start()

    def generate(self, prompts: Prompt | Sequence[Prompt], **fields: Any) -> list[Answer]:
        """The answers to one prompt or many, in their order; with ``n`` those to one prompt stand together.

        Many prompts are computed together, as many at a time as `max_batch` says.

        Args:
            prompts: A `Prompt` or several. A list of numbers is one prompt, and so is a list of messages.
            **fields: Of ``/v1/completions``, and for messages of ``/v1/chat/completions``: ``max_tokens``,
                ``temperature``, ``top_k``, ``stop``, ``logprobs``, ... with the same defaults (docs/serving.md).

        Raises:
            RequestError: A prompt or a field is wrong; nothing was computed.
            GenerationError: The engine could not go on.
            EngineDownError: The engine is closed.
        """
        return self._wait(self._generate(_several(prompts), fields))

    def stream(self, prompt: Prompt, **fields: Any) -> Pieces:
        """One answer in pieces, for ``for`` or ``async for``; leaving the loop ends the request.

        Args:
            prompt: One.
            **fields: See `generate`.
        """
        return Pieces(self, prompt, fields)

    def stats(self) -> Stats:
        """What the engine is doing and has done."""
        return self._wait(self._service.client.stats())

    def close(self) -> None:
        """End what runs and let the model go."""
        if not self._loop.is_closed():
            self._wait(self._service.client.close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # ---- on the engine's event loop; _pieces on the caller's ----

    async def _jobs(self, prompt: Prompt, fields: dict[str, Any]) -> list[Job]:
        for name in _OF_HTTP & fields.keys():
            raise RequestError(f"'{name}' shapes an HTTP answer and means nothing here, leave it out", name)
        if not isinstance(prompt, str) and prompt and isinstance(prompt[0], dict):
            chat = parsed(ChatRequest, {"messages": list(prompt), **fields})
            return await jobs_of(Chat(self._service, chat, trusted=True))
        given = prompt if isinstance(prompt, str) else list(prompt)
        return await jobs_of(Completion(self._service, parsed(CompletionRequest, {"prompt": given, **fields})))

    async def _pieces(self, prompt: Prompt, fields: dict[str, Any]) -> AsyncGenerator[Piece, None]:
        """See `stream`; on the running event loop."""
        jobs = await self._jobs(prompt, fields)
        if len(jobs) > 1:
            raise RequestError(f"a stream is of one answer, so n must be 1, got {len(jobs)}", "n")
        (running,) = await self._service.start(jobs)
        async with aclosing(running.pieces()) as all_pieces:
            async for piece in all_pieces:
                yield piece

    async def _generate(self, prompts: Sequence[Prompt], fields: dict[str, Any]) -> list[Answer]:
        jobs = [job for prompt in prompts for job in await self._jobs(prompt, fields)]
        tasks = [asyncio.create_task(self._answer(job)) for job in jobs]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(self, job: Job) -> Answer:
        async with self._room:
            (made,) = await collect(await self._service.start([job]))
        finish = made.finish
        usage = Usage(finish.prompt_tokens, finish.output_tokens, finish.cached_tokens)
        found = tuple(made.ids), tuple(logprobs for _, logprobs in made.tokens), tuple(made.prompt_logprobs)
        return Answer(made.text, *found, finish.reason, finish.stop_reason, usage)

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work` on the engine's own event loop; interrupted, it is cancelled."""
        if self._loop.is_closed():
            work.close()
            raise EngineDownError("this engine is closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        finally:
            future.cancel()


class Pieces:
    """An answer as it is made: `fewbit.serve.generation.Piece`, each with its text, the last with its finish.

    Every loop over it asks anew.
    """

    def __init__(self, engine: Engine, prompt: Prompt, fields: dict[str, Any]) -> None:
        self._engine, self._prompt, self._fields = engine, prompt, fields

    def __aiter__(self) -> AsyncGenerator[Piece, None]:
        return self._engine._pieces(self._prompt, self._fields)

    def __iter__(self) -> Iterator[Piece]:
        pieces, engine = aiter(self), self._engine

        async def following() -> Piece | None:
            return await anext(pieces, None)

        try:
            while (piece := engine._wait(following())) is not None:
                yield piece
        finally:
            engine._wait(pieces.aclose())


def _several(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    one = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], (int, dict)))
    return [prompts] if one else prompts  # type: ignore[list-item,return-value]

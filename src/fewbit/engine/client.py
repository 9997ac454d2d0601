"""Talking to an engine: submit a request, get a stream of events. No torch.

    stream = await client.submit(request)      # RequestError, OverloadedError or EngineDownError instead of a stream
    async for event in stream: ...             # tokens, then exactly one ending, always

Closing a stream, cancelling whoever waits for it, or just dropping it, aborts the request and frees its blocks.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol
from weakref import WeakValueDictionary

from fewbit.engine.loop import EngineLoop
from fewbit.engine.types import EngineDownError, EngineInfo, Event, GenerateRequest, Stats
from fewbit.errors import FewbitError, RequestError

if TYPE_CHECKING:
    from fewbit.engine.engine import Engine


class Stream:
    """The events of one request, for one reader. The last one has the ending."""

    def __init__(self, request_id: str, abort: Callable[[str], None]) -> None:
        self.id = request_id
        self.loop = asyncio.get_running_loop()
        self._abort = abort
        self._queue: asyncio.Queue[Event] = asyncio.Queue()  # bounded by the request's own max_tokens
        self._open = True

    def push(self, event: Event) -> None:
        """One more event; on the stream's own event loop. Nothing comes after an ending."""
        self._queue.put_nowait(event)

    def refused(self) -> None:
        """There never was such a request: there is nothing to abort."""
        self._open = False

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Event:
        if not self._open:
            raise StopAsyncIteration
        try:
            event = await self._queue.get()
        except asyncio.CancelledError:
            self.close()
            raise
        if event.ending is not None:
            self._open = False
        return event

    def close(self) -> None:
        """Abort the request unless it has ended."""
        if self._open:
            self._open = False
            self._abort(self.id)

    async def aclose(self) -> None:
        """The same, for ``contextlib.aclosing``."""
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_open", False):
            self.close()


class EngineClient(Protocol):
    """What the servers and the benchmarks see of an engine."""

    @property
    def info(self) -> EngineInfo:
        """What does not change."""
        ...

    async def submit(self, request: GenerateRequest) -> Stream:
        """Queue a request.

        Raises:
            RequestError: it cannot be honoured; `param` names the field.
            OverloadedError: too many are waiting, or the engine is shutting down.
            EngineDownError: there is no engine that answers.
        """
        ...

    def abort(self, request_id: str) -> None:
        """End a request; its stream gets the ending. Does not wait."""
        ...

    async def stats(self) -> Stats:
        """What the engine is doing.

        Raises:
            EngineDownError: it does not answer.
        """
        ...

    def health(self) -> None:
        """Return if the engine is alive, at once.

        Raises:
            EngineDownError: it is dead, or has given no sign of life for some seconds.
        """
        ...

    async def close(self) -> None:
        """Abort what is running and let go."""
        ...


class InProcessClient:
    """An engine in a thread of this process."""

    def __init__(self, engine: Engine) -> None:
        self._streams: WeakValueDictionary[str, Stream] = WeakValueDictionary()
        self._loop = EngineLoop(engine, self._emit)

    @property
    def info(self) -> EngineInfo:
        """See `EngineClient`."""
        return self._loop.info

    async def submit(self, request: GenerateRequest) -> Stream:
        """See `EngineClient`."""
        check_new(request.id, self._streams)
        stream = Stream(request.id, self.abort)
        self._streams[request.id] = stream
        answer: asyncio.Future[FewbitError | None] = stream.loop.create_future()

        def settle(refusal: FewbitError | None) -> None:
            if not answer.done():
                answer.set_result(refusal)

        def reply(refusal: FewbitError | None) -> None:  # on the engine's thread
            with contextlib.suppress(RuntimeError):  # the event loop is gone, and with it whoever asked
                answer.get_loop().call_soon_threadsafe(settle, refusal)

        self._loop.submit(request, reply)
        refusal = await answer
        if refusal is not None:
            stream.refused()
            raise refusal
        return stream

    def abort(self, request_id: str) -> None:
        """See `EngineClient`."""
        self._loop.abort(request_id)

    async def stats(self) -> Stats:
        """See `EngineClient`."""
        self.health()
        return self._loop.stats()

    def health(self) -> None:
        """See `EngineClient`."""
        if self._loop.broken is not None:
            raise EngineDownError(self._loop.broken)

    async def close(self) -> None:
        """See `EngineClient`."""
        await asyncio.to_thread(self._loop.stop)

    def _emit(self, events: list[Event]) -> None:
        """On the engine's thread: one wake-up a step for each event loop that has readers."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Stream, Event]]] = {}
        for event in events:
            stream = self._streams.get(event.id)
            if stream is not None:
                by_loop.setdefault(stream.loop, []).append((stream, event))
        for loop, pairs in by_loop.items():
            try:
                loop.call_soon_threadsafe(_push, pairs)
            except RuntimeError:  # that event loop was closed with its readers
                for stream, _ in pairs:
                    self._loop.abort(stream.id)


def _push(pairs: list[tuple[Stream, Event]]) -> None:
    for stream, event in pairs:
        stream.push(event)


def check_new(request_id: str, streams: WeakValueDictionary[str, Stream]) -> None:
    """Two streams of one name could not be told apart."""
    if request_id in streams:
        raise RequestError(f"a request with the id '{request_id}' is still running; choose another id", "id")

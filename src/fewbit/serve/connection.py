"""Answers that end when their client leaves: a client that is gone frees its blocks, streaming or not."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

SILENCE_S = 15.0  # a stream that has nothing to say for so long says a comment
PING = b": still here\n\n"
SLOW_S = 60.0  # a client that takes nothing for so long is dropped


async def while_connected(receive: Receive, work: Coroutine[None, None, T]) -> T:
    """The result of `work`; cancels it when the client leaves.

    Raises:
        ClientDisconnect: Nobody waits for the result any more.
    """
    task, gone = asyncio.create_task(work), asyncio.create_task(_until_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for t in (task, gone):
            t.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def body_of(request: Request, work: Coroutine[None, None, T]) -> T:
    """`while_connected` for a request whose body has been read."""
    return await while_connected(request.receive, work)


class EventStream(Response):
    """Server-sent events from a generator of whole `data:` blocks.

    The generator is closed in every case: at its end, when the client leaves, takes nothing, or the server stops.
    """

    def __init__(
        self, events: AsyncGenerator[bytes, None], slow_s: float = SLOW_S, silence_s: float | None = None
    ) -> None:
        self._events, self._slow_s = events, slow_s
        self._silence_s = SILENCE_S if silence_s is None else silence_s
        self._spoke_s = 0.0  # when a block was sent last, on the event loop's clock
        self.status_code = 200
        self.background = None
        self.media_type = "text/event-stream"
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything, or as much as the client takes."""
        with contextlib.suppress(ClientDisconnect, TimeoutError, OSError):
            await while_connected(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        clock = asyncio.get_running_loop().time
        async with contextlib.aclosing(self._events):
            self._spoke_s = clock()
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            pinging = asyncio.create_task(self._ping(send))
            try:
                async for block in self._events:
                    self._spoke_s = clock()
                    # send waits while the connection's buffer is full, so a slow reader holds at most that much
                    async with asyncio.timeout(self._slow_s):
                        await send({"type": "http.response.body", "body": block, "more_body": True})
                pinging.cancel()
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            finally:
                pinging.cancel()

    async def _ping(self, send: Send) -> None:
        """A comment after each long silence, so that nobody between here and the client takes the stream for dead."""
        clock = asyncio.get_running_loop().time
        with contextlib.suppress(OSError):
            while True:
                await asyncio.sleep(self._spoke_s + self._silence_s - clock())
                if clock() >= self._spoke_s + self._silence_s:
                    self._spoke_s = clock()
                    await send({"type": "http.response.body", "body": PING, "more_body": True})

"""Serving over a socket until told to stop, and stopping well.

SIGTERM: /health answers 503 at once, new work is refused with 503, what runs may finish for `drain_s` seconds, then
the process ends with 0. Ctrl-C does the same and ends in KeyboardInterrupt. A second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
from collections.abc import Callable, Coroutine
from types import FrameType

import uvicorn
from fastapi import FastAPI

from fewbit.errors import RecipeError
from fewbit.serve.models import Models
from fewbit.serve.transport import MAX_CONNECTIONS, SWEEP_S, HTTPConnection, raise_file_limit, sweep

log = logging.getLogger(__name__)

_POLL_S = 0.05
_TICKS_A_SWEEP = round(SWEEP_S * 10)  # uvicorn ticks ten times a second
_LAST_BYTES_S = 2  # for answers that are complete but not yet sent


def bind(host: str = "127.0.0.1", port: int = 8000, flag: str = "--port") -> socket.socket:
    """A listening socket; port 0: any free one. `flag` chooses the port.

    Raises:
        RecipeError: The address is taken or not this machine's.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as e:
        why = "it is in use" if getattr(e, "errno", None) == errno.EADDRINUSE else e
        raise RecipeError(f"cannot listen on {host} port {port} ({why}); choose another with --host or {flag}") from e
    # Connections inherit it; asyncio sets it only on those that say their protocol. Without it the second small packet
    # of an answer waits for the client's acknowledgement, which a kernel may hold back for 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


async def serve_app(
    app: FastAPI,
    listener: socket.socket,
    *,
    drain_s: float = 30.0,
    on_ready: Callable[[str], None] | None = None,
    beside: Callable[[str], Coroutine[None, None, None]] | None = None,
) -> None:
    """Serve `app` on the running event loop until a signal comes.

    Args:
        app: From `create_app`.
        listener: From `bind`; closed at the end.
        drain_s: How long requests that run may go on after the first signal.
        on_ready: Told the server's URL once it answers.
        beside: Runs, given the URL, while the server does; if it fails, the server ends with its error.

    Raises:
        KeyboardInterrupt: It was stopped with Ctrl-C.
        Exception: Whatever `beside` raised.
    """
    config = uvicorn.Config(
        app,
        http=HTTPConnection,
        limit_concurrency=min(MAX_CONNECTIONS, raise_file_limit() // 2),
        log_config=None,  # its lines are ours
        log_level="warning",
        access_log=False,
        lifespan="off",
        server_header=False,
        ws="none",
        timeout_keep_alive=5,
        timeout_graceful_shutdown=_LAST_BYTES_S,
    )
    url = _url(listener)
    server = _Server(config, app.state.models, drain_s, on_ready, url)
    task = asyncio.create_task(_beside(beside(url), server)) if beside is not None else None
    try:
        await server.serve(sockets=[listener])
    finally:
        listener.close()
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
    if server.interrupted:
        raise KeyboardInterrupt
    if task is not None and not task.cancelled():
        task.result()


async def _beside(work: Coroutine[None, None, None], server: uvicorn.Server) -> None:
    try:
        await work
    except Exception:
        server.should_exit = True
        raise


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """uvicorn closes its socket at the first signal; this one goes on answering, with refusals, while it drains."""

    def __init__(
        self,
        config: uvicorn.Config,
        models: Models,
        drain_s: float,
        on_ready: Callable[[str], None] | None,
        url: str,
    ) -> None:
        super().__init__(config)
        self._models, self._drain_s, self._on_ready, self._url = models, drain_s, on_ready, url
        self._drain: asyncio.Task[None] | None = None
        self._signals = 0
        self.interrupted = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        await super().startup(sockets)
        if self._on_ready is not None and not self.should_exit:
            self._on_ready(self._url)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal, on the main thread. Not kept for uvicorn to raise again: a drained server ends with 0."""
        self.interrupted = self.interrupted or sig == signal.SIGINT
        self._signals += 1
        if self._signals > 1:
            self.should_exit = self.force_exit = True
        self._models.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second; True ends the main loop."""
        if self._models.draining and self._drain is None:
            self._drain = asyncio.create_task(self._finish())
        if counter % _TICKS_A_SWEEP == 0:
            sweep(self.server_state.connections)
        return await super().on_tick(counter)

    async def _finish(self) -> None:
        try:
            async with asyncio.timeout(self._drain_s):
                while self._models.in_flight:
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            log.warning("%d requests had not finished after %g s and are ended", self._models.in_flight, self._drain_s)
            self._models.end_all()
        self.should_exit = True

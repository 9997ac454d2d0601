"""Serving over a socket until told to stop, and stopping well.

SIGTERM: /health answers 503 at once, new work is refused with 503, what runs may finish for `drain_s` seconds, then
the process ends with 0. Ctrl-C does the same and ends in KeyboardInterrupt. A second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from fewbit.errors import RecipeError
from fewbit.serve.service import Service

log = logging.getLogger(__name__)

_POLL_S = 0.05
_LAST_BYTES_S = 2  # for answers that are complete but not yet sent


def bind(host: str = "127.0.0.1", port: int = 8000) -> socket.socket:
    """A listening socket; port 0: any free one.

    Raises:
        RecipeError: The address is taken or not this machine's.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as e:
        raise RecipeError(f"cannot listen on {host} port {port} ({e}); choose another with --host or --port") from e


async def serve_app(
    app: FastAPI, listener: socket.socket, *, drain_s: float = 30.0, on_ready: Callable[[str], None] | None = None
) -> None:
    """Serve `app` on the running event loop until a signal comes.

    Args:
        app: From `create_app`.
        listener: From `bind`; closed at the end.
        drain_s: How long requests that run may go on after the first signal.
        on_ready: Told the server's URL once it answers.

    Raises:
        KeyboardInterrupt: It was stopped with Ctrl-C.
    """
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        server_header=False,
        ws="none",
        timeout_keep_alive=5,
        timeout_graceful_shutdown=_LAST_BYTES_S,
    )
    server = _Server(config, app.state.service, drain_s, on_ready, _url(listener))
    try:
        await server.serve(sockets=[listener])
    finally:
        listener.close()
    if server.interrupted:
        raise KeyboardInterrupt


def serve(
    app: FastAPI,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    drain_s: float = 30.0,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve `app`, whose engine client belongs to no event loop yet, until a signal comes; see `serve_app`."""
    asyncio.run(serve_app(app, bind(host, port), drain_s=drain_s, on_ready=on_ready))


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """uvicorn closes its socket at the first signal; this one goes on answering, with refusals, while it drains."""

    def __init__(
        self,
        config: uvicorn.Config,
        service: Service,
        drain_s: float,
        on_ready: Callable[[str], None] | None,
        url: str,
    ) -> None:
        super().__init__(config)
        self._service, self._drain_s, self._on_ready, self._url = service, drain_s, on_ready, url
        self._drain: asyncio.Task[None] | None = None
        self.interrupted = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        await super().startup(sockets)
        if self._on_ready is not None and not self.should_exit:
            self._on_ready(self._url)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal, on the main thread. Not kept for uvicorn to raise again: a drained server ends with 0."""
        self.interrupted = self.interrupted or sig == signal.SIGINT
        if self._service.draining:
            self.should_exit = self.force_exit = True
        self._service.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second; True ends the main loop."""
        if self._service.draining and self._drain is None:
            self._drain = asyncio.create_task(self._finish())
        return await super().on_tick(counter)

    async def _finish(self) -> None:
        try:
            async with asyncio.timeout(self._drain_s):
                while self._service.in_flight:
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            log.warning("%d requests had not finished after %g s and are ended", self._service.in_flight, self._drain_s)
            self._service.end_all()
        self.should_exit = True

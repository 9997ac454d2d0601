"""Routes for whoever runs the server, on a socket of their own: models, draining, the log, running requests.

They never answer on the port that clients use. ``--control PATH`` listens on a unix socket that only this user may
open, ``--control PORT`` on 127.0.0.1.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from fewbit.errors import RecipeError, RequestError, nearest_name
from fewbit.serve import logs
from fewbit.serve.app import Manner, bare_app
from fewbit.serve.body import read_object, shown
from fewbit.serve.models import Models
from fewbit.serve.problems import json_response


@asynccontextmanager
async def answering(models: Models, listener: socket.socket, manner: Manner) -> AsyncIterator[None]:
    """The control routes are answered on `listener` until the block is left."""
    app = bare_app(models, manner)
    app.include_router(routes(models))
    server = _Beside(uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", server_header=False))
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield
    finally:
        server.should_exit = True
        await asyncio.wait([task])


class _Beside(uvicorn.Server):
    """Signals are the main server's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def routes(models: Models) -> APIRouter:
    """The router of the control socket."""
    router = APIRouter()

    @router.get("/control/status")
    async def status() -> Response:
        return json_response(_status(models))

    @router.post("/control/models/{model}/load")
    async def load(model: str) -> Response:
        await models.load(model)
        return json_response(_status(models))

    @router.post("/control/models/{model}/unload")
    async def unload(model: str) -> Response:
        await models.unload(model)
        return json_response(_status(models))

    @router.post("/control/drain")
    async def drain() -> Response:
        models.draining = True
        return json_response(_status(models))

    @router.post("/control/abort")
    async def abort() -> Response:
        ended = models.in_flight - 1  # less this one
        models.end_all()
        return json_response({"ended": ended} | _status(models))

    @router.post("/control/log")
    async def log(request: Request) -> Response:
        wanted = (await read_object(request)).get("level")
        if wanted not in logs.LEVELS:
            raise RequestError(f"level '{shown(wanted)}': {nearest_name(str(wanted)[:60], logs.LEVELS)}", "level")
        logs.set_level(wanted)
        return json_response(_status(models))

    return router


def _status(models: Models) -> dict[str, Any]:
    return {
        "draining": models.draining,
        "in_flight": models.in_flight,
        "log_level": logs.level(),
        "models": [state._asdict() for state in models.states()],
    }


def bind_control(where: str) -> socket.socket:
    """A listening socket.

    Args:
        where: A port of 127.0.0.1, or the path of a unix socket that is made.

    Raises:
        RecipeError: It is taken, or cannot be made.
    """
    try:
        if where.isdecimal():
            return socket.create_server(("127.0.0.1", int(where)))
        path = Path(where)
        _remove_stale(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mask = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(mask)
        listener.listen(64)
    except (OSError, OverflowError) as error:
        raise RecipeError(f"cannot listen on {where} ({error}); choose another with --control") from None
    return listener


def _remove_stale(path: Path) -> None:
    """Remove the socket of a server that is gone. One that answers, or a file of another kind, stays."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()

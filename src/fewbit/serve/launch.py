"""From a model directory to a server that answers: an engine process, a client of it, the application."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path

from fewbit.checkpoint import text_folder
from fewbit.engine.config import EngineOptions
from fewbit.engine.spawn import EngineProcess, spawn
from fewbit.serve.app import create_app
from fewbit.serve.run import bind, serve_app
from fewbit.text import Tokenizer


def serve_model(
    model: Path,
    options: EngineOptions,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    drain_s: float = 30.0,
    progress: Callable[[str], None] = lambda text: None,
) -> None:
    """Serve a model until a signal comes.

    Args:
        model: its directory.
        options: of the engine.
        host: address to listen on.
        port: port to listen on; 0: any free one.
        name: what requests call the model; None: the directory's name.
        drain_s: how long requests that run may go on after the first signal.
        progress: told in words what is going on.

    Raises:
        FewbitError: the model cannot be opened or the address is taken; nothing is left running.
        KeyboardInterrupt: it was stopped with Ctrl-C.
    """
    tokenizer = Tokenizer.load(text_folder(model))
    listener = bind(host, port)  # before the weights are read: a port that is taken should not cost a minute
    try:
        with spawn(model, options, progress=progress, drain_s=drain_s) as engine:
            asyncio.run(_serve(engine, tokenizer, name or model.resolve().name, listener, drain_s, progress))
    finally:
        listener.close()


async def _serve(
    engine: EngineProcess,
    tokenizer: Tokenizer,
    name: str,
    listener: socket.socket,
    drain_s: float,
    progress: Callable[[str], None],
) -> None:
    client = await engine.connect()
    try:
        app = create_app(client, tokenizer, name)
        await serve_app(
            app, listener, drain_s=drain_s, on_ready=lambda url: progress(f"serving {name} on {url} (Ctrl-C stops it)")
        )
    finally:
        await client.close()

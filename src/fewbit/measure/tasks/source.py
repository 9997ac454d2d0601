"""Who is asked: a model directory, opened in an engine of this process, or a server at a URL."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from fewbit.checkpoint import Checkpoint, locate, open_checkpoint, text_folder
from fewbit.engine.client import InProcessClient
from fewbit.engine.config import EngineOptions
from fewbit.engine.engine import open_engine
from fewbit.errors import RecipeError
from fewbit.measure.load.endpoint import client_of
from fewbit.measure.load.http import Client
from fewbit.measure.machine import versions
from fewbit.measure.runfolder import identity
from fewbit.measure.tasks.answer import Answerer, EngineAnswerer
from fewbit.measure.tasks.remote import HttpAnswerer, served
from fewbit.ops.device import device_named
from fewbit.text import Tokenizer
from fewbit.version import __version__

LENGTH = 8192
"""Tokens of a sequence that a directory is asked with where nothing is said, if the model takes as many. What free
memory would hold is no measure: a run that was stopped is to go on with the same prompts."""
PROBE = "Once upon a time, in the year 1984, a model was asked: 12 + 30 ="
QUEUED = 1 << 20
"""Requests that may wait in the engine: whoever asks limits itself."""


@dataclass(frozen=True)
class Source:
    """A model as a user names it.

    Attributes:
        model: A directory or Hub id, or the URL of a server that speaks OpenAI's API.
        device: For a directory: ``cpu``, ``cuda:N`` or ``auto``.
        max_batch: For a directory: sequences at a time; None: the engine decides.
        max_model_len: Most tokens of a sequence; None: what the server takes, or the model, of which at most `LENGTH`.
        tokenizer: For a URL: the directory of the served model, or at least its tokenizer.
        name: For a URL: the model's name there; None: the first that the server lists.
        api_key: For a URL: sent as a bearer token.
    """

    model: str
    device: str = "cpu"
    max_batch: int | None = None
    max_model_len: int | None = None
    tokenizer: str | None = None
    name: str | None = None
    api_key: str | None = None

    @property
    def remote(self) -> bool:
        """Whether it is a URL."""
        return is_url(self.model)


@dataclass(frozen=True)
class Known:
    """What is known of a source before anything is asked: the first fields of `Asked` after the answerer."""

    tokenizer: Tokenizer
    folder: Traversable
    length: int


@dataclass(frozen=True)
class Asked:
    """An open source.

    Attributes:
        answerer: Who answers.
        tokenizer: The model's.
        folder: Where it lies.
        length: Most tokens of a prompt and what is scored after it. One fewer than the model takes: servers generate
            a token after what they score, and every way of asking is to see the same prompts.
        key: Names the model and what runs it; what a journal holds was answered by a model of the same key.
    """

    answerer: Answerer
    tokenizer: Tokenizer
    folder: Traversable
    length: int
    key: Mapping[str, Any]


def is_url(model: str) -> bool:
    """Whether a model's name is the URL of a server: a scheme, or host:port where no such directory lies."""
    if "://" in model:
        return True
    host, _, port = model.partition("/")[0].rpartition(":")
    return bool(host) and port.isdigit() and not Path(model).exists()


@asynccontextmanager
async def opened(source: Source) -> AsyncIterator[Asked]:
    """Open a source while the block runs.

    Raises:
        FewbitError: The model cannot be opened, the server cannot be reached, or something needed was not given.
    """
    if source.remote:
        client = client_of(source.model, source.api_key)
        try:
            known, name = await _of_server(source, client)
            server = HttpAnswerer(client, name)
            said = await server.text(known.tokenizer.encode(PROBE), 8, ())
            # a server's name says nothing of its weights: the tokens that it is asked in and what it answers do
            mark = hashlib.sha256(repr((known.tokenizer.encode(PROBE), said)).encode()).hexdigest()[:16]
            where = f"{client.url.host}:{client.url.port}{client.url.prefix} {name} {mark}"
            yield Asked(
                server, known.tokenizer, known.folder, known.length, _key(where, known) | {"fewbit": __version__}
            )
        finally:
            await client.close()
        return
    checkpoint, known = _of_directory(source)
    options = EngineOptions(
        source.device, "exact", max_batch=source.max_batch, max_model_len=known.length + 1, max_queued=QUEUED
    )
    engine = InProcessClient(open_engine(checkpoint.path, options))
    try:
        key = _key(identity(checkpoint), known) | versions(device_named(source.device))
        yield Asked(EngineAnswerer(engine, known.tokenizer), known.tokenizer, known.folder, known.length, key)
    finally:
        await engine.close()


async def known(source: Source) -> Known:
    """What can be said of a source without loading its weights or asking it anything.

    Raises:
        FewbitError: As of `opened`.
    """
    if not source.remote:
        return _of_directory(source)[1]
    client = client_of(source.model, source.api_key)
    try:
        return (await _of_server(source, client))[0]
    finally:
        await client.close()


async def _of_server(source: Source, client: Client) -> tuple[Known, str]:
    """A server, and its model's name there."""
    if source.tokenizer is None:
        raise RecipeError(f"{source.model}: tasks are asked in tokens; give the model's directory: --tokenizer DIR")
    folder = text_folder(Path(locate(source.tokenizer)))
    tokenizer = Tokenizer.load(folder)
    name, length = await served(client, source.name)
    return Known(tokenizer, folder, _shorter(source, length) - 1), name


def _of_directory(source: Source) -> tuple[Checkpoint, Known]:
    path = Path(locate(source.model))
    folder = text_folder(path)
    checkpoint = open_checkpoint(path)
    length = source.max_model_len or min(checkpoint.spec.context, LENGTH)
    return checkpoint, Known(Tokenizer.load(folder), folder, length - 1)


def _key(model: str, known: Known) -> dict[str, Any]:
    return {"model": model, "max_model_len": known.length + 1}


def _shorter(source: Source, served_length: int | None) -> int:
    """Tokens of a sequence: what was asked for, if the server takes that many, else what it takes."""
    if source.max_model_len is None and served_length is None:
        raise RecipeError(f"{source.model} does not say how many tokens it takes; give --max-model-len N")
    if source.max_model_len is not None and served_length is not None and source.max_model_len > served_length:
        raise RecipeError(f"--max-model-len {source.max_model_len}: {source.model} takes {served_length} tokens")
    length = source.max_model_len or served_length
    assert length is not None
    return length

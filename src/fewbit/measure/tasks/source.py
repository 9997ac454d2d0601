"""Who is asked: a model directory, opened in an engine of this process, or a server at a URL."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path

from fewbit.checkpoint import locate, text_folder
from fewbit.engine.client import InProcessClient
from fewbit.engine.config import EngineOptions
from fewbit.engine.engine import open_engine
from fewbit.errors import RecipeError
from fewbit.measure.load.endpoint import client_of
from fewbit.measure.tasks.answer import Answerer, EngineAnswerer
from fewbit.measure.tasks.remote import HttpAnswerer, served
from fewbit.text import Tokenizer

QUEUED = 1 << 20
"""Requests that may wait in the engine: whoever asks limits itself."""


@dataclass(frozen=True)
class Source:
    """A model as a user names it.

    Attributes:
        model: A directory or Hub id, or the URL of a server that speaks OpenAI's API.
        device: For a directory: ``cpu``, ``cuda:N`` or ``auto``.
        max_batch: For a directory: sequences at a time; None: the engine decides.
        max_model_len: Most tokens of a sequence; None: what the model or the server takes.
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
class Asked:
    """An open source.

    Attributes:
        answerer: Who answers.
        tokenizer: The model's.
        folder: Where it lies.
        length: Most tokens of a prompt and what is scored after it. One fewer than the model takes: servers generate
            a token after what they score, and every way of asking is to see the same prompts.
        key: Names the model; what a journal holds was answered by a model of the same key.
    """

    answerer: Answerer
    tokenizer: Tokenizer
    folder: Traversable
    length: int
    key: str


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
        if source.tokenizer is None:
            raise RecipeError(f"{source.model}: tasks are asked in tokens; give the model's directory: --tokenizer DIR")
        folder = text_folder(Path(locate(source.tokenizer)))
        tokenizer = Tokenizer.load(folder)
        client = client_of(source.model, source.api_key)
        try:
            name, length = await served(client, source.name)
            length = _shorter(source, length)
            key = f"{client.url.host}:{client.url.port}{client.url.prefix} {name}"
            yield Asked(HttpAnswerer(client, name), tokenizer, folder, length - 1, f"{key}, {length} tokens")
        finally:
            await client.close()
        return
    path = Path(locate(source.model))
    folder = text_folder(path)
    tokenizer = Tokenizer.load(folder)
    options = EngineOptions(
        source.device, "exact", max_batch=source.max_batch, max_model_len=source.max_model_len, max_queued=QUEUED
    )
    engine = InProcessClient(open_engine(path, options))
    try:
        length = engine.info.max_model_len
        key = f"{fingerprint_of(path)} on {source.device.partition(':')[0]}, {length} tokens"
        yield Asked(EngineAnswerer(engine, tokenizer), tokenizer, folder, length - 1, key)
    finally:
        await engine.close()


def _shorter(source: Source, served_length: int | None) -> int:
    """Tokens of a sequence: what was asked for, if the server takes that many, else what it takes."""
    if source.max_model_len is None and served_length is None:
        raise RecipeError(f"{source.model} does not say how many tokens it takes; give --max-model-len N")
    if source.max_model_len is not None and served_length is not None and source.max_model_len > served_length:
        raise RecipeError(f"--max-model-len {source.max_model_len}: {source.model} takes {served_length} tokens")
    length = source.max_model_len or served_length
    assert length is not None
    return length


def fingerprint_of(path: Path) -> str:
    """Names the content of a model directory without reading its weights: settings by their bytes, weights by size.

    The times at which weights were written count as well: a model that was made again is another one.
    """
    whole = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
    for file in files:
        facts = file.stat()
        whole.update(f"{file.name} {facts.st_size}".encode())
        if file.suffix == ".json":
            whole.update(file.read_bytes())
        else:
            whole.update(str(facts.st_mtime_ns).encode())
    return f"{path.resolve().name} {whole.hexdigest()[:16]}"

"""A tokenizer made on the spot, a fake engine, and the application around them."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager

import httpx
import pytest
from fake_engine import FakeEngine
from serve_names import SAYS, write_model

from fewbit.serve import create_app
from fewbit.text import Tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return Tokenizer.load(write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def engine(tokenizer) -> FakeEngine:
    fake = FakeEngine(tokenizer.vocab_size)
    fake.says = tokenizer.encode(SAYS, add_special_tokens=False)
    return fake


@pytest.fixture
def app(engine, tokenizer):
    return create_app(engine, tokenizer, "storyteller")


@pytest.fixture
def ask(app, run):
    """`ask("/v1/completions", {...})` gives the response; bytes go as they are; None is a GET."""

    def once(path: str, body=None, **kwargs) -> httpx.Response:
        async def call() -> httpx.Response:
            async with client_of(app) as client:
                if body is None:
                    return await client.request(kwargs.pop("method", "GET"), path, **kwargs)
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                return await client.post(path, content=content, **kwargs)

        return run(call())

    return once


@pytest.fixture
def run():
    return asyncio.run


@asynccontextmanager
async def client_of(app):
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client

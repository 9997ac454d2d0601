"""A tokenizer made on the spot, a fake engine, and the application around them."""

from __future__ import annotations

import asyncio
import json
import threading

import httpx
import pytest
from fake_engine import FakeEngine
from serve_names import SAYS, client_of, models_of, write_model

from fewbit.serve import bind, create_app, serve_app
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
    return create_app(models_of(tokenizer, storyteller=engine))


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


@pytest.fixture
def live(engine, tokenizer):
    """The URL of a server in a thread of this process, so that tests can look at its engine."""
    listener, ready, box = bind(port=0), threading.Event(), {}

    def thread():
        async def main():
            app = create_app(models_of(tokenizer, storyteller=engine))
            box["models"], box["loop"] = app.state.models, asyncio.get_running_loop()
            await serve_app(app, listener, drain_s=2, on_ready=lambda url: (box.update(url=url), ready.set()))

        asyncio.run(main())

    t = threading.Thread(target=thread)
    t.start()
    assert ready.wait(30)
    yield box["url"]
    box["models"].draining = True
    t.join(60)
    assert not t.is_alive()

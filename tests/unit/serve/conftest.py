"""A tokenizer made on the spot, a fake engine, and the application around them."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from fake_engine import FakeEngine
from serve_names import SAYS
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from fewbit.serve import create_app
from fewbit.text import Tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('system must come first') }}{% endif %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_model(directory: Path) -> Path:
    t = Backend(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(
        ["un deux trois quatre cinq six sept huit neuf", "How do I count to nine in French?"],
        trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=["<unk>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    t.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


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

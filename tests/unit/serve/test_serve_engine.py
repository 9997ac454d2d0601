"""The server over the real engine in this process: a random model, real K/V blocks."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import itertools
import json
import threading
from pathlib import Path

import httpx
import pytest
from serve_names import CHAT, COMPLETION, models_of, sse

from fewbit.engine.client import InProcessClient
from fewbit.serve import create_app

_FILE = Path(__file__).parents[1] / "engine" / "tiny_engine.py"


@pytest.fixture
def machine(tokenizer):
    spec = importlib.util.spec_from_file_location("tiny_engine_for_serving", _FILE)
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    tiny.SPEC = dataclasses.replace(tiny.SPEC, vocab=tokenizer.vocab_size)
    return tiny.engine()


@pytest.fixture
def over(machine, tokenizer):
    """`over(work)` runs `await work(http_client, engine_client)`."""

    def go(work):
        async def main():
            client = InProcessClient(machine)
            app = create_app(models_of(tokenizer, tiny=client))
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://t") as http:
                try:
                    return await work(http, client)
                finally:
                    await client.close()

        return asyncio.run(main())

    return go


ASKED = {"prompt": "un deux trois quatre cinq six", "max_tokens": 24, "temperature": 0, "ignore_eos": True}


def test_whole_and_streamed_and_again_are_the_same_text(over):
    async def work(http, client):
        whole = (await http.post(COMPLETION, json=ASKED | {"logprobs": 2})).json()
        again = (await http.post(COMPLETION, json=ASKED)).json()
        chunks = sse((await http.post(COMPLETION, json=ASKED | {"stream": True})).text)[:-1]
        return whole, again, "".join(c["choices"][0]["text"] for c in chunks), await client.stats()

    whole, again, streamed, stats = over(work)
    choice = whole["choices"][0]
    assert (choice["finish_reason"], whole["usage"]["completion_tokens"]) == ("length", 24)
    assert choice["text"] == again["choices"][0]["text"] == streamed
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    logprobs = choice["logprobs"]
    assert [max(t.values()) for t in logprobs["top_logprobs"]] == logprobs["token_logprobs"]  # greedy
    assert stats.blocks_used == stats.running == 0


def test_a_stop_string_ends_the_request_in_the_engine_too(over):
    async def work(http, client):
        text = (await http.post(COMPLETION, json=ASKED)).json()["choices"][0]["text"]
        stop = next(c for c in text[3:] if c.isprintable() and c != "\ufffd")
        cut = (await http.post(COMPLETION, json=ASKED | {"stop": stop})).json()
        return text, stop, cut, await client.stats()

    text, stop, cut, stats = over(work)
    assert cut["choices"][0]["text"] == text[: text.index(stop)]
    assert cut["choices"][0]["stop_reason"] == stop
    assert cut["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert stats.blocks_used == 0


def test_many_at_once_and_seeds(over):
    async def work(http, client):
        asked = ASKED | {"temperature": 1.0, "seed": 5, "n": 3, "prompt": ["a", "b"]}
        bodies = [(await http.post(COMPLETION, json=asked)).json() for _ in range(2)]
        return [[c["text"] for c in b["choices"]] for b in bodies]

    first, second = over(work)
    assert first == second
    assert len(set(first)) == 6


def test_refusals_come_from_the_engine_as_they_are(over):
    async def work(http, client):
        long = await http.post(COMPLETION, json=ASKED | {"max_tokens": 500})
        chat = {"messages": [{"role": "user", "content": "x"}], "temperature": 1e308, "max_tokens": 5}
        return long, await http.post(CHAT, json=chat)

    long, hot = over(work)
    assert (long.status_code, long.json()["error"]["param"]) == (400, "max_tokens")
    assert hot.status_code == 200


def test_what_turns_out_to_be_impossible_is_the_requests_fault(over):
    async def work(http, client):
        forms = {"allowed_token_ids": [5], "stop_token_ids": [5], "min_tokens": 3}
        return await http.post(COMPLETION, json=ASKED | forms), await http.post(COMPLETION, json=ASKED)

    refused, good = over(work)
    assert (refused.status_code, good.status_code) == (400, 200)
    assert "every token is forbidden" in refused.json()["error"]["message"]


def test_a_client_that_leaves_frees_real_blocks(over, machine):
    async def work(http, client):
        app = http._transport.app
        sent, gone, go_on, steps = [], asyncio.Event(), threading.Event(), itertools.count()
        launch = machine.runner.launch

        def held(batch):  # so that the text has not come to its end before the client has left
            if next(steps) == 60:
                go_on.wait(60)
            return launch(batch)

        machine.runner.launch = held
        body = json.dumps(ASKED | {"max_tokens": 100, "stream": True}).encode()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)
            if len(sent) == 4:
                gone.set()

        scope = {
            "type": "http",
            "method": "POST",
            "path": COMPLETION,
            "raw_path": b"",
            "query_string": b"",
            "headers": [],
        }
        try:
            await app(scope | {"root_path": "", "scheme": "http", "http_version": "1.1"}, receive, send)
        finally:
            go_on.set()
        async with asyncio.timeout(60):
            while not (stats := await client.stats()).endings_total:
                await asyncio.sleep(0.02)
        return stats

    stats = over(work)
    assert stats.endings_total == {"abort": 1}
    assert stats.blocks_used == 0
    assert stats.output_tokens_total < 100


def test_metrics_of_the_real_engine(over):
    async def work(http, client):
        await http.post(COMPLETION, json=ASKED)
        return (await http.get("/metrics")).text, (await http.get("/health")).status_code

    text, health = over(work)
    assert health == 200
    assert 'fewbit:generation_tokens_total{model_name="tiny"} 24.0' in text
    assert 'fewbit:kv_cache_blocks{model_name="tiny"} 64.0' in text

"""Tools over HTTP: shown to the model, called by it, answered by the client, whole and streamed."""

from __future__ import annotations

import json

import httpx
import pytest
from fake_engine import FakeEngine
from serve_names import CHAT, models_of, sse, write_model

from fewbit.serve import create_app
from fewbit.text import Tokenizer

TALK = {"model": "storyteller", "messages": [{"role": "user", "content": "Count!"}]}
TOOLS = (
    "{{ bos_token }}{% if tools %}{% for t in tools %}{{ t.function | tojson }}<tool_call>{% endfor %}{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}\n{% endfor %}<|assistant|>"
)
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"$ref": "#/$defs/n"}},
            "$defs": {"n": {"type": "integer"}},
        },
    },
}
OTHER = {"type": "function", "function": {"name": "other"}}


@pytest.fixture(scope="module")
def able(tmp_path_factory) -> Tokenizer:
    """A tokenizer whose template shows tools."""
    folder = write_model(tmp_path_factory.mktemp("tools"))
    (folder / "chat_template.jinja").write_text(TOOLS)
    return Tokenizer.load(folder)


@pytest.fixture
def engine(able) -> FakeEngine:
    return FakeEngine(able.vocab_size, max_model_len=1024)


@pytest.fixture
def app_with_tools(engine, able):
    return create_app(models_of(able, storyteller=engine))


@pytest.fixture
def offer(app_with_tools, engine, able, run):
    """`offer("what the model says", {...})` is the answer to a chat in which it may add."""

    def once(says: str, **fields):
        engine.says = able.encode(says, add_special_tokens=False)

        async def call():
            transport = httpx.ASGITransport(app_with_tools)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.post(CHAT, json=TALK | {"tools": [ADD, OTHER]} | fields)

        return run(call())

    return once


def test_a_call_of_a_tool_and_its_result(offer, engine, able):
    body = offer('Hm.\n<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>').json()
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Hm."
    (call,) = choice["message"]["tool_calls"]
    assert (call["type"], call["function"]) == ("function", {"name": "add", "arguments": '{"a": 1}'})
    assert '"name": "add"' in able.decode(engine.seen[-1].prompt)
    result = {"role": "tool", "tool_call_id": call["id"], "content": "2"}
    r = offer("Two.", messages=[*TALK["messages"], choice["message"], result])
    assert r.json()["choices"][0]["message"] == {"role": "assistant", "content": "Two."}
    prompt = able.decode(engine.seen[-1].prompt)
    assert '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>' in prompt
    assert "<|tool|>2" in prompt
    broken = json.loads(json.dumps(choice["message"]))
    broken["tool_calls"][0]["function"]["arguments"] = "{"
    assert "no JSON" in offer("x", messages=[broken]).json()["error"]["message"]


def test_a_streamed_call(offer):
    says = 'Hm.\n<tool_call>{"name": "add", "arguments": {"a": 12345}}</tool_call>'
    *chunks, done = sse(offer(says, stream=True, logprobs=True, top_logprobs=1).text)
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    parts = [part for d in deltas for part in d.get("tool_calls", [])]
    assert list(parts[0]) == ["index", "id", "type", "function"]
    assert parts[0]["function"] == {"name": "add", "arguments": ""}
    assert all(list(part) == ["index", "function"] for part in parts[1:])
    assert "".join(part["function"]["arguments"] for part in parts) == '{"a": 12345}'
    assert len(parts) > 3
    assert "".join(d.get("content", "") for d in deltas) == "Hm."
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["tool_calls"]
    tokens = [t for c in chunks if c["choices"][0]["logprobs"] for t in c["choices"][0]["logprobs"]["content"]]
    assert "".join(t["token"] for t in tokens) == says
    assert done == "[DONE]"


def test_tools_that_are_not_offered(offer, engine, able):
    body = offer('<tool_call>{"name": "add"}</tool_call>', tool_choice="none").json()
    assert body["choices"][0]["message"]["content"].startswith("<tool_call>")
    assert body["choices"][0]["finish_reason"] == "stop"
    assert "Adds." not in able.decode(engine.seen[-1].prompt)

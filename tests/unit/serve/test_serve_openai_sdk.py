"""OpenAI's own Python client against a server with the bundled model: it sends what we take, and reads what we give."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Literal

import pytest
from serve_names import models_of

from fewbit.demo import demo_model
from fewbit.engine.client import InProcessClient
from fewbit.engine.config import EngineOptions
from fewbit.engine.engine import open_engine
from fewbit.errors import CheckpointError
from fewbit.serve import bind, create_app, serve_app
from fewbit.text import Tokenizer

openai = pytest.importorskip("openai", reason="NO OPENAI CLIENT, so nothing was asked with it")
pydantic = pytest.importorskip("pydantic")

TEMPLATE = (
    "{{ bos_token }}{% for t in tools or [] %}{{ t.function | tojson }}\n<tool_call>{% endfor %}"
    "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}\n\n{% endfor %}"
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"$ref": "#/$defs/days"}},
            "required": ["city", "days"],
            "additionalProperties": False,
            "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
        },
    },
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
TIME = {"type": "function", "function": {"name": "get_time", "parameters": NOTHING}}
TALK = [{"role": "user", "content": "Tell me a story about a bear."}]


def named(function: str) -> dict:
    return {"type": "function", "function": {"name": function}}


def form(of: dict) -> dict:
    return {"extra_body": {"structured_outputs": of}}


def schema(of: dict) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": of}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The bundled model with a template that shows tools."""
    try:
        model = demo_model()
    except CheckpointError as error:
        pytest.skip(f"NO STORYTELLER, so OpenAI's client asked nothing: {error}")
    made = tmp_path_factory.mktemp("storyteller")
    for file in model.iterdir():
        (made / file.name).symlink_to(file)
    (made / "chat_template.jinja").write_text(TEMPLATE)
    return made


@pytest.fixture(scope="module")
def url(folder):
    tokenizer = Tokenizer.load(folder)
    listener, ready, box = bind(port=0), threading.Event(), {}

    def thread():
        async def main():
            engine = open_engine(folder, EngineOptions(device="cpu", max_model_len=512, kv_bytes=64 << 20))
            client = InProcessClient(engine)
            app = create_app(models_of(tokenizer, storyteller=client))
            box["models"] = app.state.models
            await serve_app(app, listener, drain_s=2, on_ready=lambda url: (box.update(url=url), ready.set()))
            await client.close()

        asyncio.run(main())

    t = threading.Thread(target=thread)
    t.start()
    assert ready.wait(120)
    yield box["url"]
    box["models"].draining = True
    t.join(60)
    assert not t.is_alive()


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


class Bear(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=12)
    colour: Literal["brown", "white"]
    cubs: int = pydantic.Field(ge=0, le=3)


def test_models(client):
    assert [m.id for m in client.models.list()] == ["storyteller"]
    assert client.models.retrieve("storyteller").id == "storyteller"


def test_the_same_text_whole_streamed_and_asynchronous(client, url):
    asked = {"model": "storyteller", "messages": TALK, "max_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    stream = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    *chunks, usage = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    streamed = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert usage.usage == whole.usage or usage.usage.total_tokens == whole.usage.total_tokens

    async def main() -> str:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as other:
            return "".join(
                [
                    c.choices[0].delta.content or ""
                    async for c in await other.chat.completions.create(**asked, stream=True)
                ]
            )

    assert len(whole.choices[0].message.content) > 40
    assert whole.choices[0].message.content == streamed == asyncio.run(main())
    assert whole.choices[0].message.tool_calls is None


@pytest.mark.slow
def test_seeds_biases_and_several_choices(client):
    asked = {"model": "storyteller", "prompt": "Once upon a time", "max_tokens": 8}
    two = client.completions.create(**asked, n=2, seed=5)
    assert [c.text for c in two.choices] == [c.text for c in client.completions.create(**asked, n=2, seed=5).choices]
    assert two.choices[0].text != two.choices[1].text
    first = client.completions.create(**asked, temperature=0, extra_body={"return_token_ids": True}).choices[0]
    token = str(first.token_ids[0])
    other = client.completions.create(**asked, temperature=0, logit_bias={token: -100}).choices[0]
    assert other.text != first.text
    only = client.completions.create(**asked, extra_body={"allowed_token_ids": first.token_ids[:1], "ignore_eos": True})
    assert only.choices[0].text == client.completions.create(**asked, logit_bias={token: 100}).choices[0].text


def test_log_probabilities_of_prompt_and_answer_are_the_same_floats(client):
    asked = {"model": "storyteller", "temperature": 0, "logprobs": 2}
    said = client.completions.create(**asked, prompt="Once upon a time", max_tokens=6).choices[0]
    whole = client.completions.create(**asked, prompt="Once upon a time" + said.text, max_tokens=0, echo=True).choices[
        0
    ]
    assert whole.text == "Once upon a time" + said.text
    assert whole.logprobs.tokens[-6:] == said.logprobs.tokens
    assert whole.logprobs.token_logprobs[-6:] == said.logprobs.token_logprobs
    assert whole.logprobs.top_logprobs[-6:] == said.logprobs.top_logprobs
    chat = client.chat.completions.create(
        model="storyteller", messages=TALK, max_tokens=3, temperature=0, logprobs=True, top_logprobs=2
    )
    for token in chat.choices[0].logprobs.content:
        assert bytes(token.bytes).decode() == token.token
        assert token.top_logprobs[0].logprob == token.logprob


@pytest.mark.slow
def test_json_of_a_pydantic_model(client):
    done = client.chat.completions.parse(
        model="storyteller", messages=TALK, response_format=Bear, max_tokens=60, seed=1, temperature=0.7
    )
    bear = done.choices[0].message.parsed
    assert isinstance(bear, Bear)
    assert done.choices[0].finish_reason == "stop"
    any_object = client.chat.completions.create(
        model="storyteller",
        messages=TALK,
        max_tokens=40,
        response_format={"type": "json_object"},
        logit_bias={},
        seed=3,
    ).choices[0]
    assert any_object.message.content.startswith("{")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "fits"),
    [
        ({"regex": "[a-c]{3}-[0-9]{2}"}, lambda t: len(t) == 6 and t[3] == "-" and t[4:].isdigit()),
        ({"choice": ["a brown bear", "a white bear"]}, lambda t: t in ("a brown bear", "a white bear")),
        ({"grammar": 'root ::= "so " [0-9] [0-9]?'}, lambda t: t.startswith("so ") and t[3:].isdigit()),
        ({"grammar": 'start: "so " /[0-9]{1,2}/'}, lambda t: t.startswith("so ") and t[3:].isdigit()),
        ({"json": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2}}, json.loads),
    ],
)
def test_structured_outputs(client, shape, fits):
    asked = {"model": "storyteller", "prompt": "Here is", "max_tokens": 40, "seed": 2}
    text = client.completions.create(**asked, **form(shape)).choices[0].text
    assert fits(text)


@pytest.mark.slow
def test_a_call_that_is_required(client):
    asked = {"model": "storyteller", "messages": TALK, "tools": [WEATHER, TIME], "max_tokens": 120, "seed": 4}
    done = client.chat.completions.create(**asked, tool_choice="required", parallel_tool_calls=False).choices[0]
    (call,) = done.message.tool_calls
    assert done.finish_reason == "tool_calls"
    assert done.message.content is None
    check_call(call.function.name, call.function.arguments)


def check_call(name: str, arguments: str) -> None:
    found = json.loads(arguments)
    if name == "get_weather":
        assert found["city"] in ("Paris", "Rome")
        assert 1 <= found["days"] <= 9
    else:
        assert name == "get_time"


def test_a_named_call_streamed(client):
    asked = {"model": "storyteller", "messages": TALK, "tools": [WEATHER, TIME], "max_tokens": 60}
    asked["tool_choice"] = named("get_weather")
    with client.chat.completions.stream(**asked, seed=1) as stream:
        kinds = {event.type for event in stream}
        done = stream.get_final_completion().choices[0]
    assert "tool_calls.function.arguments.delta" in kinds
    assert done.finish_reason == "tool_calls"
    (call,) = done.message.tool_calls
    assert call.function.name == "get_weather"
    check_call(call.function.name, call.function.arguments)
    whole = client.chat.completions.create(**asked, seed=1).choices[0].message
    assert whole.tool_calls[0].function.arguments == call.function.arguments
    # and back, with what the tool said
    back = [*TALK, whole, {"role": "tool", "tool_call_id": whole.tool_calls[0].id, "content": "Sunny."}]
    again = client.chat.completions.create(model="storyteller", messages=back, tools=[WEATHER], max_tokens=8, seed=1)
    assert again.choices[0].finish_reason in ("length", "stop")


@pytest.mark.slow
def test_a_call_of_the_model_s_own_accord_streamed(client):
    """Bent to say one by a grammar, as a model that was trained to does by itself."""
    says = 'A moment. <tool_call>{"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}</tool_call>'
    asked = {"model": "storyteller", "messages": TALK, "tools": [WEATHER], "max_tokens": 120}
    with client.chat.completions.stream(**asked, tool_choice="auto", **form({"choice": [says]})) as stream:
        done = stream.get_final_completion().choices[0]
    assert (done.message.content, done.finish_reason) == ("A moment.", "tool_calls")
    assert json.loads(done.message.tool_calls[0].function.arguments) == {"city": "Rome", "days": 2}


@pytest.mark.parametrize(
    ("more", "kind", "param"),
    [
        ({"max_tokens": -1}, "BadRequestError", "max_tokens"),
        ({"model": "gone"}, "NotFoundError", "model"),
        ({"extra_body": {"max_token": 1}}, "BadRequestError", "max_token"),
        (form({"regex": "(a"}), "BadRequestError", "structured_outputs"),
        (form({"grammar": "start: start"}), "BadRequestError", "structured_outputs"),
        ({"response_format": schema({"type": "what"})}, "BadRequestError", "response_format"),
        ({"response_format": schema({"$ref": "#/$defs/gone"})}, "BadRequestError", "response_format"),
        ({"response_format": schema({"type": "string", "pattern": 3})}, "BadRequestError", "response_format"),
        ({"response_format": schema({"type": "integer", "minimum": 2, "maximum": 1})}, "BadRequestError", None),
        ({"response_format": schema({"enum": [str(i) for i in range(10**5)]})}, "BadRequestError", "response_format"),
        ({"tool_choice": "required"}, "BadRequestError", "tool_choice"),
        ({"tools": [TIME], "tool_choice": named("no")}, "BadRequestError", "tool_choice"),
    ],
)
def test_errors_have_the_client_s_classes(client, more, kind, param):
    asked = {"model": "storyteller", "messages": TALK, "max_tokens": 4} | more
    with pytest.raises(getattr(openai, kind)) as caught:
        client.chat.completions.create(**asked)
    assert caught.value.param == (param or "response_format")
    assert len(str(caught.value)) < 600

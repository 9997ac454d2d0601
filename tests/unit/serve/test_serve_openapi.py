"""/openapi.json says what the routes take and give: of all of them, and answers keep to it."""

from __future__ import annotations

import asyncio
import json
import re

import httpx
import pytest
from fake_engine import FakeEngine
from serve_names import CHAT, COMPLETION, models_of, sse

from fewbit.serve import create_app

jsonschema = pytest.importorskip("jsonschema_rs", reason="NO SCHEMATHESIS, so no answer was held to /openapi.json")

TEXT = {"prompt": "Count:", "max_tokens": 9}
TALK = {"messages": [{"role": "user", "content": "Count!"}]}


@pytest.fixture(scope="module")
def spec(tokenizer) -> dict:
    """Made once: the routes of all applications are the same."""

    async def get() -> httpx.Response:
        app = create_app(models_of(tokenizer, storyteller=FakeEngine(tokenizer.vocab_size)))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.get("/openapi.json")

    r = asyncio.run(get())
    assert (r.status_code, r.headers["content-type"]) == (200, "application/json")
    return r.json()


def validator(spec: dict, schema: dict):
    return jsonschema.Draft202012Validator(schema | {"components": spec["components"]})


def test_every_reference_leads_somewhere_and_every_operation_has_a_name(spec):
    assert spec["openapi"] == "3.1.0"
    for name in re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(spec)):
        assert name in spec["components"]["schemas"]
    entries = [(path, method, e) for path, item in spec["paths"].items() for method, e in item.items()]
    assert len({e["operationId"] for _, _, e in entries}) == len(entries) > 15
    for path, _, e in entries:
        assert {p["name"] for p in e.get("parameters", [])} == set(re.findall(r"{(\w+)}", path))
        assert {"200", "4XX", "5XX"} <= e["responses"].keys()
        assert e["summary"]


def test_no_route_is_left_out(spec, app):
    served = set()

    def look(routes):
        for route in routes:
            if (inner := getattr(route, "original_router", None)) is not None:
                look(inner.routes)
            elif route.include_in_schema:
                served.add(re.sub(r":\w+}", "}", route.path))

    look(app.routes)
    assert served == spec["paths"].keys()


def event_of(content):
    """The schema of the JSON in an event of a stream."""
    return content["text/event-stream"]["x-itemSchema"]["properties"]["data"]["contentSchema"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/models", None),
        ("/v1/models/storyteller", None),
        ("/openai/v1/models", None),
        ("/tokenizer_info", None),
        ("/version", None),
        ("/tokenize", {"prompt": "un", "return_token_strs": True}),
        ("/tokenize", {"messages": TALK["messages"]}),
        ("/detokenize", {"tokens": [5, 6]}),
        (COMPLETION, TEXT),
        (COMPLETION, TEXT | {"echo": True, "logprobs": 2, "prompt_logprobs": 1, "return_token_ids": True, "n": 2}),
        (COMPLETION, TEXT | {"stop": "u", "stop_token_ids": [7], "best_of": 1, "user": {"any": "thing"}}),
        (CHAT, TALK),
        (CHAT, TALK | {"logprobs": True, "top_logprobs": 2, "prompt_logprobs": 1, "return_token_ids": True}),
        (COMPLETION, TEXT | {"stream": True, "echo": True, "logprobs": 2, "return_token_ids": True}),
        (CHAT, TALK | {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}),
        (CHAT, TALK | {"stream": True, "logprobs": True, "top_logprobs": 1, "return_token_ids": True}),
    ],
)
def test_requests_and_answers_are_as_it_says(ask, spec, path, body):
    entry = spec["paths"][path.replace("/storyteller", "/{model}")]["get" if body is None else "post"]
    if body is not None:
        schema = entry["requestBody"]["content"]["application/json"]["schema"]
        assert validator(spec, schema).is_valid(body)
        assert not validator(spec, schema).is_valid(body | {"nonsense": 1})
    r = ask(path, body)
    assert r.status_code == 200
    content = entry["responses"]["200"]["content"]
    if (body or {}).get("stream"):
        check = validator(spec, event_of(content))
        answers = sse(r.text)[:-1]
    else:
        check = validator(spec, content["application/json"]["schema"])
        answers = [r.json()]
    for answer in answers:
        check.validate(answer)
        assert not check.is_valid(answer | {"nonsense": 1})


@pytest.mark.parametrize(("path", "body", "status"), [(COMPLETION, {}, 400), (CHAT, TALK | {"model": "x"}, 404)])
def test_errors_are_as_it_says(ask, spec, path, body, status):
    r = ask(path, body)
    assert r.status_code == status
    schema = spec["paths"][path]["post"]["responses"]["4XX"]["content"]["application/json"]["schema"]
    validator(spec, schema).validate(r.json())


def test_a_stream_s_failure_is_as_it_says(ask, spec, engine):
    engine.fail_after = 1
    *_, error, _ = sse(ask(CHAT, TALK | {"stream": True}).text)
    schema = event_of(spec["paths"][CHAT]["post"]["responses"]["200"]["content"])
    validator(spec, schema).validate(error)


def test_fields_that_ask_for_nothing_are_said(spec):
    fields = spec["components"]["schemas"]["CompletionRequest"]["properties"]
    assert fields["best_of"] == {"enum": [None, 1]}
    assert fields["suffix"] == {"enum": [None, ""]}

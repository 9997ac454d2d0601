"""POST /v2/models/ensemble/generate works as the published walkthroughs call it."""

from __future__ import annotations

import pytest
from serve_names import GENERATE, SAYS

PUBLISHED = (
    b'{"text_input":"How do I count to nine in French?",'
    b'"parameters":{"max_tokens":100,"bad_words":[""],"stop_words":[""]}}'
)
QUESTION = "How do I count to nine in French?"
FLAT = {
    "model_name": "ensemble",
    "model_version": "1",
    "sequence_end": False,
    "sequence_id": 0,
    "sequence_start": False,
    "text_output": QUESTION + SAYS,
}


@pytest.mark.parametrize("kind", ["application/json", "application/x-www-form-urlencoded", "text/plain", None])
def test_the_published_body(ask, tokenizer, engine, kind):
    r = ask(GENERATE, PUBLISHED, headers={"content-type": kind} if kind else {})
    assert (r.status_code, r.json()) == (200, FLAT)
    (request,) = engine.seen
    assert request.prompt == tuple(tokenizer.encode(QUESTION))
    assert (request.params.max_tokens, request.params.bad_words, request.params.stop_token_ids) == (100, (), ())
    assert request.params.temperature == 0  # as there: the likeliest token where nothing else is said


@pytest.mark.parametrize(
    "body",
    [
        {"text_input": QUESTION, "max_tokens": 100, "bad_words": "", "stop_words": ""},
        {"text_input": [QUESTION], "parameters": {"max_tokens": [100], "stop": None}},
        {"text_input": QUESTION, "max_tokens": 100, "stream": False, "beam_width": 1, "pad_id": 2, "end_id": 2},
    ],
)
def test_other_shapes(ask, body):
    r = ask(GENERATE, body)
    assert (r.status_code, r.json()) == (200, FLAT)


def test_by_its_own_name_and_version(ask):
    for path in ("/v2/models/storyteller/generate", "/v2/models/storyteller/versions/1/generate"):
        r = ask(path, {"text_input": QUESTION, "id": "7"})
        assert (r.status_code, r.json()["model_name"], r.json()["id"]) == (200, "storyteller", "7")


def test_fields_reach_the_engine(ask, tokenizer, engine):
    fields = {"max_tokens": 5, "min_tokens": 1, "temperature": 0.7, "top_k": 3, "top_p": 0.5, "repetition_penalty": 1.5}
    body = {"text_input": "x", "random_seed": 3, "end_id": 9, "parameters": fields, "bad_words": ["sept", ""]}
    assert ask(GENERATE, body).status_code == 200
    params = engine.seen[0].params
    assert {name: getattr(params, name) for name in fields} == fields
    assert (params.seed, params.stop_token_ids, params.ignore_eos) == (3, (9,), True)
    wanted = {tuple(tokenizer.encode(w, add_special_tokens=False)) for w in ("sept", " sept")}
    assert set(params.bad_words) == wanted


def test_stop_words_and_without_the_input(ask):
    for name in ("stop_words", "stop"):
        body = {"text_input": "x", "max_tokens": 50, name: ["trois"], "exclude_input_in_output": True}
        assert ask(GENERATE, body).json()["text_output"] == "un, deux, "


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({}, "text_input is required"),
        ({"text_input": 3}, "text_input must be a valid string, got 3"),
        ({"text_input": ["a", "b"]}, "text_input must be a valid string"),
        ({"text_input": "x", "max_tokens": "10"}, 'max_tokens must be a valid integer, got "10"'),
        ({"text_input": "x", "max_tokens": -1}, "max_tokens must be at least 0, got -1"),
        ({"text_input": "x", "max_tokens": 1000}, "exceed the model length"),
        ({"text_input": "x", "max_tokns": 1}, "unknown field 'max_tokns': did you mean 'max_tokens'?"),
        ({"text_input": "x", "parameters": [1]}, "parameters must be an object"),
        ({"text_input": "x", "top_k": 1, "parameters": {"top_k": 2}}, "both at the top and in parameters"),
        ({"text_input": "x", "stream": True}, "'stream': True is not supported"),
        ({"text_input": "x", "beam_width": 4}, "'beam_width': 4 is not supported"),
        ({"text_input": "x", "seed": 1, "random_seed": 1}, "two names of one thing"),
        ({"text_input": "x", "stop_words": [3]}, "stop_words[0] must be a string"),
        ({"text_input": "x" * 5000}, "text_input has 5000 tokens|text_input has 5000 characters"),
    ],
)
def test_errors_are_flat(ask, engine, body, why):
    r = ask(GENERATE, body)
    assert r.status_code == 400
    assert list(r.json()) == ["error"]
    assert any(part in r.json()["error"] for part in why.split("|"))
    assert not engine.seen


def test_unknown_models_after_the_body(ask):
    assert ask("/v2/models/gone/generate", {"text": "x"}).status_code == 400
    r = ask("/v2/models/gone/generate", {"text_input": "x"})
    assert (r.status_code, r.json()) == (404, {"error": "the model 'gone' is not served here, 'storyteller' is"})
    assert ask("/v2/models/ensemble/versions/2/generate", {"text_input": "x"}).status_code == 404


def test_engine_failures(ask, engine):
    engine.fail_after = 2
    r = ask(GENERATE, PUBLISHED)
    assert (r.status_code, r.json()) == (500, {"error": "a step of the engine failed: out of memory"})
    engine.full = True
    r = ask(GENERATE, PUBLISHED)
    assert (r.status_code, r.headers["retry-after"]) == (429, "1")


def test_wrong_method_and_path(ask):
    assert ask(GENERATE).status_code == 405
    assert ask(GENERATE).json() == {"error": f"GET {GENERATE}: Method Not Allowed"}
    assert ask("/v2/nowhere").json() == {"error": "GET /v2/nowhere: Not Found"}

"""Whatever is sent: one clear error in the right shape, before anything is queued, and the next request is served."""

from __future__ import annotations

import asyncio
import gzip
import json
import time

import pytest
from serve_names import CHAT, COMPLETION, SAYS, client_of, sse

from fewbit.serve import body as body_module

TEXT = {"model": "storyteller", "prompt": "Count:"}
TALK = {"model": "storyteller", "messages": [{"role": "user", "content": "Count!"}]}
TOOL = {"type": "function", "function": {"name": "f"}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def refused(ask, engine, path, body, status=400):
    began = time.process_time()  # what else runs on the machine does not count
    r = ask(path, body)
    assert time.process_time() - began < 5
    assert r.status_code == status, r.text
    assert len(r.content) < 2000
    error = r.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert error["code"] == status
    assert not engine.seen
    assert ask(COMPLETION, TEXT).json()["choices"][0]["text"] == SAYS
    return error


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "the body is empty"),
        (b"  \n", "the body is empty"),
        (b"[]", "must be a JSON object, got an array"),
        (b"null", "got null"),
        (b'"x"', "got a string"),
        (b"true", "got a boolean"),
        (b"{", "not JSON"),
        (b'{"prompt": "x"} x', "not JSON: Extra data"),
        (b"prompt=x&max_tokens=3", "not JSON"),
        (b'{"prompt": "\xff"}', "not UTF-8 (byte 12)"),
        (b'\xef\xbb\xbf{"prompt": "x"}', "byte order mark"),
        (b'{"prompt": "x", "prompt": "y"}', "the key 'prompt' is given twice"),
        (b'{"prompt": "x", "temperature": NaN}', "NaN is not JSON"),
        (b'{"prompt": "x", "temperature": -Infinity}', "-Infinity is not JSON"),
        (b'{"prompt": "x", "temperature": 1e400}', "the number 1e400 is too large"),
        (b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}", "does not fit into 64 bits"),
        (b'{"prompt": "x", "max_tokens": 99999999999999999999}', "does not fit into 64 bits"),
        (b'{"prompt": ' + b"[" * 20000 + b"]" * 20000 + b"}", "nests too deeply"),
        (b'{"prompt": ' + b'{"a":' * 20000 + b"1" + b"}" * 20001, "nests too deeply"),
        (b'{"prompt": "a\x00"}', "not JSON: Invalid control character"),
    ],
)
def test_bodies_that_are_no_object(ask, engine, body, why):
    assert why in refused(ask, engine, COMPLETION, body)["message"]


@pytest.mark.parametrize(
    ("fields", "param", "why"),
    [
        ({"n": 0}, "n", "between 1 and"),
        ({"n": -1}, "n", "between 1 and"),
        ({"n": 10**9}, "n", "between 1 and"),
        ({"n": 2, "temperature": 0}, "n", "n must be 1 when temperature is 0"),
        ({"max_tokens": -1}, "max_tokens", "max_tokens must be at least 0, got -1"),
        ({"max_tokens": 10**12}, "max_tokens", "exceed the model length of 256: ask for at most"),
        ({"max_tokens": "10"}, "max_tokens", 'max_tokens must be a valid integer, got "10"'),
        ({"max_tokens": 10.0}, "max_tokens", "max_tokens must be a valid integer, got 10.0"),
        ({"max_tokens": True}, "max_tokens", "max_tokens must be a valid integer, got true"),
        ({"temperature": -1}, "temperature", "temperature must be finite and at least 0"),
        ({"temperature": True}, "temperature", "temperature must be a valid number, got true"),
        ({"temperature": "hot"}, "temperature", 'temperature must be a valid number, got "hot"'),
        ({"top_p": 0}, "top_p", "top_p must be in (0, 1]"),
        ({"top_p": 2}, "top_p", "top_p"),
        ({"top_k": -2}, "top_k", "top_k"),
        ({"min_p": -0.1}, "min_p", "min_p"),
        ({"logprobs": 10**6}, "logprobs", "logprobs must be in [0, 20]"),
        ({"logprobs": True}, "logprobs", "logprobs must be a valid integer"),
        ({"seed": -1}, "seed", "seed"),
        ({"presence_penalty": 1e9}, "presence_penalty", "[-2, 2]"),
        ({"frequency_penalty": -1e9}, "frequency_penalty", "[-2, 2]"),
        ({"repetition_penalty": 0}, "repetition_penalty", "in [0.001, 1000], got 0"),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens", "at most max_tokens (3)"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids", "outside the vocabulary"),
        ({"stop_token_ids": ["a"] * 100_000}, "stop_token_ids[0]", "must be a valid integer"),
        ({"stop_token_ids": [1] * 2000}, "stop_token_ids", "at most 1024"),
        ({"stop": ""}, "stop", "stop[0] is empty"),
        ({"stop": ["a"] * 10_000}, "stop", "10000 strings, more than 32"),
        ({"stop": "x" * 10**6}, "stop", "1000000 characters, more than 1024"),
        ({"stop": [1]}, "stop", "stop[0] must be a string"),
        ({"stop": 7}, "stop", "must be a string or an array"),
        ({"stream": 1}, "stream", "stream must be a valid boolean, got 1"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only allowed with stream"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "did you mean 'include_usage'?"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options", "with include_usage"),
        ({"max_tokens": 0}, "max_tokens", "at least 1, got 0"),
        ({"prompt_logprobs": 21}, "prompt_logprobs", "in [0, 20]"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "not allowed with stream"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "greater than or equal to 1"),
        ({"truncate_prompt_tokens": 3, "prompt": "x" * 2**21}, "prompt", "2097152 characters"),
        ({"max_token": 3}, "max_token", "unknown field 'max_token': did you mean 'max_tokens'?"),
        ({"guided_json": {}}, "guided_json", 'send structured_outputs: {"json": ...}'),
        ({"guided_regex": "a"}, "guided_regex", 'send structured_outputs: {"regex": ...}'),
        ({"logit_bias": {"x": 1}}, "logit_bias", "'x' is no token id"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "'-1' is no token id"),
        ({"logit_bias": {"9999": 1}}, "logit_bias", "token id 9999, outside the vocabulary"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "in [-100, 100], got 101.0 for token id 5"),
        ({"logit_bias": {"5": "1"}}, "logit_bias", "must be a number"),
        ({"logit_bias": [5]}, "logit_bias", "must be an object"),
        ({"logit_bias": {str(i): 1 for i in range(100_000)}}, "logit_bias", "100000 entries, more than 1024"),
        ({"allowed_token_ids": []}, "allowed_token_ids", "at least 1 item"),
        ({"allowed_token_ids": [10**6]}, "allowed_token_ids", "outside the vocabulary"),
        ({"bad_words": "x"}, "bad_words", "must be an array of texts"),
        ({"bad_words": ["x"] * 129}, "bad_words", "129 words, more than 128"),
        ({"bad_words": ["x" * 2000]}, "bad_words", "more than 1024 characters"),
        ({"priority": 2**40}, "priority", "less than or equal to 2147483647"),
        ({"cache_salt": ""}, "cache_salt", "at least 1 character"),
        ({"request_id": "a b"}, "request_id", "of the form"),
        ({"best_of": 3}, "best_of", "'best_of' is not supported"),
        ({"best_of": True}, "best_of", "'best_of' is not supported"),
        ({"suffix": "x"}, "suffix", "'suffix' is not supported"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "must be 'text'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "schema is required"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schemas": {}}}},
            "response_format.json_schema.schemas",
            "did you mean 'schema'?",
        ),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one of"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one of"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs", "at least one text"),
        ({"structured_outputs": {"choice": [""]}}, "structured_outputs", "no empty one"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs", "1 to 65536 characters"),
        ({"structured_outputs": {"structural_tag": {}}}, "structured_outputs.structural_tag", "unknown field"),
        ({"structured_outputs": {"json": "{"}}, None, "not JSON"),
        ({"structured_outputs": {"json": {"$ref": "http://x/y"}}}, "structured_outputs", "nothing is fetched"),
        ({"structured_outputs": {"json": {"enum": ["x"] * 10**6}}}, "structured_outputs", "more than 262144"),
        (
            {"structured_outputs": {"json": json.loads('{"not":' * 200 + "{}" + "}" * 200)}},
            "structured_outputs",
            "deep",
        ),
        ({"x" * 10**6: 1}, "x" * 60 + "...", "unknown field"),
        ({"model": 3}, "model", "model must be a valid string"),
        ({"prompt": None}, "prompt", "prompt must be a text"),
        ({"prompt": 3}, "prompt", "prompt must be a text"),
        ({"prompt": {}}, "prompt", "prompt must be a text"),
        ({"prompt": []}, "prompt", "prompt must be a text"),
        ({"prompt": [[]]}, "prompt", "prompt[0] must be a non-empty array of token ids"),
        ({"prompt": [[1], "a"]}, "prompt", "not a mixture"),
        ({"prompt": [True]}, "prompt", "must hold either"),
        ({"prompt": [1.0]}, "prompt", "must hold either"),
        ({"prompt": [[1, True]]}, "prompt", "prompt[0] must be"),
        ({"prompt": [-1]}, "prompt", "token id -1, outside the vocabulary of"),
        ({"prompt": [10**6]}, "prompt", "token id 1000000, outside"),
        ({"prompt": ["a"] * 100_000}, "prompt", "more than 1024 choices"),
        ({"prompt": ["a"] * 600, "n": 2}, "prompt", "600 prompts x n 2"),
        ({"prompt": "\ud800"}, None, "lone surrogate"),
        ({"prompt": "x " * 400}, "prompt", "the model length is 256"),
        ({"prompt": "x" * 10**7}, "prompt", "10000000 characters"),
        ({"prompt": [3] * 256}, "prompt", "the prompt has 256 tokens and the model length is 256"),
        ({"prompt": [3] * 250, "max_tokens": 7}, "max_tokens", "prompt 250 + max_tokens 7 = 257 tokens exceed"),
    ],
)
def test_fields_of_completions(ask, engine, fields, param, why):
    error = refused(ask, engine, COMPLETION, TEXT | fields)
    assert (error["param"], error["type"]) == (param, "BadRequestError")
    assert why in error["message"]


@pytest.mark.parametrize(
    ("fields", "param", "why"),
    [
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": None}, "messages", "must be a valid list"),
        ({"messages": ["hi"]}, "messages[0]", 'messages[0] must be an object, got "hi"'),
        ({"messages": [{}]}, "messages[0].role", "messages[0].role is required"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "is required"),
        ({"messages": [{"role": "pirate", "content": "x"}]}, "messages[0].role", "must be 'system'"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages[0].tool_call_id", "no call"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "is required"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]}, "messages[0].tool_call_id", "a tool's"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages[0].tool_calls", "only"),
        ({"messages": [{"role": "assistant", "tool_calls": [CALL]}]}, "messages", "cannot show tool calls"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "must be a text or an array"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "is required"),
        ({"messages": [{"role": "user", "content": "x", "contents": 1}]}, "messages[0].contents", "'content'?"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///x"}}]}]},
            "messages[0].content",
            "part 0 has type 'image_url', which is not supported",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content", "part 0 must be"),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
            "messages[0].tool_calls[0].id",
            "is required",
        ),
        ({"messages": [{"role": "user", "content": "\udfff"}]}, None, "lone surrogate"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]},
            "messages",
            "system must come first",
        ),
        ({"messages": [{"role": "user", "content": "x " * 400}]}, "messages", "the model length is 256"),
        ({"messages": [{"role": "user", "content": "x"}] * 100_000}, "messages", "characters"),
        ({"top_logprobs": 2}, "top_logprobs", "only allowed with logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "top_logprobs must be in [0, 20], got 21"),
        ({"logprobs": 3}, "logprobs", "logprobs must be a valid boolean"),
        ({"max_completion_tokens": -1}, "max_completion_tokens", "max_completion_tokens must be at least 0"),
        ({"max_completion_tokens": 999}, "max_completion_tokens", "+ max_completion_tokens 999 ="),
        ({"max_completion_tokens": 1, "max_tokens": 2}, "max_completion_tokens", "different things"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "is required"),
        ({"tools": [TOOL]}, "tools", "cannot show tools to the model"),
        ({"tools": [TOOL, TOOL]}, "tools", "the name 'f' is given twice"),
        ({"tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(1000)]}, "tools", "1000 tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "match pattern"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]},
            "tools",
            "must describe an object, got type string",
        ),
        ({"tool_choice": "required"}, "tool_choice", "tools is empty"),
        ({"tool_choice": "any"}, "tool_choice", 'must be "none", "auto", "required"'),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice",
            "names 'g', which is not in tools: known: f",
        ),
        ({"chat_template": "{{ 1 }}"}, "chat_template", "--trust-request-chat-template"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs", "--trust-request-chat-template"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "has no such variable"),
        ({"continue_final_message": True}, "continue_final_message", "an assistant's text as the last message"),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
            "exclude each other",
        ),
        ({"prompt": "x"}, "prompt", "unknown field 'prompt'"),
    ],
)
def test_fields_of_chat(ask, engine, fields, param, why):
    error = refused(ask, engine, CHAT, TALK | fields)
    assert error["param"] == param
    assert why in error["message"]


def test_a_million_wrong_things_make_one_short_error(ask, engine):
    error = refused(ask, engine, CHAT, TALK | {"messages": [3] * 1_000_000})
    assert error["param"] == "messages[0]"
    engine.seen.clear()
    refused(ask, engine, COMPLETION, TEXT | {"prompt": [[1]] * 400_000 + [["x"]]})


def test_too_many_prompts_are_not_looked_at(ask, engine):
    error = refused(ask, engine, COMPLETION, TEXT | {"prompt": [[1]] * 1024 + [["x"]]})
    assert (error["param"], error["message"]) == ("prompt", "prompt holds 1025 prompts, more than 1024")


def test_more_about_prompts_than_can_be_told(ask, engine):
    error = refused(ask, engine, COMPLETION, TEXT | {"prompt": [[3] * 100] * 500, "prompt_logprobs": 20})
    assert error["message"].startswith("the prompts have 50000 tokens, which with their alternatives are 1050000 log")


def test_special_tokens_without_end(ask, engine, tokenizer, monkeypatch):
    calls, encode = [], tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda *given: calls.append(given) or encode(*given))
    messages = [{"role": "user", "content": "</s>" * 300}]
    error = ask(CHAT, TALK | {"messages": messages}).json()["error"]
    assert (error["param"], len(calls) < 200, engine.seen) == ("messages", True, [])
    assert "more tokens than the model length of 256" in error["message"]
    messages[0]["content"] *= 1000
    error = ask(CHAT, TALK | {"messages": messages}).json()["error"]
    assert (error["param"], len(calls) < 200, engine.seen) == ("messages", True, [])
    assert "is too long: its messages and tools have more than" in error["message"]
    messages[0]["content"] = "x " * 2000
    assert "tokens at the very least" in ask(CHAT, TALK | {"messages": messages}).json()["error"]["message"]


def test_the_body_is_checked_before_the_model(ask, engine):
    assert refused(ask, engine, COMPLETION, {"model": "gone", "prompt": "x", "n": 0})["param"] == "n"
    engine.seen.clear()
    error = refused(ask, engine, COMPLETION, {"model": "gone", "prompt": "x"}, 404)
    assert error == {
        "message": "the model 'gone' is not served here, 'storyteller' is",
        "type": "NotFoundError",
        "param": "model",
        "code": 404,
    }
    engine.seen.clear()
    refused(ask, engine, CHAT, TALK | {"model": "\ud800"}, 404)


def test_bodies_over_the_limit(ask, engine):
    body = json.dumps(TEXT | {"prompt": "x" * (33 << 20)}).encode()
    error = refused(ask, engine, COMPLETION, body, 413)
    assert error["message"] == "the body is larger than the limit of 33554432 bytes"

    async def chunks():
        for _ in range(34):
            yield b" " * (1 << 20)

    r = ask(COMPLETION, method="POST", content=chunks())
    assert r.status_code == 413


def test_bodies_share_memory_until_they_are_parsed(app, run, monkeypatch):
    monkeypatch.setattr(body_module, "MAX_HELD_BYTES", 1 << 20)
    large = json.dumps(TEXT | {"prompt": "x" * (600 << 10)}).encode()

    async def main():
        sent, go_on = asyncio.Event(), asyncio.Event()

        async def slow():
            yield large[:-1]
            sent.set()
            await go_on.wait()
            yield large[-1:]

        async with client_of(app) as client:
            first = asyncio.create_task(client.post(COMPLETION, content=slow()))
            await sent.wait()
            full = await client.post(COMPLETION, content=large)
            small = await client.post(COMPLETION, json=TEXT)
            packed = gzip.compress(large)
            unpacked = await client.post(COMPLETION, content=packed, headers={"Content-Encoding": "gzip"})
            go_on.set()
            return full, small, unpacked, await first, await client.post(COMPLETION, content=large)

    full, small, unpacked, first, later = run(main())
    assert [r.status_code for r in (full, small, unpacked, first, later)] == [503, 200, 503, 400, 400]
    assert full.headers["retry-after"] == "1"
    assert "characters" in first.json()["error"]["message"]  # it was read, and is too long for the model


def test_a_model_without_a_chat_template(app, ask, monkeypatch, tokenizer):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    r = ask(CHAT, TALK)
    assert r.status_code == 400
    assert "no chat template; send a text to /v1/completions" in r.json()["error"]["message"]


def test_unknown_routes_and_methods(ask):
    for path in ("/v1/nothing", "/v1/completions/", "//v1/models", "/v1/%2e%2e/models", "/v1/models%00", "/docs"):
        r = ask(path)
        assert r.status_code == 404, path
        assert r.json()["error"]["type"] == "NotFoundError"
    r = ask(COMPLETION)
    assert (r.status_code, r.json()["error"]["code"], r.headers["allow"]) == (405, 405, "POST")


def test_a_full_queue_and_a_dead_engine(ask, engine):
    engine.full = True
    r = ask(COMPLETION, TEXT | {"stream": True})
    assert (r.status_code, r.json()["error"]["type"]) == (429, "TooManyRequestsError")
    assert r.headers["retry-after"] == "1"
    engine.full, engine.down = False, True
    assert ask(COMPLETION, TEXT).status_code == 503
    assert ask("/health").status_code == 503


def test_one_refused_prompt_of_many_ends_the_others(ask, engine, monkeypatch):
    submit, calls = engine.submit, []

    async def third_is_refused(request):
        calls.append(request)
        engine.full = len(calls) == 3
        return await submit(request)

    monkeypatch.setattr(engine, "submit", third_is_refused)
    assert ask(COMPLETION, TEXT | {"prompt": ["a"] * 4}).status_code == 429
    assert (len(engine.seen), len(engine.aborted), len(engine.running)) == (3, 3, 0)


@pytest.mark.parametrize(("attribute", "status"), [("fail_after", 500), ("abort_after", 503)])
def test_failures_on_the_way(ask, engine, attribute, status):
    setattr(engine, attribute, 3)
    assert ask(CHAT, TALK).status_code == status
    assert ask(COMPLETION, TEXT | {"prompt": ["a", "b"]}).status_code == status
    r = ask(CHAT, TALK | {"stream": True})
    *chunks, error, done = sse(r.text)
    assert (r.status_code, done, error["error"]["code"]) == (200, "[DONE]", status)
    assert len(chunks) == 4  # the role and three tokens
    assert not engine.running


def test_a_fault_of_ours_is_a_500_and_tells_nothing(ask, engine, monkeypatch, caplog):
    def broken(request):
        raise KeyError("/secret/path")

    monkeypatch.setattr(engine, "submit", broken)
    r = ask(COMPLETION, TEXT)
    assert (r.status_code, r.json()["error"]["message"]) == (500, "the server failed: KeyError")
    assert "secret" in caplog.text


def test_a_hung_engine_is_not_healthy(ask, engine, monkeypatch):
    assert ask("/health").status_code == 200
    monkeypatch.setattr("fewbit.serve.service._PROBE_S", 0.05)
    engine.hung = True
    assert ask("/health").status_code == 503
    assert "fewbit:engine_up{" in ask("/metrics").text

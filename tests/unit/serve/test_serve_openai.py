"""OpenAI's routes answer in OpenAI's shapes, whole and streamed."""

from __future__ import annotations

import pytest
from serve_names import CHAT, COMPLETION, SAYS, sse

TEXT = {"model": "storyteller", "prompt": "Count:", "max_tokens": 100}
TALK = {"model": "storyteller", "messages": [{"role": "user", "content": "Count!"}]}


def test_models(ask):
    card = ask("/v1/models").json()["data"][0]
    assert ask("/v1/models").json()["object"] == "list"
    assert card.pop("created") > 1_700_000_000
    assert card == {
        "id": "storyteller",
        "object": "model",
        "owned_by": "fewbit",
        "root": "storyteller",
        "parent": None,
        "max_model_len": 256,
        "permission": [],
    }


def test_a_whole_completion(ask, tokenizer, engine):
    r = ask(COMPLETION, TEXT)
    body = r.json()
    assert (r.status_code, r.headers["content-type"]) == (200, "application/json")
    assert body["id"].startswith("cmpl-")
    assert (body["object"], body["model"]) == ("text_completion", "storyteller")
    assert body["choices"] == [
        {"index": 0, "text": SAYS, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    ]
    prompt, output = len(tokenizer.encode("Count:")), len(engine.says)
    assert body["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": 3},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
    assert engine.seen[0].prompt == tuple(tokenizer.encode("Count:"))


def test_a_whole_chat(ask, tokenizer, engine):
    body = ask(CHAT, TALK).json()
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": SAYS},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    rendered = "<s><|user|>Count!\n<|assistant|>"
    assert engine.seen[0].prompt == tuple(tokenizer.encode(rendered, add_special_tokens=False))
    assert engine.seen[0].params.max_tokens == 256 - len(engine.seen[0].prompt)


def test_a_streamed_completion(ask):
    r = ask(COMPLETION, TEXT | {"stream": True})
    assert r.headers["content-type"].startswith("text/event-stream")
    *chunks, done = sse(r.text)
    assert done == "[DONE]"
    assert "".join(c["choices"][0]["text"] for c in chunks) == SAYS
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len({c["id"] for c in chunks}) == 1
    assert {c["object"] for c in chunks} == {"text_completion"}
    assert not any("usage" in c or "\ufffd" in c["choices"][0]["text"] for c in chunks)


def test_a_streamed_chat(ask):
    *chunks, done = sse(ask(CHAT, TALK | {"stream": True, "stream_options": {"include_usage": True}}).text)
    first, *middle, last, usage = chunks
    assert done == "[DONE]"
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"] == [
        {
            "index": 0,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
            "stop_reason": None,
        }
    ]
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in [first, *middle, last]) == SAYS
    assert all(c["choices"][0]["finish_reason"] is None for c in middle)
    assert last["choices"][0]["finish_reason"] == "stop"
    assert all(c["usage"] is None for c in [first, *middle, last])
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] > 5


def test_the_limit_of_tokens(ask, tokenizer, engine):
    body = ask(COMPLETION, TEXT | {"max_tokens": 4}).json()
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["choices"][0]["text"] == tokenizer.decode(engine.says[:4])
    assert body["usage"]["completion_tokens"] == 4
    engine.says *= 2
    assert ask(COMPLETION, {"prompt": "x"}).json()["usage"]["completion_tokens"] == 16
    for name in ("max_tokens", "max_completion_tokens"):
        assert ask(CHAT, TALK | {name: 3}).json()["usage"]["completion_tokens"] == 3


def test_the_limit_on_the_last_streamed_chunk(ask, tokenizer, engine):
    *chunks, _ = sse(ask(CHAT, TALK | {"max_tokens": 3, "stream": True}).text)
    assert chunks[-1]["choices"][0] == {
        "index": 0,
        "delta": {"content": tokenizer.decode(engine.says[2:3])},
        "logprobs": None,
        "finish_reason": "length",
        "stop_reason": None,
    }


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings(ask, engine, stream):
    r = ask(COMPLETION, TEXT | {"stop": ["trois", "zzz"], "stream": stream})
    choices = [c["choices"][0] for c in (sse(r.text)[:-1] if stream else [r.json()])]
    assert "".join(c["text"] for c in choices) == "un, deux, "
    assert (choices[-1]["finish_reason"], choices[-1]["stop_reason"]) == ("stop", "trois")
    assert len(engine.aborted) == 1
    assert not engine.running
    if not stream:
        assert r.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 16  # said by the abort's ending
        assert r.json()["usage"]["completion_tokens"] < len(engine.says)


def test_stop_in_the_output_and_stop_tokens(ask, tokenizer, engine):
    body = TEXT | {"stop": "trois", "include_stop_str_in_output": True}
    assert ask(COMPLETION, body).json()["choices"][0]["text"] == "un, deux, trois"
    token = engine.says[1]
    choice = ask(COMPLETION, TEXT | {"stop_token_ids": [token]}).json()["choices"][0]
    assert (choice["text"], choice["stop_reason"]) == (tokenizer.decode(engine.says[:1]), token)
    body = TEXT | {"stop_token_ids": [token], "include_stop_str_in_output": True}
    assert ask(COMPLETION, body).json()["choices"][0]["text"] == tokenizer.decode(engine.says[:2])


def test_every_form_of_prompt(ask, tokenizer, engine):
    ids = tokenizer.encode("six sept")
    for prompt, wanted in (
        ("six sept", [ids]),
        (["six sept", "un"], [ids, tokenizer.encode("un")]),
        (ids, [ids]),
        ([ids, [5]], [ids, [5]]),
    ):
        engine.seen.clear()
        body = ask(COMPLETION, TEXT | {"prompt": prompt}).json()
        assert [list(r.prompt) for r in engine.seen] == wanted
        assert [c["index"] for c in body["choices"]] == list(range(len(wanted)))
        assert body["usage"]["prompt_tokens"] == sum(map(len, wanted))


@pytest.mark.parametrize("stream", [False, True])
def test_several_choices_of_several_prompts(ask, engine, stream):
    asked = TEXT | {"prompt": ["a", "b"], "n": 3, "seed": 7, "stream": stream}
    if stream:
        asked["stream_options"] = {"include_usage": True}
    r = ask(COMPLETION, asked)
    texts = [""] * 6
    for chunk in sse(r.text)[:-1] if stream else [r.json()]:
        for c in chunk["choices"]:
            texts[c["index"]] += c["text"]
    assert texts == [SAYS] * 6
    usage = chunk["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (4, 6 * len(engine.says))
    seeds = [r.params.seed for r in engine.seen]
    assert seeds[0] == 7
    assert seeds[:3] == seeds[3:]
    assert len(set(seeds)) == 3


def test_every_sampling_field_reaches_the_engine(ask, engine):
    fields = {
        "max_tokens": 9,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": -0.5,
        "frequency_penalty": 2,
        "seed": 2**64 - 1,
        "ignore_eos": True,
        "stop_token_ids": [7, 8],
    }
    no_effect = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "safety_identifier": "x",
        "prompt_cache_key": "y",
        "logit_bias": {},
        "response_format": {"type": "text"},
    }
    assert ask(CHAT, TALK | fields | no_effect | {"tools": None, "n": None, "stop": None}).status_code == 200
    params = engine.seen[0].params
    for name, value in fields.items():
        assert getattr(params, name) == (tuple(value) if isinstance(value, list) else value)
    assert params.logprobs is None


def test_special_tokens_in_the_text(ask, tokenizer, engine):
    engine.says = [5, 1, 6]
    assert ask(COMPLETION, TEXT).json()["choices"][0]["text"] == tokenizer.decode([5, 6])
    shown = ask(COMPLETION, TEXT | {"skip_special_tokens": False}).json()["choices"][0]["text"]
    assert shown == tokenizer.decode([5, 1, 6], skip_special_tokens=False)


def test_echo(ask, tokenizer):
    assert ask(COMPLETION, TEXT | {"echo": True}).json()["choices"][0]["text"] == "Count:" + SAYS
    ids = tokenizer.encode("six")
    assert ask(COMPLETION, TEXT | {"echo": True, "prompt": ids}).json()["choices"][0]["text"] == "six" + SAYS
    *chunks, _ = sse(ask(COMPLETION, TEXT | {"echo": True, "prompt": ["a", "b"], "n": 2, "stream": True}).text)
    texts = [""] * 4
    for c in chunks:
        texts[c["choices"][0]["index"]] += c["choices"][0]["text"]
    assert texts == ["a" + SAYS] * 2 + ["b" + SAYS] * 2


@pytest.mark.parametrize("stream", [False, True])
def test_completion_logprobs(ask, tokenizer, engine, stream):
    engine.says = tokenizer.encode("un deux", add_special_tokens=False)
    r = ask(COMPLETION, TEXT | {"logprobs": 3, "stream": stream})
    parts = [c["choices"][0]["logprobs"] for c in (sse(r.text)[:-1] if stream else [r.json()])]
    joined = {k: [x for p in parts for x in p[k]] for k in parts[0]}
    assert "".join(joined["tokens"]) == "un deux"
    assert joined["token_logprobs"] == [-0.5] * len(engine.says)
    assert joined["text_offset"][0] == 0
    assert joined["text_offset"][-1] == len("un deux") - len(joined["tokens"][-1])
    first = joined["top_logprobs"][0]
    assert first[joined["tokens"][0]] == -0.5
    assert min(first.values()) == -9999.0  # JSON has no infinity
    assert len(first) == 3


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs(ask, tokenizer, engine, stream):
    r = ask(CHAT, TALK | {"logprobs": True, "top_logprobs": 2, "stream": stream})
    choices = [c["choices"][0] for c in (sse(r.text)[:-1] if stream else [r.json()])]
    tokens = [t for c in choices if c["logprobs"] for t in c["logprobs"]["content"]]
    assert len(tokens) == len(engine.says)
    assert bytes(b for t in tokens for b in t["bytes"]).decode() == SAYS
    assert tokens[0]["token"] == tokenizer.decode(engine.says[:1])
    assert [t["logprob"] for t in tokens[0]["top_logprobs"]] == [-0.5, -1.5]
    plain = ask(CHAT, TALK | {"logprobs": True}).json()["choices"][0]["logprobs"]["content"]
    assert plain[0]["top_logprobs"] == []


def test_content_as_parts_and_messages_sent_back(ask, tokenizer, engine):
    back = ask(CHAT, TALK).json()["choices"][0]["message"] | {"refusal": None, "tool_calls": None, "audio": None}
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "system", "content": "s"}, back, {"role": "user", "content": parts, "name": "n"}]
    assert ask(CHAT, TALK | {"messages": messages}).status_code == 200
    rendered = f"<s><|system|>s\n<|assistant|>{SAYS}\n<|user|>a\nb\n<|assistant|>"
    assert engine.seen[-1].prompt == tuple(tokenizer.encode(rendered, add_special_tokens=False))


def test_the_model_may_be_left_out(ask):
    assert ask(COMPLETION, {"prompt": "x"}).json()["model"] == "storyteller"

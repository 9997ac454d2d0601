"""Fields beyond the common ones: what reaches the engine, and what comes back."""

from __future__ import annotations

import asyncio
import sys
import threading

import pytest
from serve_names import CHAT, COMPLETION, SAYS, models_of, sse

from fewbit.serve.connection import PING, EventStream
from fewbit.serve.openai import Completion, CompletionRequest, parsed
from fewbit.serve.problems import json_bytes
from virtual_time import run_virtually

TEXT = {"model": "storyteller", "prompt": "Count:", "max_tokens": 100}
TALK = {"model": "storyteller", "messages": [{"role": "user", "content": "Count!"}]}


def test_what_the_engine_is_asked(ask, engine, tokenizer):
    fields = {
        "logit_bias": {"5": -100, "6": 0.5},
        "allowed_token_ids": [7, 8],
        "bad_words": ["", "six", " sept"],
        "priority": -3,
        "cache_salt": "mine",
        "prompt_logprobs": 2,
    }
    assert ask(COMPLETION, TEXT | fields).status_code == 200
    (asked,) = engine.seen
    assert (asked.priority, asked.salt) == (-3, "mine")
    assert asked.params.logit_bias == ((5, -100.0), (6, 0.5))
    assert asked.params.allowed_token_ids == (7, 8)
    words = {tokenizer.decode(word) for word in asked.params.bad_words}
    assert words == {"six", " six", " sept"}
    assert asked.params.prompt_logprobs == 2
    engine.seen.clear()
    assert ask(COMPLETION, TEXT | {"bad_words": [""], "logit_bias": {}}).status_code == 200
    assert (engine.seen[0].params.bad_words, engine.seen[0].params.logit_bias) == ((), ())


def test_a_request_s_name(ask):
    r = ask(COMPLETION, TEXT | {"request_id": "mine-1"}, headers={"X-Request-ID": "other"})
    assert (r.json()["id"], r.headers["x-request-id"]) == ("cmpl-mine-1", "mine-1")
    r = ask(CHAT, TALK | {"stream": True}, headers={"X-Request-ID": "other"})
    assert ({c["id"] for c in sse(r.text)[:-1]}, r.headers["x-request-id"]) == ({"chatcmpl-other"}, "other")
    for odd in ("a b", "a" * 200, ""):
        r = ask(CHAT, TALK, headers={"X-Request-ID": odd})
        assert r.json()["id"] == f"chatcmpl-{r.headers['x-request-id']}"
        assert len(r.headers["x-request-id"]) == 32


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_log_probabilities(ask, tokenizer, engine, stream):
    """The shape that lm-eval reads: the prompt's tokens, then the answer's, null for the first."""
    prompt = tokenizer.encode("six sept 🙂 huit")
    asked = {"prompt": prompt, "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0, "stream": stream}
    r = ask(COMPLETION, asked)
    choices = [c["choices"][0] for c in (sse(r.text)[:-1] if stream else [r.json()])]
    text = "".join(c["text"] for c in choices)
    parts = [c["logprobs"] for c in choices]
    found = {key: [x for p in parts for x in p[key]] for key in parts[0]}
    assert text == "six sept 🙂 huit" + tokenizer.decode(engine.says[:1])
    assert {len(column) for column in found.values()} == {len(prompt) + 1}
    assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
    for logprob, top, token in zip(
        found["token_logprobs"][1:], found["top_logprobs"][1:], found["tokens"][1:], strict=True
    ):
        assert top[token] == logprob  # the identical float
    for token, at in zip(found["tokens"], found["text_offset"], strict=True):
        assert token == "<s>" or token.startswith("bytes:") or text[at : at + len(token)] == token
    pieces = [at for token, at in zip(found["tokens"], found["text_offset"], strict=True) if token.startswith("bytes:")]
    assert len(pieces) > 1  # of the one character
    assert {text[at] for at in pieces} == {"🙂"}


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("as_ids", [True, False])
def test_offsets_where_special_tokens_stand_around(ask, tokenizer, engine, skip, as_ids):
    prompt = "un</s> deux"
    asked = {"prompt": tokenizer.encode(prompt) if as_ids else prompt, "skip_special_tokens": skip}
    body = ask(COMPLETION, asked | {"max_tokens": 2, "logprobs": 0, "echo": True}).json()
    text, found = body["choices"][0]["text"], body["choices"][0]["logprobs"]
    assert text[: -len(tokenizer.decode(engine.says[:2]))] == (
        ("un deux" if skip else "<s>un</s> deux") if as_ids else prompt
    )
    for token, at in zip(found["tokens"], found["text_offset"], strict=True):
        shown = token in text or token not in ("<s>", "</s>")
        assert not shown or text[at : at + len(token)] == token, (token, at)


def test_nothing_but_the_prompt(ask, tokenizer):
    body = ask(COMPLETION, TEXT | {"max_tokens": 0, "echo": True, "logprobs": 0}).json()
    (choice,) = body["choices"]
    ids = tokenizer.encode("Count:")
    assert (choice["text"], choice["finish_reason"]) == ("Count:", "length")
    assert len(choice["logprobs"]["tokens"]) == len(ids) == body["usage"]["prompt_tokens"]
    assert body["usage"]["completion_tokens"] == 0
    longest = ask(COMPLETION, {"prompt": [3] * 256, "max_tokens": 0, "echo": True})
    assert longest.status_code == 200
    chat = ask(CHAT, TALK | {"max_tokens": 0, "prompt_logprobs": 1}).json()
    assert chat["choices"][0]["message"]["content"] == ""


def test_prompt_logprobs_as_vllm_has_them(ask, tokenizer):
    ids = tokenizer.encode("Count:")
    found = ask(COMPLETION, TEXT | {"prompt_logprobs": 2}).json()["choices"][0]["prompt_logprobs"]
    assert found[0] is None
    assert len(found) == len(ids)
    for token, entry in zip(ids[1:], found[1:], strict=True):
        assert entry[str(token)] == {"logprob": -0.5, "rank": 1, "decoded_token": tokenizer.decode([token])}
        assert sorted(e["rank"] for e in entry.values()) == [1, 2]
    only = ask(COMPLETION, TEXT | {"prompt_logprobs": 0}).json()["choices"][0]["prompt_logprobs"]
    assert [next(iter(e.values()))["rank"] for e in only[1:]] == [None] * (len(ids) - 1)
    assert len(ask(CHAT, TALK | {"prompt_logprobs": 1}).json()["prompt_logprobs"]) > 5


@pytest.mark.parametrize("stream", [False, True])
def test_a_large_answer_is_made_beside_the_event_loop(ask, monkeypatch, stream):
    threads = []

    def written(content):
        threads.append(threading.current_thread())
        return json_bytes(content)

    for module in ("fewbit.serve.problems", "fewbit.serve.openai.answer"):
        monkeypatch.setattr(sys.modules[module], "json_bytes", written)
    asked = {"prompt": [3] * 250, "max_tokens": 1, "logprobs": 20, "echo": True, "stream": stream}
    assert ask(COMPLETION, asked).status_code == 200
    assert threads[0] is not threading.main_thread()


def test_others_go_on_between_many_prompts(run, engine, tokenizer):
    async def turns() -> int:
        (service,) = models_of(tokenizer, storyteller=engine).ready
        work = asyncio.create_task(Completion(service, parsed(CompletionRequest, {"prompt": ["un"] * 100})).jobs())
        taken = 0
        while not work.done():
            await asyncio.sleep(0)
            taken += 1
        return taken

    assert run(turns()) >= 100


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_as_ids(ask, tokenizer, engine, stream):
    asked = {"return_token_ids": True, "stream": stream, "return_tokens_as_token_ids": True}
    r = ask(COMPLETION, TEXT | asked | {"logprobs": 1, "prompt": ["Count:", "x"]})
    choices = [c for body in (sse(r.text)[:-1] if stream else [r.json()]) for c in body["choices"]]
    for i, prompt in enumerate(("Count:", "x")):
        own = [c for c in choices if c["index"] == i]
        assert own[0]["prompt_token_ids"] == tokenizer.encode(prompt)
        assert [t for c in own for t in c["token_ids"]] == engine.says
        named = [t for c in own if c["logprobs"] for t in c["logprobs"]["tokens"]]
        assert named == [f"token_id:{t}" for t in engine.says]
    r = ask(CHAT, TALK | asked)
    bodies = sse(r.text)[:-1] if stream else [r.json()]
    assert bodies[0]["prompt_token_ids"] == list(engine.seen[-1].prompt)
    assert [t for b in bodies for t in b["choices"][0].get("token_ids", [])] == engine.says


def test_running_token_counts(ask, engine):
    options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    *chunks, usage, done = sse(ask(COMPLETION, TEXT | options).text)
    counts = [c["usage"]["completion_tokens"] for c in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == usage["usage"]["completion_tokens"] == len(engine.says)
    assert {c["usage"]["prompt_tokens"] for c in chunks} == {usage["usage"]["prompt_tokens"]}
    assert (usage["choices"], done) == ([], "[DONE]")


def test_prompts_are_cut_where_that_was_asked_for(ask, tokenizer, engine):
    ids = tokenizer.encode("six sept huit neuf")
    body = ask(COMPLETION, TEXT | {"prompt": "six sept huit neuf", "truncate_prompt_tokens": 3, "echo": True}).json()
    assert engine.seen[-1].prompt == tuple(ids[-3:])
    assert body["choices"][0]["text"] == tokenizer.decode(ids[-3:]) + SAYS
    ask(COMPLETION, TEXT | {"prompt": ids, "truncate_prompt_tokens": 99})
    assert engine.seen[-1].prompt == tuple(ids)
    assert ask(COMPLETION, TEXT | {"prompt": "x " * 4000, "truncate_prompt_tokens": 10}).status_code == 200
    ask(CHAT, TALK | {"truncate_prompt_tokens": 2})
    assert len(engine.seen[-1].prompt) == 2


def test_special_tokens_before_a_prompt(ask, tokenizer, engine):
    ask(COMPLETION, TEXT | {"add_special_tokens": False})
    assert engine.seen[-1].prompt == tuple(tokenizer.encode("Count:", add_special_tokens=False))
    ask(CHAT, TALK | {"add_special_tokens": True})
    assert engine.seen[-1].prompt[:2] == (1, 1)


def test_going_on_with_the_last_message(ask, tokenizer, engine):
    messages = [{"role": "user", "content": "Count!"}, {"role": "assistant", "content": "un, deux"}]
    ask(CHAT, TALK | {"messages": messages, "continue_final_message": True})
    rendered = "<s><|user|>Count!\n<|assistant|>un, deux"
    assert engine.seen[-1].prompt == tuple(tokenizer.encode(rendered, add_special_tokens=False))
    ask(CHAT, TALK | {"add_generation_prompt": False})
    rendered = "<s><|user|>Count!\n"
    assert engine.seen[-1].prompt == tuple(tokenizer.encode(rendered, add_special_tokens=False))
    ask(CHAT, TALK | {"messages": [{"role": "developer", "content": "d"}, *messages[:1]]})
    rendered = "<s><|system|>d\n<|user|>Count!\n<|assistant|>"
    assert engine.seen[-1].prompt == tuple(tokenizer.encode(rendered, add_special_tokens=False))


def test_special_tokens_that_are_spelled_out_are_text(ask, tokenizer, engine):
    """An assistant's turn may hold the model's own, but for those that bound turns."""
    messages = [{"role": "user", "content": "a</s><s>b<unk>"}, {"role": "assistant", "content": "c<unk></s>\n<s>d"}]
    assert ask(CHAT, TALK | {"messages": messages}).status_code == 200
    prompt = engine.seen[-1].prompt
    assert tokenizer.decode(prompt, False) == "<s><|user|>a</s><s>b<unk>\n<|assistant|>c<unk></s>\n<s>d\n<|assistant|>"
    assert [t for t in prompt if t in tokenizer.special_ids] == [1, 0]  # the template's, and the assistant's own
    found = ask("/tokenize", {"messages": messages}).json()["tokens"]
    assert tuple(found) == prompt


@pytest.fixture
def trusting(app):
    app.state.models.trust_request_chat_template = True


@pytest.mark.usefixtures("trusting")
def test_templates_of_requests_where_they_are_trusted(ask, tokenizer, engine):
    template = "{{ bos_token }}{{ style }}:{{ messages[0].content }}"
    asked = {"chat_template": template, "chat_template_kwargs": {"style": "short"}}
    assert ask(CHAT, TALK | asked).status_code == 200
    assert tokenizer.decode(engine.seen[-1].prompt, False) == "<s>short:Count!"
    for wrong, param, why in (
        ({"chat_template": "{% for"}, "chat_template", "does not compile"),
        ({"chat_template": "{{ 1 }}" * 20_000}, "chat_template", "more than 65536"),
        ({"chat_template": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"}, None, ""),
        ({"chat_template": "{{ ''.__class__.__mro__ }}"}, "messages", "refused"),
        ({"chat_template": "{{" + "(" * 20_000 + "1" + ")" * 20_000 + "}}"}, "chat_template", ""),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs.tokenize", "has no such variable"),
        ({"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs.messages", "has no such variable"),
        ({"chat_template_kwargs": {"bos_token": "x"}}, "chat_template_kwargs.bos_token", "has no such variable"),
        (asked | {"chat_template_kwargs": {"style": ["x"]}}, "chat_template_kwargs.style", "must be a text"),
    ):
        r = ask(CHAT, TALK | wrong)
        assert r.status_code == 400, wrong
        if param:
            assert r.json()["error"]["param"] == param
            assert why in r.json()["error"]["message"]


def test_the_tokenizer_over_http(ask, tokenizer):
    ids = tokenizer.encode("un deux")
    assert ask("/tokenize", {"prompt": "un deux"}).json() == {
        "count": len(ids),
        "max_model_len": 256,
        "tokens": ids,
        "token_strs": None,
    }
    found = ask("/tokenize", {"prompt": "un deux", "add_special_tokens": False, "return_token_strs": True}).json()
    assert "".join(found["token_strs"]) == "un deux"
    assert ask("/detokenize", {"tokens": ids}).json() == {"prompt": "<s>un deux"}
    chat = ask("/tokenize", {"messages": TALK["messages"]}).json()
    assert tokenizer.decode(chat["tokens"], False) == "<s><|user|>Count!\n<|assistant|>"
    assert ask("/tokenizer_info").json() == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "vocab_size": tokenizer.vocab_size,
        "model_max_length": 256,
        "chat_template": tokenizer.chat_template.source,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": None,
        "pad_token": None,
    }
    for path, body, param in (
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/tokenize", {"prompt": "x", "prompts": 1}, "prompts"),
        ("/tokenize", {"prompt": "x" * 10**6}, "prompt"),
        ("/detokenize", {"tokens": [10**9]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
    ):
        r = ask(path, body)
        assert (r.status_code, r.json()["error"]["param"]) == (400, param), (path, body)
    assert ask("/tokenize", {"prompt": "x", "model": "gone"}).status_code == 404


def test_one_model_and_the_other_prefix(ask):
    assert ask("/v1/models/storyteller").json() == ask("/v1/models").json()["data"][0]
    assert ask("/v1/models/gone").status_code == 404
    assert ask("/openai/v1/models").json() == ask("/v1/models").json()
    assert ask("/openai/v1/completions", TEXT).json()["choices"][0]["text"] == SAYS
    assert ask("/openai/v1/chat/completions", TALK).json()["choices"][0]["message"]["content"] == SAYS


def test_a_silent_stream_says_so():
    async def main() -> list[bytes]:
        async def events():
            await asyncio.sleep(40)
            yield b"data: 1\n\n"
            await asyncio.sleep(40)

        sent = []

        async def send(message):
            sent.append(message.get("body"))

        async def receive():
            await asyncio.sleep(600)

        await EventStream(events())({}, receive, send)
        return sent[1:]

    sent = run_virtually(main())
    assert sent == [PING, PING, b"data: 1\n\n", PING, PING, b""]
    assert all(line.startswith(b":") or not line for line in PING.splitlines())


def test_a_stream_whose_client_has_left_is_closed():
    async def main() -> None:
        async def events():
            yield b"data: 1\n\n"

        async def send(message):
            raise OSError

        async def receive():
            await asyncio.sleep(60)

        made = events()
        await EventStream(made)({}, receive, send)
        assert await anext(made, None) is None

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_thoughts_are_told_apart(ask, engine, tokenizer, monkeypatch, stream):
    monkeypatch.setattr(tokenizer.chat_template, "source", tokenizer.chat_template.source + "{# </think> #}")
    engine.says = tokenizer.encode("<think>un deux</think>\n\ntrois", add_special_tokens=False)
    r = ask(CHAT, TALK | {"stream": stream, "stream_options": {"include_usage": True} if stream else None})
    bodies = sse(r.text)[:-1] if stream else [r.json()]
    parts = [c["delta"] if stream else c["message"] for b in bodies for c in b["choices"]]
    assert "".join(p.get("reasoning", "") for p in parts) == "un deux"
    assert "".join(p.get("content") or "" for p in parts) == "trois"
    counted = bodies[-1]["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert 0 < counted < len(engine.says)

"""What a client can get wrong in a request, or do on purpose: an error within a second, and nothing has changed.

The table goes through bodies, numbers, prompts, stop strings and addresses; the engine is real, with real blocks.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from real_server import CHAT, COMPLETION, GENERATE, GOLDEN, Answer, Server, sampled

VOCAB, LENGTH = 4096, 2048  # of the model that is served
TALK = {"messages": [{"role": "user", "content": "Tell me."}], "max_tokens": 4}
TEXT = {"prompt": "The old fox", "max_tokens": 4}
INPUT = {"text_input": "The old fox", "max_tokens": 4}
REFUSED = range(400, 500)
NESTED = b'{"prompt": ' + b"[" * 20_000 + b"]" * 20_000 + b"}"


def said(content: Any, **more: Any) -> dict[str, Any]:
    return TALK | {"messages": [{"role": "user", "content": content} | more]}


def image(url: str) -> dict[str, Any]:
    return said([{"type": "image_url", "image_url": {"url": url}}])


def number(text: str, field: str = "temperature") -> bytes:
    """A body with a number that json.dumps would not write."""
    return b'{"prompt": "x", "%s": %s}' % (field.encode(), text.encode())


BODIES: dict[str, bytes] = {
    "nothing": b"",
    "spaces": b"  \n\t",
    "an array": b"[]",
    "null": b"null",
    "a string": b'"x"',
    "a number": b"1",
    "half an object": b'{"prompt": "x"',
    "two objects": b'{"prompt": "x"}{"prompt": "x"}',
    "a form": b"prompt=x&max_tokens=3",
    "XML": b"<prompt>x</prompt>",
    "not UTF-8": b'{"prompt": "\xff\xfe"}',
    "UTF-8 in too many bytes": b'{"prompt": "\xc0\x80"}',
    "a surrogate in UTF-8": b'{"prompt": "\xed\xa0\x80"}',
    "UTF-16": json.dumps(TEXT).encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf" + json.dumps(TEXT).encode(),
    "NUL": b'{"prompt": "a\x00"}',
    "only NUL": b"\x00" * 1000,
    "a key twice": b'{"prompt": "x", "prompt": "y"}',
    "a key twice, inside": b'{"prompt": "x", "stream_options": {"a": 1, "a": 2}}',
    "20000 arrays": NESTED,
    "20000 objects": b'{"prompt": ' + b'{"a":' * 20_000 + b"1" + b"}" * 20_001,
    "20000 arrays that never end": b'{"prompt": ' + b"[" * 20_000,
    "NaN": number("NaN"),
    "Infinity": number("Infinity"),
    "-Infinity": number("-Infinity"),
    "1e400": number("1e400"),
    "-1e400": number("-1e400"),
    "2 to the 64": number(str(2**64), "max_tokens"),
    "a million digits": number("9" * 1_000_000, "max_tokens"),
    "a million digits behind the point": number("0." + "1" * 1_000_000 + "e999"),
    "200000 keys": json.dumps({str(i): 1 for i in range(200_000)}).encode(),
    "a key of a megabyte": b'{"' + b"k" * 1_000_000 + b'": 1}',
    "a value of a megabyte": b'{"model": ' + b'"' + b"v" * 1_000_000 + b'", "prompt": 3}',
}

FIELDS: dict[str, tuple[str, dict[str, Any]]] = {
    f"{name} {value!r:.40}": (COMPLETION, TEXT | {name: value})
    for name, values in {
        "n": (0, -1, 10**9, 2**63, "1", 1.5, True, []),
        "max_tokens": (-1, 10**12, "10", 10.0, True, LENGTH, [1], {}),
        "min_tokens": (-1, 5, 10**12, "1"),
        "temperature": (-1, -1e-9, "hot", True, []),
        "top_p": (0, -1, 2, 1.0000001, "1"),
        "top_k": (-2, 1.5, "5"),
        "min_p": (-0.1, 1.1, "0"),
        "logprobs": (-2, 21, 10**6, True, "5"),
        "seed": (-1, 2**64 - 1 + 1, 1.5, "1"),
        "presence_penalty": (1e9, -1e9, 2.1, "1"),
        "frequency_penalty": (1e9, -1e9, -2.1, True),
        "repetition_penalty": (0, -1, "1"),
        "logit_bias": ({"4096": 1}, {"-1": 1}, {"x": 1}, {"1.5": 1}, {"1": "x"}, {"1": 101}, {"1": 1e308}, [], 3),
        "priority": (10**30, "high", 1.5),
        "stop_token_ids": ([-1], [VOCAB], ["a"], [True], [1.0], [1] * 2000, 3, ["a"] * 100_000),
        "allowed_token_ids": ([-1], [VOCAB], ["a"], 3),
        "stop": ("", [""], ["a"] * 10_000, "x" * 1_000_000, [1], 7, [["a"]], {"a": 1}, ["a", None]),
        "bad_words": ([1], 7, {"a": 1}),
        "stream": (1, "true", []),
        "stream_options": ({"include_usage": True}, [], "x"),
        "echo": (1, "yes"),
        "model": ("gone", "../storyteller", "/etc/passwd", "storyteller/../x", "", 3, "x" * 100_000, "\ud800", "a\0b"),
        "prompt": (
            *([], [[]], [-1], [VOCAB], [2**63], [True], [1.0], [[True]], [[1], "a"], ["a", 1], None, 3, {}),
            *([None], [3] * LENGTH, [3] * (LENGTH + 1), "x" * 10_000_000, "a" * 200_000),
            *(["a"] * 100_000, [[3]] * 100_000, "\ud800", "a\udfffb", ["ok", "\udc00"], [3] * 1_000_000),
        ),
        **dict.fromkeys(("max_token", "guided_json", "guided_regex", "guided_choice", "__proto__", ""), ("x", 1)),
        **dict.fromkeys(("best_of", "suffix", "use_beam_search", "prompt_embeds", "lora"), ({"type": "object"},)),
    }.items()
    for value in values
} | {
    "n with temperature 0": (COMPLETION, TEXT | {"n": 2, "temperature": 0}),
    "600 prompts, n 2": (COMPLETION, TEXT | {"prompt": ["a"] * 600, "n": 2}),
    "one token too many": (COMPLETION, TEXT | {"prompt": [3] * (LENGTH - 4), "max_tokens": 5}),
    "a logit bias of 100000 entries": (COMPLETION, TEXT | {"logit_bias": {str(i): 1 for i in range(100_000)}}),
    "another model's prompt": (COMPLETION, {"model": "gpt", "prompt": "x"}),
    "no prompt": (COMPLETION, {"max_tokens": 3}),
}

CHATS: dict[str, dict[str, Any]] = {
    "no messages": TALK | {"messages": []},
    "messages null": TALK | {"messages": None},
    "messages of texts": TALK | {"messages": ["hi"]},
    "a million messages": TALK | {"messages": [3] * 1_000_000},
    "50000 turns": TALK | {"messages": TALK["messages"] * 50_000},
    "an empty message": TALK | {"messages": [{}]},
    "an unknown role": TALK | {"messages": [{"role": "pirate", "content": "x"}]},
    "a role that is a list": TALK | {"messages": [{"role": ["user"], "content": "x"}]},
    "a tool's answer to nothing": TALK | {"messages": [{"role": "tool", "content": "x"}]},
    "no content": TALK | {"messages": [{"role": "user"}]},
    "content that is a number": said(3),
    "content of an unknown type": said([{"type": "hologram", "hologram": "x"}]),
    "content of a type that is a list": said([{"type": ["text"], "text": "x"}]),
    "content with half a part": said([{"type": "text"}]),
    "content without end": said("x " * 1_000_000),
    "a lone surrogate": said("\ud83d"),
    "an unknown key": said("x", contents="x"),
    "top_logprobs 21": TALK | {"logprobs": True, "top_logprobs": 21},
    "top_logprobs alone": TALK | {"top_logprobs": 2},
    "logprobs 3": TALK | {"logprobs": 3},
    "two limits": TALK | {"max_completion_tokens": 5},
    "max_completion_tokens -1": {"messages": TALK["messages"], "max_completion_tokens": -1},
    "a prompt": TALK | {"prompt": "x"},
    "a file": image("file:///etc/passwd"),
    "the cloud's own address": image("http://169.254.169.254/latest/meta-data/"),
    "data in an address": image("data:image/png;base64," + "A" * 1_000_000),
    "sound": said([{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}]),
    "a file by its id": said([{"type": "file", "file": {"file_id": "../../etc/passwd"}}]),
    "a template": TALK | {"chat_template": "{{ ''.__class__.__mro__ }}"},
    "a template's variable": TALK | {"chat_template_kwargs": {"tokenize": True}},
}

GENERATES: dict[str, dict[str, Any]] = {
    "no text": {"max_tokens": 4},
    "text that is a number": INPUT | {"text_input": 3},
    "two texts": INPUT | {"text_input": ["a", "b"]},
    "no text in the array": INPUT | {"text_input": []},
    "an array for a scalar": INPUT | {"max_tokens": [1, 2]},
    "parameters that are a list": INPUT | {"parameters": [1]},
    "a field twice": INPUT | {"parameters": {"max_tokens": 3}},
    "an unknown field": INPUT | {"max_token": 3},
    "beams": INPUT | {"beam_width": 4},
    "stop words that are numbers": INPUT | {"stop_words": [1]},
    "bad words without end": INPUT | {"bad_words": ["a b c"] * 100_000},
    "a bad word of a megabyte": INPUT | {"bad_words": ["x" * 1_000_000]},
    "a stop word of a megabyte": INPUT | {"stop_words": ["x" * 1_000_000]},
    "an end id outside": INPUT | {"end_id": VOCAB},
    "max_tokens -1": INPUT | {"max_tokens": -1},
    "too long": INPUT | {"text_input": "word " * 100_000},
    "a lone surrogate": INPUT | {"text_input": "\udc00"},
}

MODELS = ("gone", "%2e%2e", "..%2f..%2fetc%2fpasswd", "a%00b", "x" * 10_000, "%ff", "storyteller%20", "a%0d%0ab")


@pytest.fixture(scope="module", autouse=True)
def _nothing_is_left(server: Server):
    """Afterwards no block is held, no file is open, and the memory is what it was."""
    for body in (b'{"x": "' + b"x" * (30 << 20), BODIES["200000 keys"]):  # what one such body needs, once
        server.ask(COMPLETION, body)
    before, files = server.rss(), server.files()
    yield
    server.quiet()
    grown = [(after - b) / (1 << 20) for after, b in zip(server.rss(), before, strict=True)]
    assert max(grown) < 64, f"MiB by which the server and its engine grew: {grown}"
    server.files_at_most(files + 3)
    assert not [line for line in server.log if "Traceback" in line or "Error" in line], server.log


def refused(server: Server, path: str, body: Any, headers: dict[str, str] | None = None) -> Answer:
    """Send it; the answer has to be a short error, within a second, and the server has to be as it was."""
    answer = server.refused(path, body, headers)
    assert len(answer.body) < 1000, f"{len(answer.body)} bytes"
    assert answer.message
    server.unharmed()
    return answer


@pytest.mark.parametrize("path", [COMPLETION, CHAT, GENERATE])
@pytest.mark.parametrize("name", sampled(BODIES, every=17))
def test_bodies(server: Server, name: str, path: str):
    refused(server, path, BODIES[name], {"Content-Type": "application/json"})


@pytest.mark.parametrize("name", sampled(FIELDS, every=60))
def test_fields_of_completions(server: Server, name: str):
    path, body = FIELDS[name]
    refused(server, path, body)


@pytest.mark.parametrize("name", sampled(CHATS, every=30))
def test_chats(server: Server, name: str):
    refused(server, CHAT, CHATS[name])


@pytest.mark.parametrize("name", sampled(GENERATES, every=17))
def test_generate(server: Server, name: str):
    refused(server, GENERATE, GENERATES[name])


@pytest.mark.slow
def test_the_same_of_a_stream(server: Server):
    """An error comes before the stream begins, with its own status."""
    for path, body in list(FIELDS.values())[::9]:
        if "stream_options" not in body and "stream" not in body:
            refused(server, path, body | {"stream": True})


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_models_that_are_not_served(server: Server, model: str):
    for path in (f"/v2/models/{model}/generate", f"/v2/models/{model}/versions/1/generate"):
        answer = server.ask(path, INPUT)
        assert answer.status in REFUSED
        assert len(answer.body) < 500
        assert b"root:" not in answer.body
    server.unharmed()


LEGAL: dict[str, dict[str, Any]] = {
    "no text: what begins any text": TEXT | {"prompt": ["", "a"]},
    "one token": TEXT | {"prompt": [5]},
    "as long as it may be": TEXT | {"prompt": [3] * (LENGTH - 4)},
    "special tokens in a text are text": TEXT | {"prompt": "<|endoftext|><s></s><unk>"},
    "only special tokens": TEXT | {"prompt": [0, 0, 0]},
    "control characters": TEXT | {"prompt": "a\0b\x1b[31m\u202e\ufeff"},
    "no bad words": TEXT | {"bad_words": []},
    "temperature 1e308": TEXT | {"temperature": 1e308},
    "the smallest temperature": TEXT | {"temperature": 5e-324},
    "stop at a character's middle": TEXT | {"stop": ["\u0300", "🙂"]},
    "stop across tokens": TEXT | {"stop": [" t", "e o", "xq"]},
    "stop at every letter": TEXT | {"stop": list("etaoins hrdlu")},
    "everything at its edge": TEXT | {"top_k": 1, "top_p": 1e-9, "min_p": 1, "seed": 2**64 - 1, "presence_penalty": -2},
    "null for everything": TEXT | dict.fromkeys(("n", "stop", "seed", "stream", "logprobs", "user", "top_p")),
}


@pytest.mark.parametrize("name", sampled(LEGAL, every=13))
def test_what_is_only_unusual_is_answered(server: Server, name: str):
    answer = server.ask(COMPLETION, LEGAL[name])
    assert answer.status == 200, answer
    assert answer.json["choices"][0]["finish_reason"] in ("stop", "length")
    server.unharmed()


def test_no_bad_words_are_none(server: Server):
    body = {"text_input": GOLDEN["prompt"], "max_tokens": 8, "exclude_input_in_output": True}
    texts = {
        server.ask(GENERATE, body | more).json["text_output"] for more in ({}, {"bad_words": [""]}, {"bad_words": ""})
    }
    assert len(texts) == 1

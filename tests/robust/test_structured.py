"""Grammars, schemas and tools that are wrong or made to cost: refused in good time, or kept to; never a hang."""

from __future__ import annotations

import select
from typing import Any

import pytest
from real_server import CHAT, COMPLETION, Server, post, read_answer, sampled

TEXT = {"prompt": "The old fox", "max_tokens": 4}
TALK = {"messages": [{"role": "user", "content": "Tell me."}], "max_tokens": 4}
LIMIT_S = 6.0
"""A grammar may take so long to be refused; a plain field may not."""


def kept(**to: Any) -> tuple[str, Any]:
    return COMPLETION, TEXT | {"structured_outputs": to}


def schema(given: Any) -> tuple[str, Any]:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": given}}
    return CHAT, TALK | {"response_format": form}


def tool(parameters: Any, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": parameters} | more}


def nested(depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        found = {"type": "object", "properties": {"a": found}}
    return found


WRONG: dict[str, tuple[str, Any]] = {
    "a regex that is none": kept(regex="(a"),
    "a regex that is a number": kept(regex=3),
    "a regex that looks back": kept(regex=r"(a)\1"),
    "a regex of a megabyte": kept(regex="a" * 1_000_000),
    "no choice": kept(choice=[]),
    "choices that are numbers": kept(choice=[1, 2]),
    "an empty choice": kept(choice=[""]),
    "a million choices": kept(choice=[f"choice {i}" for i in range(1_000_000)]),
    "a grammar that is none": kept(grammar="this is no grammar"),
    "a grammar without a start": kept(grammar='other: "a"'),
    "two at once": kept(regex="a", choice=["a"]),
    "nothing to keep to": kept(),
    "an unknown kind": kept(poem="sonnet"),
    "a schema that is a number": schema(3),
    "a schema of an unknown type": schema({"type": "poem"}),
    "a pattern of the wrong type": schema({"type": "string", "pattern": 3}),
    "a pattern that is none": schema({"type": "string", "pattern": "(a"}),
    "a remote reference": schema({"$ref": "http://127.0.0.1:1/schema.json"}),
    "a reference to a file": schema({"$ref": "file:///etc/passwd"}),
    "a reference to nothing": schema({"$ref": "#/$defs/gone"}),
    "an enum of a million": schema({"enum": [f"value {i}" for i in range(1_000_000)]}),
    "an empty enum": schema({"enum": []}),
    "a schema 300 deep": schema(nested(300)),
    "an unknown response format": (CHAT, TALK | {"response_format": {"type": "poem"}}),
    "a response format without a schema": (CHAT, TALK | {"response_format": {"type": "json_schema"}}),
    "tools that are a text": (CHAT, TALK | {"tools": "f"}),
    "a tool of an unknown type": (CHAT, TALK | {"tools": [{"type": "hammer"}]}),
    "a tool's parameters that are a list": (CHAT, TALK | {"tools": [tool([1])]}),
    "a tool's parameters that are a text": (
        CHAT,
        TALK | {"tools": [tool({"type": "string"})], "tool_choice": "required"},
    ),
    "a tool without a name": (CHAT, TALK | {"tools": [{"type": "function", "function": {}}]}),
    "a tool's name with a line break": (CHAT, TALK | {"tools": [tool({}, name="a\nb")]}),
    "the same tool twice": (CHAT, TALK | {"tools": [tool({}), tool({})]}),
    "a thousand tools": (CHAT, TALK | {"tools": [tool({}, name=f"f{i}") for i in range(1000)]}),
    "a tool that is not there": (
        CHAT,
        TALK | {"tools": [tool({})], "tool_choice": {"type": "function", "function": {"name": "g"}}},
    ),
    "a choice without tools": (CHAT, TALK | {"tool_choice": "required"}),
    "a choice that is none": (CHAT, TALK | {"tools": [tool({})], "tool_choice": "maybe"}),
}

EITHER: dict[str, tuple[str, Any]] = {
    "(a+)+$": kept(regex="(a+)+$"),
    "(.{1,5000}){1,5000}": kept(regex="(.{1,5000}){1,5000}"),
    "nested repetitions": kept(regex="((((a{1,99}){1,99}){1,99}){1,99}){1,99}"),
    "((a|a)*)*b": kept(regex="((a|a)*)*b"),
    "a grammar that begins with itself": kept(grammar='start: start "a" | "a"'),
    "a grammar of nothing but itself": kept(grammar="start: start"),
    "a schema of itself": schema({"$ref": "#"}),
    "a schema that nothing keeps to": schema({"allOf": [{"type": "string"}, {"type": "number"}]}),
    "a minimum above the maximum": schema({"type": "integer", "minimum": 9, "maximum": 3}),
    "a list of a billion": schema({"type": "array", "items": {"type": "string"}, "minItems": 10**9}),
    "a text of a billion": schema({"type": "string", "minLength": 10**9}),
    "a thousand alternatives of fifty": schema(
        {"anyOf": [{"properties": {f"k{i}": {"enum": list(range(50))}}} for i in range(1000)]}
    ),
    "half a word to stop at": (CHAT, TALK | {"response_format": {"type": "json_object"}, "stop": ['"', "{"]}),
}


def answered(server: Server, path: str, body: Any) -> int:
    """The status; in good time, and nothing has changed."""
    answer = server.refused(path, body, limit_s=LIMIT_S, also=200)
    if answer.status != 200:
        assert len(answer.body) < 2000
        assert answer.message
        assert b"root:" not in answer.body
    server.unharmed()
    return answer.status


@pytest.mark.parametrize("name", sampled(WRONG, every=20))
def test_what_cannot_be_kept_to_is_refused(server: Server, name: str):
    assert 400 <= answered(server, *WRONG[name]) < 500


@pytest.mark.slow
@pytest.mark.parametrize("name", EITHER)
def test_what_might_cost_too_much_is_kept_to_or_refused(server: Server, name: str):
    status = answered(server, *EITHER[name])
    assert status == 200 or 400 <= status < 500
    server.quiet()


@pytest.mark.slow
def test_others_go_on_while_a_costly_grammar_is_compiled(server: Server):
    """The event loop is not held: a small request is answered meanwhile."""
    meanwhile = []
    # Whose turn it is on a machine with others to serve is chance, so one time is enough. Another number each time:
    # what became of one is remembered.
    for number in (999_983, 999_979, 999_961, 999_959, 999_953):
        path, body = schema({"type": "integer", "multipleOf": number})
        with server.connect() as s:
            s.sendall(post(path, body))
            assert server.ask("/v1/models").status == 200
            meanwhile.append(not select.select([s], [], [], 0)[0])
            assert "too complex" in read_answer(s).message
        if meanwhile[-1]:
            break
    assert any(meanwhile)
    server.unharmed()

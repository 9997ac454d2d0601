"""What a model says becomes content, thoughts and calls, the same in any pieces; nothing that was said gets lost."""

from __future__ import annotations

import json

import pytest

from fewbit.serve.openai.calls import Speech, message_of
from fewbit.serve.openai.dialects import HERMES, LLAMA, MISTRAL, PLAIN, dialect_of
from fewbit.serve.openai.dialects import grammar as write_grammar
from fewbit.serve.openai.tools import Function, Tool
from fewbit.text import grammar as compiler

NAMES = frozenset({"add", "get_weather"})
PARIS = '{"city": "Paris \\"}{"}'


def heard(text: str, size: int, dialect=HERMES, **more) -> tuple[dict, list]:
    """The message that pieces of `size` characters add up to (ids left out), and the deltas."""
    speech = Speech(dialect, NAMES, **more)
    deltas = [d for at in range(0, len(text), size) for d in speech.push(text[at : at + size])]
    deltas += speech.finish()
    message = message_of(deltas)
    ids = [call.pop("id") for call in message.get("tool_calls", [])]
    assert len(set(ids)) == len(ids) == speech.calls
    return message, deltas


def message(content, *calls: tuple[str, str], **more) -> dict:
    made = [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in calls]
    return {"role": "assistant", "content": content, **more} | ({"tool_calls": made} if made else {})


ONE = f'{{"name": "get_weather", "arguments": {PARIS}}}'
TWO = '{"name": "add", "arguments": {"a": [1, {"b": 2}], "c": null}}'
ADD = '{"a": [1, {"b": 2}], "c": null}'
CASES = {
    "text": (HERMES, "Just text < tool_call and {json}.", message("Just text < tool_call and {json}.")),
    "hermes": (HERMES, f"<tool_call>\n{ONE}\n</tool_call>", message(None, ("get_weather", PARIS))),
    "hermes after text": (
        HERMES,
        f"Let me see.\n\n<tool_call>\n{ONE}\n</tool_call>\n<tool_call>\n{TWO}\n</tool_call>\n",
        message("Let me see.", ("get_weather", PARIS), ("add", ADD)),
    ),
    "hermes before text": (HERMES, f"<tool_call>{ONE}</tool_call>\nDone.", message("Done.", ("get_weather", PARIS))),
    "arguments before the name": (
        HERMES,
        f'<tool_call>{{"arguments": {PARIS}, "name": "get_weather"}}</tool_call>',
        message(None, ("get_weather", PARIS)),
    ),
    "arguments as text": (
        HERMES,
        '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>',
        message(None, ("add", '{"a": 1}')),
    ),
    "no arguments": (HERMES, '<tool_call>{"name": "add"}</tool_call>', message(None, ("add", "{}"))),
    "null arguments": (
        HERMES,
        '<tool_call>{"name": "add", "arguments": null}</tool_call>',
        message(None, ("add", "{}")),
    ),
    "more keys": (
        HERMES,
        '<tool_call>{"id": 7, "name": "add", "arguments": {}}</tool_call>',
        message(None, ("add", "{}")),
    ),
    "an unknown tool": (
        HERMES,
        'Hm. <tool_call>\n{"name": "rm", "arguments": {}}</tool_call>',
        message('Hm. <tool_call>\n{"name": "rm", "arguments": {}}</tool_call>'),
    ),
    "no JSON": (HERMES, "a <tool_call>\nnothing</tool_call> b", message("a <tool_call>\nnothing</tool_call> b")),
    "wrong JSON": (HERMES, '<tool_call>{"name" 3}</tool_call>', message('<tool_call>{"name" 3}</tool_call>')),
    "numbers as arguments": (
        HERMES,
        '<tool_call>{"name": "add", "arguments": 3}</tool_call>',
        message('<tool_call>{"name": "add", "arguments": 3}</tool_call>'),
    ),
    "cut before the name": (HERMES, 'a <tool_call>\n{"na', message('a <tool_call>\n{"na')),
    "cut in the arguments": (
        HERMES,
        '<tool_call>{"name": "add", "arguments": {"a": [1',
        message(None, ("add", '{"a": [1')),
    ),
    "an opener at the end": (HERMES, "a <tool_call>", message("a <tool_call>")),
    "half an opener": (HERMES, "a <tool_ca", message("a <tool_ca")),
    "mistral": (MISTRAL, f"[TOOL_CALLS] [{ONE}, {TWO}]", message(None, ("get_weather", PARIS), ("add", ADD))),
    "mistral by name": (
        MISTRAL,
        f"[TOOL_CALLS]get_weather[ARGS]{PARIS}[TOOL_CALLS]add{ADD}",
        message(None, ("get_weather", PARIS), ("add", ADD)),
    ),
    "mistral, unknown": (MISTRAL, "[TOOL_CALLS]rm[ARGS]{}", message("[TOOL_CALLS]rm[ARGS]{}")),
    "llama": (
        LLAMA,
        f'{{"name": "get_weather", "parameters": {PARIS}}}; {TWO}',
        message(None, ("get_weather", PARIS), ("add", ADD)),
    ),
    "llama with a tag": (LLAMA, f"<|python_tag|>{TWO}", message(None, ("add", ADD))),
    "llama's other JSON": (LLAMA, ' {"answer": 42} ok', message(' {"answer": 42} ok')),
    "llama's brackets": (LLAMA, "[a link](x) {b}", message("[a link](x) {b}")),
    "llama's late braces": (LLAMA, f"so: {TWO}", message(f"so: {TWO}")),
    "forced": (PLAIN, f"[{ONE}, {TWO}]", message(None, ("get_weather", PARIS), ("add", ADD))),
    "forced and cut": (PLAIN, '[{"name": "add", "arguments": {"a"', message(None, ("add", '{"a"'))),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [1, 2, 3, 5, 11, 1000])
def test_in_any_pieces(case, size):
    dialect, text, wanted = CASES[case]
    found, deltas = heard(text, size, dialect)
    assert found == wanted
    begun = [part["index"] for d in deltas for part in d.get("tool_calls", []) if "id" in part]
    assert begun == list(range(len(begun)))  # in order; id, type and name once
    assert not any(d.get("content") == "" for d in deltas)


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_a_named_function_s_arguments_are_all_of_the_text(size):
    found, deltas = heard(PARIS, size, only="get_weather")
    assert found == message(None, ("get_weather", PARIS))
    assert deltas[0]["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": ""}


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
def test_thoughts(size):
    text = f"\n<think>\nHm <b>.\n</think>\n\nSo. <tool_call>{TWO}</tool_call>"
    wanted = message("So.", ("add", ADD), reasoning="\nHm <b>.\n")
    assert heard(text, size, thinks=True)[0] == wanted
    assert heard(text.removeprefix("\n<think>"), size, thinks="inside")[0] == wanted
    assert heard("No <think>.", size, thinks=True)[0] == message("No <think>.")
    assert heard("<think>cut </thi", size, thinks=True)[0] == message("", reasoning="cut </thi")
    assert heard("\n <thi", size, thinks=True)[0] == message("\n <thi")


@pytest.mark.parametrize("size", [1, 1000])
def test_calls_after_the_first_are_left_out_where_one_was_asked_for(size):
    for rest in (f"{TWO}]", TWO[:20], '{"a" 1'):
        text = f"[TOOL_CALLS][{ONE}, {rest}"
        assert heard(text, size, MISTRAL, most=1)[0] == message(None, ("get_weather", PARIS))


def test_fragments_come_as_they_are_written():
    speech = Speech(HERMES, NAMES)
    assert speech.push("<tool_call>") == speech.push('{"name": "add", "argum') == []
    first, second = speech.push('ents": {"a": ')
    call = first["tool_calls"][0]
    assert (call["index"], call["type"], call["function"]) == (0, "function", {"name": "add", "arguments": ""})
    assert call["id"].startswith("call_")
    assert second == {"tool_calls": [{"index": 0, "function": {"arguments": '{"a": '}}]}
    assert speech.push("12") == [{"tool_calls": [{"index": 0, "function": {"arguments": "12"}}]}]
    assert speech.push("}}</tool_call>") == [{"tool_calls": [{"index": 0, "function": {"arguments": "}"}}]}]
    assert speech.finish() == []


def test_spaces_before_a_call_are_held_back_and_others_are_not():
    speech = Speech(HERMES, NAMES)
    assert speech.push("a b\n") == [{"content": "a b"}]
    assert speech.push("\nc") == [{"content": "\n\nc"}]


def test_deep_arguments_are_read_in_one_go():
    deep = '{"a": ' * 5000 + "1" + "}" * 5000
    assert heard(f'<tool_call>{{"name": "add", "arguments": {deep}}}', 50)[0] == message(None, ("add", deep))


def test_the_dialect_is_the_template_s():
    assert dialect_of("... <tool_call>...") is HERMES
    assert dialect_of("'[TOOL_CALLS] ['") is MISTRAL
    assert dialect_of("<|python_tag|>") is dialect_of("{{ tools }}") is LLAMA
    assert len(MISTRAL.new_id()) == 9  # what its templates insist on
    assert json.dumps(HERMES.new_id())


def strict(dialect, text: str, tokenizer, tools) -> bool:
    """Whether the grammar of strict calls takes all of a text."""
    written = compiler.from_lark(write_grammar(dialect, tools, tokenizer, {"x-guidance": compiler.JSON_STYLE}))
    matcher = compiler.compile(written, tokenizer, tokenizer.vocab_size)
    for token in tokenizer.encode(text, add_special_tokens=False):
        if not matcher.mask()[token // 8] >> token % 8 & 1:
            return False
        matcher.accept(token)
    return any(matcher.mask()[end // 8] >> end % 8 & 1 for end in tokenizer.eos_ids)


@pytest.mark.parametrize(
    ("dialect", "text", "fits"),
    [
        (HERMES, "any\ntext <tool_box>", True),
        (HERMES, "", True),
        (HERMES, 'so <tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>', True),
        (HERMES, 'so <tool_call>\n{"name": "get_weather", "arguments": {"x": "1"}}\n</tool_call> bye', True),
        (HERMES, '<tool_call>\n{"name": "add", "arguments": {"b', False),
        (HERMES, '<tool_call>\n{"name": "rm', False),
        (HERMES, "so <tool_call> b", False),
        (LLAMA, "any {text}", True),
        (LLAMA, '{"name": "add", "parameters": {"a": 1}}; {"name": "get_weather", "parameters": {}}', True),
        (LLAMA, ' {"answer": 4}', False),
        (MISTRAL, 'so [TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}]', True),
        (MISTRAL, 'so [TOOL_CALLS] [{"name": "add", "arguments": {"a": "1"', False),
        (MISTRAL, "so [TOOL", True),
    ],
)
def test_calls_of_strict_tools_cannot_be_wrong_and_any_other_text_can_be_said(tokenizer, dialect, text, fits):
    schema = {"$defs": {"n": {"type": "integer"}}, "properties": {"a": {"$ref": "#/$defs/n"}}, "required": ["a"]}
    add = {"name": "add", "strict": True, "parameters": {"type": "object", "additionalProperties": False} | schema}
    tools = [Tool(type="function", function=Function(**f)) for f in (add, {"name": "get_weather"})]
    assert strict(dialect, text, tokenizer, tools) is fits

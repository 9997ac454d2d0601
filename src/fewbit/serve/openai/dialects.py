"""How models write calls of tools: as their chat templates show it to them."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import Any

from fewbit.serve.openai.tools import Tool, schema_of_call
from fewbit.text import Tokenizer

THINK, THOUGHT = "<think>", "</think>"  # around thoughts


@dataclass(frozen=True)
class Dialect:
    """How calls are written."""

    opens: str = ""  # before a call, or before all of them
    bare: bool = False  # a call may also be the whole answer, with nothing before it
    fillers: tuple[str, ...] = ()  # what may stand between calls and around them
    named: bool = False  # a call may be its name with the arguments after it
    short_ids: bool = False  # templates of this dialect take ids of nine characters only

    def new_id(self) -> str:
        """A name for a call."""
        return secrets.token_hex(5)[:9] if self.short_ids else f"call_{secrets.token_hex(12)}"

    def visible(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Special tokens that the dialect is written in."""
        found = (tokenizer.token_id(text) for text in (self.opens, *self.fillers, THINK, THOUGHT))
        return frozenset(token for token in found if token is not None)


HERMES = Dialect("<tool_call>", fillers=("</tool_call>", "<tool_call>"))  # Hermes, Qwen
MISTRAL = Dialect("[TOOL_CALLS]", fillers=("[TOOL_CALLS]", "[ARGS]", "[", ",", "]"), named=True, short_ids=True)
LLAMA = Dialect("<|python_tag|>", bare=True, fillers=(";", ","))  # Llama 3
PLAIN = Dialect("", bare=True, fillers=("[", ",", "]"))  # what a grammar forces


def dialect_of(template: str) -> Dialect:
    """The dialect that a chat template shows."""
    for mark, dialect in (("<tool_call>", HERMES), ("[TOOL_CALLS]", MISTRAL), ("python_tag", LLAMA)):
        if mark in template:
            return dialect
    return LLAMA


def grammar(dialect: Dialect, tools: list[Tool], tokenizer: Tokenizer, style: dict[str, Any]) -> str:
    """Any text, in which the calls of `strict` tools keep to their schemas; in llguidance's Lark.

    Args:
        dialect: How calls are written.
        tools: What may be called.
        tokenizer: The model's: a special token is none of the text's.
        style: What goes into the JSON schemas beside what they say.
    """

    def literal(text: str) -> str:
        token = tokenizer.token_id(text)
        return f"<[{token}]>" if token in tokenizer.special_ids else json.dumps(text)

    arguments = "parameters" if dialect is LLAMA else "arguments"
    call = schema_of_call(tools, arguments, strict_only=True)
    if dialect is LLAMA:  # a call is the whole answer, and nothing else begins like one
        body = f"%json {json.dumps(call | style)}"
        return f'start: TEXT | call ("; " call)*\nTEXT: /\\s*([^\\s{{\\[](.|\\n)*)?/\ncall: {body}\n'
    schema = call
    if dialect is MISTRAL:
        schema = {"type": "array", "minItems": 1, "items": {"anyOf": call["anyOf"]}, "$defs": call["$defs"]}
    body = f"%json {json.dumps(schema | style)}"
    opens = literal(dialect.opens)
    lazy = "[lazy]" if opens.startswith('"') else ""
    around = f'"\\n" {body} "\\n" {literal("</tool_call>")}' if dialect is HERMES else f'" "? {body}'
    return f"start: call* rest\nrest: TEXT\nTEXT: /(.|\\n)*/\nopen{lazy}: TEXT {opens}\ncall: open {around}\n"

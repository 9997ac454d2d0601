"""Outputs that keep to a form: `response_format` and `structured_outputs` as grammars, compiled before anything runs.

The engine gets the grammar's text and compiles it again for the request. It is compiled here first, so that one that
is wrong, too large or too slow to compile is an error of the request and nothing the engine ever sees.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from fewbit.engine.types import OverloadedError
from fewbit.errors import FewbitError, RequestError
from fewbit.serve.body import parse_object, shown
from fewbit.serve.schema import MAX_GRAMMAR_CHARS, MAX_SCHEMA_CHARS, MAX_SCHEMA_DEPTH, Strict
from fewbit.serve.service import Service

COMPILE_S = 30.0  # with all that wait before it: `fewbit.text.grammar` gives one grammar less than a second
_NAME = "^[A-Za-z0-9_-]{1,64}$"

Make = Callable[[], str]
"""Writes the text of a grammar."""


class JsonSchema(Strict):
    """A named JSON schema. What comes out always keeps to it, whatever `strict` says."""

    name: Annotated[str, Field(pattern=_NAME)]
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """OpenAI's way to ask for a form."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Strict):
    """vLLM's way to ask for a form: exactly one of these."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Annotated[list[str], Field(fail_fast=True)] | None = None
    grammar: str | None = None


FORMATS: Mapping[str, type[BaseModel]] = {
    "response_format": ResponseFormat,
    "response_format.json_schema": JsonSchema,
    "structured_outputs": StructuredOutputs,
}


def wanted(response_format: ResponseFormat | None, structured: StructuredOutputs | None) -> tuple[Make, str] | None:
    """What writes the grammar that a request asks for, and the field that it is about; None for any text.

    Raises:
        RequestError: More than one form, none, or one that is hopeless at first sight.
    """
    if structured is not None:
        return _of_structured(structured), "structured_outputs"
    if response_format is None or response_format.type == "text":
        return None
    if response_format.type == "json_object":
        return _any_object, "response_format"
    given = response_format.json_schema
    if given is None or given.schema_ is None:
        raise RequestError("response_format.json_schema.schema is required", "response_format.json_schema")
    return of_schema(given.schema_, "response_format"), "response_format"


def of_schema(schema: dict[str, Any], param: str) -> Make:
    """The grammar of JSON that keeps to a schema."""
    check_schema(schema, param)
    return lambda: _grammar().from_json_schema(schema)


def of_lark(write: Callable[[dict[str, Any]], str]) -> Make:
    """A grammar in llguidance's Lark; `write` gets what JSON schemas in it want beside them, for the style of JSON."""
    return lambda: _grammar().from_lark(write({"x-guidance": _grammar().JSON_STYLE}))


async def compiled(make: Make, param: str, service: Service) -> str:
    """The grammar's text, after compiling it for the model's tokens.

    Raises:
        RequestError: It cannot be compiled, or not within the limits; the reason.
        OverloadedError: Too many others are being compiled.
    """

    def work() -> str:
        text = make()
        _grammar().compile(text, service.tokenizer, service.client.info.vocab)
        return text

    try:
        async with asyncio.timeout(COMPILE_S):
            return await asyncio.get_running_loop().run_in_executor(_COMPILERS, work)
    except TimeoutError as e:
        raise OverloadedError("too many grammars wait to be compiled; retry later") from e
    except FewbitError as e:
        raise RequestError(f"{param}: {e}", param) from e


def check_schema(schema: Any, param: str) -> None:
    """Raise a RequestError for a JSON schema that is too large, too deep, or points elsewhere."""
    size, level, depth = 0, [schema], 0
    while level:
        depth += 1
        if depth > MAX_SCHEMA_DEPTH:
            raise RequestError(f"{param}: the schema is nested more than {MAX_SCHEMA_DEPTH} levels deep", param)
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                reference = value.get("$ref")
                if isinstance(reference, str) and not reference.startswith("#"):
                    raise RequestError(
                        f"{param}: $ref '{shown(reference)}' points outside of the schema; nothing is fetched", param
                    )
                size += sum(len(key) + 4 for key in value)
                below += value.values()
            elif isinstance(value, list):
                below += value
            else:
                size += len(value) if isinstance(value, str) else 4
        if size + len(below) > MAX_SCHEMA_CHARS:
            raise RequestError(f"{param}: the schema has more than {MAX_SCHEMA_CHARS} characters", param)
        level = below


_COMPILERS = ThreadPoolExecutor(2, "grammar")  # of its own: one that takes long holds up no tokenizing


def _of_structured(asked: StructuredOutputs) -> Make:
    param = "structured_outputs"
    given = [name for name in ("json_", "regex", "choice", "grammar") if getattr(asked, name) is not None]
    given += ["json_object"] if asked.json_object else []
    if len(given) != 1:
        raise RequestError(f"{param} must hold exactly one of json, json_object, regex, choice and grammar", param)
    match given[0]:
        case "json_":
            schema = parse_object(asked.json_.encode(errors="replace")) if isinstance(asked.json_, str) else asked.json_
            assert schema is not None
            return of_schema(schema, param)
        case "json_object":
            return _any_object
        case "choice":
            choices = asked.choice or []
            if not choices or not all(choices):
                raise RequestError(f"{param}.choice must hold at least one text, and no empty one", param)
            if sum(map(len, choices)) > MAX_GRAMMAR_CHARS:
                raise RequestError(f"{param}.choice has more than {MAX_GRAMMAR_CHARS} characters", param)
            return lambda: _grammar().from_choices(choices)
        case name:
            text: str = getattr(asked, name)
            if not 0 < len(text) <= MAX_GRAMMAR_CHARS:
                raise RequestError(f"{param}.{name} must have 1 to {MAX_GRAMMAR_CHARS} characters", param)
            return lambda: _grammar().from_regex(text) if name == "regex" else _grammar().from_lark(text)


def _any_object() -> str:
    return str(_grammar().any_json_object())


def _grammar() -> Any:
    """Loaded when it is first asked for: few requests need it."""
    from fewbit.text import grammar

    return grammar

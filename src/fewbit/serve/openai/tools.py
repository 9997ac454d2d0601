"""Tools that a model may call: what a client says about them, and the form that a call is forced into."""

from __future__ import annotations

import copy
from typing import Annotated, Any, Literal

from pydantic import Field

from fewbit.errors import RequestError, nearest_name
from fewbit.serve.body import shown
from fewbit.serve.openai.structured import check_schema
from fewbit.serve.schema import MAX_TOOLS, Strict

_NAME = "^[A-Za-z0-9_.-]{1,64}$"


class Function(Strict):
    """A function, and the JSON schema of its arguments."""

    name: Annotated[str, Field(pattern=_NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @property
    def schema_of_arguments(self) -> dict[str, Any]:
        """An object's schema; any object where nothing is said."""
        return self.parameters or {"type": "object"}


class Tool(Strict):
    """A tool: a function."""

    type: Literal["function"]
    function: Function

    def template_fields(self) -> dict[str, Any]:
        """What a chat template sees."""
        function = {
            "name": self.function.name,
            "description": self.function.description or "",
            "parameters": self.function.schema_of_arguments,
        }
        return {"type": "function", "function": function}


CHOICE = {
    "anyOf": [
        {"type": "null"},
        {"enum": ["none", "auto", "required"]},
        {
            "type": "object",
            "properties": {
                "type": {"const": "function"},
                "function": {
                    "type": "object",
                    "properties": {"name": {"type": "string"}},
                    "required": ["name"],
                    "additionalProperties": False,
                },
            },
            "required": ["type", "function"],
            "additionalProperties": False,
        },
    ]
}
"""The JSON schema of `tool_choice`."""


def check_choice(value: Any) -> Any:
    """`tool_choice`: none, auto, required, or the one function that must be called."""
    if value is None or value in ("none", "auto", "required"):
        return value
    match value:
        case {"type": "function", "function": {"name": str(name), **inner}, **outer} if not inner and not outer:
            return {"name": name}
    raise RequestError(
        'tool_choice must be "none", "auto", "required" or {"type": "function", "function": {"name": ...}}, '
        f"got {shown(value)}",
        "tool_choice",
    )


def check_tools(tools: list[Tool], choice: Any) -> None:
    """Raise a RequestError for tools that cannot be offered, or a choice that is none of them."""
    names = [tool.function.name for tool in tools]
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"tools holds {len(tools)} tools, more than {MAX_TOOLS}", "tools")
    for i, tool in enumerate(tools):
        where = f"tools[{i}].function"
        if names.index(tool.function.name) != i:
            raise RequestError(f"{where}: the name '{tool.function.name}' is given twice", "tools")
        parameters = tool.function.parameters
        if parameters and parameters.get("type", "object") != "object":
            raise RequestError(
                f"{where}.parameters must describe an object, got type {shown(parameters['type'])}", "tools"
            )
        check_schema(parameters, f"{where}.parameters")
    if isinstance(choice, dict) and choice["name"] not in names:
        hint = nearest_name(choice["name"][:100], names) if names else "tools is empty"
        raise RequestError(f"tool_choice names '{shown(choice['name'])}', which is not in tools: {hint}", "tool_choice")
    if choice == "required" and not tools:
        raise RequestError("tool_choice is 'required', and tools is empty", "tool_choice")


def forced_schema(tools: list[Tool], choice: Any, parallel: bool) -> dict[str, Any] | None:
    """The JSON schema that a forced answer keeps to: the arguments of the named function, or an array of calls."""
    if isinstance(choice, dict):
        return next(t.function.schema_of_arguments for t in tools if t.function.name == choice["name"])
    if choice != "required":
        return None
    schema = schema_of_call(tools)
    most = {} if parallel else {"maxItems": 1}
    return {"type": "array", "minItems": 1, **most, "items": {"anyOf": schema["anyOf"]}, "$defs": schema["$defs"]}


def schema_of_call(tools: list[Tool], arguments: str = "arguments", strict_only: bool = False) -> dict[str, Any]:
    """The JSON schema of a call of any of these.

    Args:
        tools: What may be called.
        arguments: What the arguments are called.
        strict_only: Whether the arguments of tools that are not `strict` may be any object.
    """
    calls, schemas = [], {}
    for i, tool in enumerate(tools):
        loose = strict_only and not tool.function.strict
        schema = {"type": "object"} if loose else tool.function.schema_of_arguments
        schemas[f"t{i}"] = _moved(schema, f"#/$defs/t{i}")
        calls.append({
            "type": "object",
            "properties": {"name": {"const": tool.function.name}, arguments: {"$ref": f"#/$defs/t{i}"}},
            "required": ["name", arguments],
            "additionalProperties": False,
        })  # fmt: skip
    return {"anyOf": calls, "$defs": schemas}


def _moved(schema: Any, root: str) -> Any:
    """A schema that stands at `root` of another one: its references to itself follow."""
    if isinstance(schema, list):
        return [_moved(part, root) for part in schema]
    if not isinstance(schema, dict):
        return copy.copy(schema)
    moved = {key: _moved(value, root) for key, value in schema.items()}
    if isinstance(reference := schema.get("$ref"), str):
        moved["$ref"] = root + reference.removeprefix("#")
    return moved

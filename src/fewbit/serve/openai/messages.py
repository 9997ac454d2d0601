"""The turns of a chat, and how they become the text of a prompt: through the model's own template."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema

from fewbit.errors import CheckpointError, RequestError, nearest_name
from fewbit.serve import turns
from fewbit.serve.body import shown
from fewbit.serve.openai.dialects import THINK, THOUGHT
from fewbit.serve.openai.tools import CHOICE, Function, Tool, check_choice, check_tools
from fewbit.serve.schema import MAX_TEMPLATE_CHARS, Strict
from fewbit.serve.service import Service
from fewbit.text import ChatTemplate
from fewbit.text.settings import ROLES

REQUEST_TEMPLATE_S = 0.8  # a template of a client's own may take so long
_OURS = frozenset({"messages", "tools", "documents", "add_generation_prompt", *ROLES})  # no client sets these by name


def _join_content(value: Any) -> str | None:
    """A message's content: a text, or text parts, which are joined by line breaks."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a text or an array of text parts")
    for i, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise ValueError(f"part {i} has type '{shown(kind)}', which is not supported: this model reads text only")
        if kind != "text" or part.keys() != {"type", "text"} or not isinstance(part["text"], str):
            raise ValueError(f'part {i} must be {{"type": "text", "text": a text}}')
    return "\n".join(part["text"] for part in value)


_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
_CONTENT = {"anyOf": [{"type": "null"}, {"type": "string"}, {"type": "array", "items": _PART}]}


class FunctionOfCall(Strict):
    """What an assistant called, its arguments as JSON."""

    name: str
    arguments: str


class CallMade(Strict):
    """A call as an answer of this API holds it."""

    id: Annotated[str, Field(min_length=1)]
    type: Literal["function"] = "function"
    function: FunctionOfCall
    index: int | None = None  # left over from a stream

    def template_fields(self) -> dict[str, Any]:
        """What a chat template sees: templates write the arguments as JSON themselves."""
        try:
            arguments = json.loads(self.function.arguments or "{}")
        except (ValueError, RecursionError) as e:
            raise RequestError(f"the arguments of the call '{shown(self.id)}' are no JSON: {e}", "messages") from e
        if not isinstance(arguments, dict):
            raise RequestError(f"the arguments of the call '{shown(self.id)}' are no JSON object", "messages")
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": self.type, "function": function}


class Message(Strict):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(_join_content), WithJsonSchema(_CONTENT)] = None
    name: str | None = None
    tool_calls: list[CallMade] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    # An assistant's message as this API returns it may be sent back; null is all that these may be.
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None

    def check(self, where: str, known: set[str]) -> None:
        """What a turn of this role must have; `known` are the calls made before it."""
        if self.role != "assistant":
            if self.content is None:
                raise RequestError(f"{where}.content is required", f"{where}.content")
            for name in ("tool_calls", "reasoning"):
                if getattr(self, name):
                    raise RequestError(f"{where}.{name} is an assistant's only", f"{where}.{name}")
        if self.role == "tool" and self.tool_call_id not in known:
            what = "is required" if self.tool_call_id is None else "answers no call of an earlier assistant's message"
            raise RequestError(f"{where}.tool_call_id {what}", f"{where}.tool_call_id")
        if self.role != "tool" and self.tool_call_id is not None:
            raise RequestError(f"{where}.tool_call_id is a tool's only", f"{where}.tool_call_id")

    def template_fields(self) -> dict[str, Any]:
        """What a chat template sees."""
        fields: dict[str, Any] = {"role": self.role, "content": self.content or ""}
        for name in ("name", "tool_call_id"):
            if (value := getattr(self, name)) is not None:
                fields[name] = value
        if self.tool_calls:
            fields["tool_calls"] = [call.template_fields() for call in self.tool_calls]
        if self.reasoning:
            fields["reasoning"] = fields["reasoning_content"] = self.reasoning  # templates use either name
        return fields


class Conversation(Strict):
    """The fields of which a prompt is rendered."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)]
    tools: list[Tool] | None = None
    tool_choice: Annotated[Any, BeforeValidator(check_choice), WithJsonSchema(CHOICE)] = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None

    nested: ClassVar[Mapping[str, type[BaseModel]]] = {
        "messages": Message,
        "messages.tool_calls": CallMade,
        "messages.tool_calls.function": FunctionOfCall,
        "tools": Tool,
        "tools.function": Function,
    }

    @property
    def offered(self) -> list[Tool]:
        """The tools that the model is shown."""
        return [] if self.tool_choice == "none" else self.tools or []

    def check(self) -> None:
        """What no single field shows."""
        known: set[str] = set()
        for i, message in enumerate(self.messages):
            message.check(f"messages[{i}]", known)
            known |= {call.id for call in message.tool_calls or ()}
        check_tools(self.tools or [], self.tool_choice)
        if self.continue_final_message:
            if self.add_generation_prompt:
                raise RequestError(
                    "continue_final_message and add_generation_prompt exclude each other", "continue_final_message"
                )
            if self.messages[-1].role != "assistant" or self.messages[-1].tool_calls:
                raise RequestError(
                    "continue_final_message wants an assistant's text as the last message", "continue_final_message"
                )


async def encoded(
    service: Service, asked: Conversation, trusted: bool, add_special_tokens: bool = False, last: int | None = None
) -> tuple[str, list[int]]:
    """The prompt's text and its tokens.

    See `turns.encoded`, of which this is the front.

    Args:
        service: The model.
        asked: Checked already.
        trusted: Whether requests may bring a template or variables for it.
        add_special_tokens: Whether to open the ids as those of a text; templates do it themselves.
        last: Only the last so many; None: all.

    Raises:
        RequestError: The template cannot say this, refuses, fails, or takes too long.
    """
    for name in ("chat_template", "chat_template_kwargs"):
        if getattr(asked, name) and not trusted:
            raise RequestError(
                f"'{name}' in a request is off: start the server with --trust-request-chat-template, "
                "or leave it out to use the model's own template",
                name,
            )
    template = service.tokenizer.chat_template
    limits: dict[str, Any] = {}
    if asked.chat_template:
        template = await asyncio.to_thread(_template, asked.chat_template, service)
        limits["limit_s"] = REQUEST_TEMPLATE_S
    if template is None:
        raise RequestError("this model has no chat template; send a text to /v1/completions", "messages")
    variables = _variables(template, asked)
    messages = [message.template_fields() for message in asked.messages]
    for message in messages:
        if message["role"] == "developer" and "developer" not in template.source:
            message["role"] = "system"  # most templates know it by its older name
    end = ""
    if asked.continue_final_message:
        end = uuid.uuid4().hex
        messages[-1]["content"] += end
    opens = not asked.continue_final_message and asked.add_generation_prompt is not False
    return await turns.encoded(
        service,
        messages,
        template,
        opens=opens,
        end=end,
        own=(THINK, THOUGHT),
        add_special_tokens=add_special_tokens,
        last=last,
        limits=limits,
        variables=variables,
    )


def _variables(template: ChatTemplate, asked: Conversation) -> dict[str, Any]:
    """What the template sees beside the messages; all of it is something that it reads."""
    found: dict[str, Any] = {}
    if asked.offered:
        if "tools" not in template.variables:
            raise RequestError("this model's chat template cannot show tools to the model; leave them out", "tools")
        found["tools"] = [tool.template_fields() for tool in asked.offered]
    if any(m.tool_calls for m in asked.messages) and "tool_calls" not in template.source:
        raise RequestError("this model's chat template cannot show tool calls to the model", "messages")
    given = dict(asked.chat_template_kwargs or {})
    if asked.reasoning_effort is not None:
        given["reasoning_effort"] = asked.reasoning_effort
    for name, value in given.items():
        param = "reasoning_effort" if name == "reasoning_effort" else f"chat_template_kwargs.{shown(name)}"
        known = template.variables - _OURS
        if name not in known:
            hint = nearest_name(name[:100], known) if known else "it has none"
            raise RequestError(f"{param}: the chat template has no such variable: {hint}", param)
        if value is not None and not isinstance(value, (bool, int, float, str)):
            raise RequestError(f"{param} must be a text, a number, true, false or null", param)
        found[name] = value
    return found


def _template(source: str, service: Service) -> ChatTemplate:
    if len(source) > MAX_TEMPLATE_CHARS:
        raise RequestError(f"chat_template has more than {MAX_TEMPLATE_CHARS} characters", "chat_template")
    try:
        return ChatTemplate(source, service.tokenizer.special_tokens)
    except CheckpointError as e:
        raise RequestError(f"chat_template does not compile: {e.__cause__}", "chat_template") from e
    except RecursionError as e:
        raise RequestError("chat_template is nested too deeply", "chat_template") from e

"""Chat templates: messages in, prompt text out, in a sandbox with a limit on time and size.

A template comes with the model, so it is a stranger's program; the messages come from a client. It sees what
transformers shows it (messages, tools, documents, add_generation_prompt, the special tokens), and nothing else.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fewbit.errors import CheckpointError, RequestError

LIMIT_S = 10.0
LIMIT_CHARS = 64 << 20

_render = threading.local()  # the running render's deadline


class ChatTemplate:
    """One compiled template.

    Attributes:
        source: The Jinja text.
        variables: Names that it reads and does not set itself.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        """Compile a template.

        Args:
            source: The Jinja text.
            special_tokens: Names and texts that the template may use, as `bos_token`.

        Raises:
            CheckpointError: The source is no Jinja template.
        """
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        try:
            environment = _environment()
            self._template = environment.from_string(source)
            self.variables = frozenset(meta.find_undeclared_variables(environment.parse(source)))
        except jinja2.TemplateError as e:
            raise CheckpointError(f"the model's chat template does not compile: {e}") from e

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        limit_s: float = LIMIT_S,
        **variables: Any,
    ) -> str:
        """The prompt for `messages`; encode it without adding special tokens, it spells them out.

        Args:
            messages: Objects with `role` and `content` (and what else the template knows).
            add_generation_prompt: Whether to open the assistant's turn at the end.
            limit_s: Seconds after which rendering is given up.
            **variables: More names for the template; they win over the special tokens.

        Raises:
            RequestError: The template refuses the messages, fails on them, or takes too much time or room.
        """
        names = {"tools": None, "documents": None, **self._special_tokens, **variables}
        names |= {"messages": [dict(m) for m in messages], "add_generation_prompt": add_generation_prompt}
        _render.deadline = time.monotonic() + limit_s
        pieces, size = [], 0
        try:
            for piece in self._template.generate(names):
                size += len(piece)
                if size > LIMIT_CHARS:
                    raise _TooMuchError(f"it wrote more than {LIMIT_CHARS} characters")
                _check_time()
                pieces.append(piece)
        except RecursionError as e:
            raise RequestError("the model's chat template recursed too deeply on these messages", "messages") from e
        except Exception as e:  # the template is a program: it may raise anything at all
            raise RequestError(f"the model's chat template refused the messages: {e}", "messages") from e
        finally:
            _render.deadline = None
        return "".join(pieces)


class _TooMuchError(Exception):
    """A template that takes too much time or room."""


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, and a clock that is looked at wherever a template can spend time or memory."""

    intercepted_binops = frozenset({"*", "**"})

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        _check_time()
        return super().call(__context, __obj, *args, **kwargs)

    def getattr(self, obj: Any, attribute: str) -> Any:
        _check_time()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        _check_time()
        return super().getitem(obj, argument)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _check_time()
        if operator == "**" and not (abs(left) <= 1 << 16 and abs(right) <= 16):
            raise _TooMuchError(f"{left} ** {right} is too large")
        if operator == "*":
            times, thing = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(thing, (str, list, tuple)) and times * len(thing) > LIMIT_CHARS:
                raise _TooMuchError(f"a repetition makes more than {LIMIT_CHARS} items")
        return super().call_binop(context, operator, left, right)


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's words for training; a prompt just contains them."""

    tags = {"generation"}  # noqa: RUF012 (a class attribute of Jinja's)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _environment() -> _Sandbox:
    env = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return env


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own filter escapes HTML, which a prompt must not contain."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _check_time() -> None:
    deadline = getattr(_render, "deadline", None)
    if deadline is not None and time.monotonic() > deadline:
        raise _TooMuchError("it took too long")

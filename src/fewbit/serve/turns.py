"""A chat as a prompt: special tokens are the template's to write; where anybody else spells one out, it is text."""

from __future__ import annotations

import asyncio
import itertools
import re
import secrets
import string
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fewbit.errors import RequestError
from fewbit.serve.body import shown
from fewbit.serve.schema import MAX_CUT_CHARS
from fewbit.serve.service import Service
from fewbit.text import ChatTemplate

_PIECES = 256  # of a prompt are tokenized at one go
_SLACK = 4  # a template may leave out so much of what it is given
_CUT_CHARS = 32
_LETTERS = string.digits + string.ascii_letters + "".join(map(chr, range(0xE000, 0xE100)))  # and some for private use


async def encoded(
    service: Service,
    messages: Sequence[dict[str, Any]],
    template: ChatTemplate | None = None,
    *,
    opens: bool = True,
    end: str = "",
    own: Collection[str] | None = None,
    add_special_tokens: bool = False,
    last: int | None = None,
    limits: dict[str, Any] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> tuple[str, list[int]]:
    """The prompt's text and its tokens.

    Args:
        service: The model.
        messages: What the template sees of them.
        template: None: the model's.
        opens: Whether the prompt opens the assistant's turn.
        end: Where this stands the prompt ends, without it; empty: after all of it.
        own: None: an assistant's turns hold no special tokens. Else they may hold these, and those that bound no turn:
            the model may have written them.
        add_special_tokens: Whether to open the ids as those of a text; templates do it themselves.
        last: Only the last so many; None: all.
        limits: Of `ChatTemplate.render`.
        variables: More that the template sees.

    Raises:
        RequestError: The template cannot say this, refuses, fails, or takes too long; or the prompt is too long.
    """
    template = template or service.tokenizer.chat_template
    if template is None:
        raise RequestError("this model has no chat template; send a text to /v1/completions", "messages")
    special = service.tokenizer.special_texts
    cut, source = _cut_of(special), template.source
    longest, model_len = service.tokenizer.longest_token, service.max_model_len
    room = _Room(_SLACK * (longest * model_len if last is None else MAX_CUT_CHARS), longest)

    def written() -> str:
        bounds = special if own is None else service.tokenizer.turn_texts(source, own)
        turns = [_plain(m, bounds if m.get("role") == "assistant" else special, cut, room) for m in messages]
        return template.render(turns, opens, **(limits or {}), **_plain(dict(variables or {}), special, cut, room))

    whole = await asyncio.to_thread(written)
    if end:
        if end not in whole:
            raise RequestError(
                "the chat template does not show the last message, so nothing can go on with it", "messages"
            )
        whole = whole[: whole.rindex(end)]
    pieces, ids = whole.split(cut), list[int]()
    text = "".join(pieces)
    service.check_length(text, last)
    for i, piece in enumerate(pieces):
        if i % _PIECES == 0:
            await asyncio.sleep(0)  # others may go on between many pieces
        if last is None and len(ids) > service.max_model_len:
            raise RequestError(
                f"the prompt has more tokens than the model length of {service.max_model_len}, prompt and output "
                "together: shorten it",
                "prompt",
            )
        ids += await service.encode(piece, add_special_tokens and i == 0, last) if piece else []
    return text, ids if last is None else ids[-last:]


class _Room:
    """The characters that a chat may still have before it is rendered: many times what could become a prompt."""

    def __init__(self, chars: int, cut_chars: int) -> None:
        self._limit = self._left = chars
        self._cut_chars = cut_chars

    def take(self, chars: int) -> None:
        """Raise a RequestError if there are not so many left."""
        self._left -= chars
        if self._left < 0:
            raise RequestError(
                f"the prompt is too long: its messages and tools have more than {self._limit} characters (a special "
                f"token that is spelled out counts as {self._cut_chars} more), {_SLACK} times what the model could "
                "take: shorten it",
                "prompt",
            )

    def cut(self) -> None:
        """A cut within a text makes one token more of it at the least, be its characters few."""
        self.take(self._cut_chars)


def _cut_of(special: re.Pattern[str]) -> str:
    """A text that nobody can guess, of letters that no special token has: cutting one makes no other."""
    used = set(special.pattern)
    letters = list(itertools.islice((c for c in _LETTERS if c not in used), 16))
    return "".join(secrets.choice(letters) for _ in range(_CUT_CHARS))


def _plain(value: Any, special: re.Pattern[str], cut: str, room: _Room) -> Any:
    """The same texts, keys too, with `cut` within each special token that they spell out."""
    if isinstance(value, dict):
        return {_plain(name, special, cut, room): _plain(inner, special, cut, room) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner, special, cut, room) for inner in value]
    if not isinstance(value, str):
        return value

    def split(found: re.Match[str]) -> str:
        if len(found[0]) == 1:
            raise RequestError(f"'{shown(found[0])}' is a special token of this model and cannot be text", "messages")
        room.cut()
        return found[0][0] + cut + found[0][1:]

    room.take(len(value))
    while special.search(value):  # once, but for tokens of which one begins within another
        value = special.sub(split, value)
    return value

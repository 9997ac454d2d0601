"""A chat as a prompt: special tokens are the template's to write; where anybody else spells one out, it is text."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from fewbit.errors import RequestError
from fewbit.serve.body import shown
from fewbit.serve.service import Service
from fewbit.text import ChatTemplate

_PIECES = 256  # of a prompt are tokenized at one go


async def encoded(
    service: Service,
    messages: Sequence[dict[str, Any]],
    template: ChatTemplate | None = None,
    *,
    opens: bool = True,
    end: str = "",
    add_special_tokens: bool = False,
    last: int | None = None,
    limits: dict[str, Any] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> tuple[str, list[int]]:
    """The prompt's text and its tokens.

    Args:
        service: The model.
        messages: What the template sees of them. An assistant's may hold special tokens: they may be a model's own.
        template: None: the model's.
        opens: Whether the prompt opens the assistant's turn.
        end: Where this stands the prompt ends, without it; empty: after all of it.
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
    cut, special = uuid.uuid4().hex, service.tokenizer.special_texts

    def written() -> str:
        turns = [m if m.get("role") == "assistant" else _plain(m, special, cut) for m in messages]
        return template.render(turns, opens, **(limits or {}), **_plain(dict(variables or {}), special, cut))

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


def _plain(value: Any, special: re.Pattern[str], cut: str) -> Any:
    """The same texts, with `cut` within each special token that they spell out."""
    if isinstance(value, dict):
        return {name: _plain(inner, special, cut) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner, special, cut) for inner in value]
    if not isinstance(value, str):
        return value

    def split(found: re.Match[str]) -> str:
        if len(found[0]) == 1:
            raise RequestError(f"'{shown(found[0])}' is a special token of this model and cannot be text", "messages")
        return found[0][0] + cut + found[0][1:]

    while special.search(value):  # once, but for tokens of which one begins within another
        value = special.sub(split, value)
    return value

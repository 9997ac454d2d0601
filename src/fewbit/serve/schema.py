"""What the bodies of both protocols share: strict models, words, and how much of anything one request may hold.

Strict: true is not 1, "10" is not 10, a field that is not here is an error. Ranges are the engine's to check.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from fewbit.errors import RequestError
from fewbit.serve.body import shown
from fewbit.text import Tokenizer

MAX_CHOICES = 1024  # prompts times n, in one request
MAX_REPORTED = 1 << 20  # log-probabilities about prompts, in one request
MAX_STOPS = 32
MAX_STOP_CHARS = 1024
MAX_BAD_WORD_CHARS = 1024
MAX_TOOLS = 128
MAX_SCHEMA_DEPTH = 64  # objects and arrays in one another, in a JSON schema that the output keeps to
MAX_SCHEMA_CHARS = 1 << 18
MAX_GRAMMAR_CHARS = 1 << 16  # of a regular expression or a grammar
MAX_TEMPLATE_CHARS = 1 << 16  # of a chat template in a request
MAX_CUT_CHARS = 1 << 20  # of a prompt that `truncate_prompt_tokens` cuts


class Strict(BaseModel):
    """No unknown fields, no conversions."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def check_stop(value: Any, param: str = "stop") -> tuple[str, ...]:
    """Stop strings: null, one or several."""
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list):
        raise RequestError(f"{param} must be a string or an array of strings, got {shown(value)}", param)
    if len(stops) > MAX_STOPS:
        raise RequestError(f"{param} holds {len(stops)} strings, more than {MAX_STOPS}", param)
    for i, text in enumerate(stops):
        if not isinstance(text, str):
            raise RequestError(f"{param}[{i}] must be a string, got {shown(text)}", param)
        if not text:
            raise RequestError(f"{param}[{i}] is empty, which would stop everything", param)
        if len(text) > MAX_STOP_CHARS:
            raise RequestError(f"{param}[{i}] has {len(text)} characters, more than {MAX_STOP_CHARS}", param)
    return tuple(stops)


def bad_word_ids(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Words that may not be said, as token ids: each as it begins a text and as it follows a space."""
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        for spelled in (word, f" {word.lstrip()}"):
            if ids := tuple(tokenizer.encode(spelled, add_special_tokens=False)):
                found[ids] = None
    return tuple(found)

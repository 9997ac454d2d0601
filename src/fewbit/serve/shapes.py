"""The JSON of OpenAI answers: whole ones, chunks of a stream, log-probabilities, usage."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fewbit.engine.types import TokenLogprobs
from fewbit.serve.generation import Finish
from fewbit.text import Tokenizer
from fewbit.version import __version__

FLOOR = -9999.0  # JSON has no infinity

Tokens = Sequence[tuple[int, TokenLogprobs]]


@dataclass(frozen=True)
class Envelope:
    """The fields that every part of one answer repeats."""

    kind: str  # text_completion, chat.completion or chat.completion.chunk
    model: str
    prefix: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def wrap(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """One object of the answer."""
        return {
            "id": f"{self.prefix}-{self.id}",
            "object": self.kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"fewbit-{__version__}",
            "choices": choices,
            **more,
        }


def usage(finishes: Iterable[Finish], prompts: int) -> dict[str, Any]:
    """Token counts of a whole answer; each prompt counts once, however many choices it has.

    Args:
        finishes: In the order of the choices: all of the first prompt, then all of the second, ...
        prompts: How many prompts there are.
    """
    ends = list(finishes)
    firsts = ends[:: max(1, len(ends) // prompts)]
    prompt, output = sum(f.prompt_tokens for f in firsts), sum(f.output_tokens for f in ends)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": sum(f.cached_tokens for f in firsts)},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def completion_choice(index: int, text: str, finish: Finish | None, logprobs: dict[str, Any] | None) -> dict[str, Any]:
    """A choice, or a piece of one, of /v1/completions."""
    return {"index": index, "text": text, "logprobs": logprobs, **_finish(finish)}


def chat_choice(index: int, text: str, finish: Finish, logprobs: dict[str, Any] | None) -> dict[str, Any]:
    """A whole choice of /v1/chat/completions."""
    return {
        "index": index,
        "message": {"role": "assistant", "content": text},
        "logprobs": logprobs,
        **_finish(finish),
    }


def chat_delta(
    index: int, delta: dict[str, str], finish: Finish | None = None, logprobs: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A piece of a choice of a chat stream."""
    return {"index": index, "delta": delta, "logprobs": logprobs, **_finish(finish)}


def _finish(finish: Finish | None) -> dict[str, Any]:
    return {
        "finish_reason": None if finish is None else finish.reason,
        "stop_reason": None if finish is None else finish.stop_reason,
    }


class CompletionLogprobs:
    """Log-probabilities of /v1/completions; offsets go on over the pieces of a stream."""

    def __init__(self, tokenizer: Tokenizer, offset: int = 0) -> None:
        self._tokenizer, self._offset = tokenizer, offset

    def of(self, tokens: Tokens) -> dict[str, Any]:
        """The four arrays for these tokens."""
        texts, offsets = [], []
        for token, _ in tokens:
            texts.append(_text(self._tokenizer, token))
            offsets.append(self._offset)
            self._offset += len(texts[-1])
        return {
            "tokens": texts,
            "token_logprobs": [_floor(p.chosen) for _, p in tokens],
            "top_logprobs": [self._top(token, p) for token, p in tokens],
            "text_offset": offsets,
        }

    def _top(self, token: int, logprobs: TokenLogprobs) -> dict[str, float]:
        """The alternatives and the chosen token; of several tokens with the same text the likeliest counts."""
        best: dict[str, float] = {}
        for alternative, value in (*logprobs.top, (token, logprobs.chosen)):
            text = _text(self._tokenizer, alternative)
            best[text] = max(_floor(value), best.get(text, FLOOR))
        return best


def chat_logprobs(tokenizer: Tokenizer, tokens: Tokens) -> dict[str, Any]:
    """Log-probabilities of /v1/chat/completions."""
    return {
        "content": [
            {
                **_token(tokenizer, token, p.chosen),
                "top_logprobs": [_token(tokenizer, alternative, value) for alternative, value in p.top],
            }
            for token, p in tokens
        ],
        "refusal": None,
    }


def _token(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    return {
        "token": _text(tokenizer, token),
        "logprob": _floor(logprob),
        "bytes": list(tokenizer.token_bytes(token)),
    }


def _text(tokenizer: Tokenizer, token: int) -> str:
    """A token by itself; a piece of a character shows as a replacement, its bytes stand beside it."""
    return tokenizer.token_bytes(token).decode(errors="replace")


def _floor(logprob: float) -> float:
    return max(FLOOR, logprob)  # in this order a NaN is the floor too

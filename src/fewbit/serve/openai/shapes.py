"""The JSON of OpenAI answers: whole ones, chunks of a stream, log-probabilities, usage.

The types are what the code is checked against, and what /openapi.json is made from.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from fewbit.engine.types import TokenLogprobs
from fewbit.serve.generation import Finish
from fewbit.text import Detokenizer, Tokenizer
from fewbit.version import __version__

FLOOR = -9999.0  # JSON has no infinity

Reason = Literal["stop", "length", "tool_calls"]
Tokens = Iterable[tuple[int, TokenLogprobs | None]]


class PromptDetails(TypedDict):
    """More about a prompt's tokens."""

    cached_tokens: int


class CompletionDetails(TypedDict):
    """More about the tokens generated."""

    reasoning_tokens: int


class Usage(TypedDict):
    """Token counts; the details come with the end of an answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: NotRequired[PromptDetails]
    completion_tokens_details: NotRequired[CompletionDetails]


class Ranked(TypedDict):
    """A token as `prompt_logprobs` shows it; its rank is known among the likeliest only."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, Ranked] | None]
"""One entry a token of the prompt, null for the first; keys are token ids."""


class TextLogprobs(TypedDict):
    """Log-probabilities of /v1/completions."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(TypedDict):
    """A choice of /v1/completions, or a piece of one."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Reason | None
    stop_reason: str | int | None
    prompt_logprobs: NotRequired[PromptLogprobs]
    prompt_token_ids: NotRequired[list[int]]
    token_ids: NotRequired[list[int]]


class Alternative(TypedDict):
    """A token with its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChatToken(Alternative):
    """A token of a chat's answer."""

    top_logprobs: list[Alternative]


class ChatLogprobs(TypedDict):
    """Log-probabilities of /v1/chat/completions."""

    content: list[ChatToken]
    refusal: None


class CalledFunction(TypedDict):
    """What is called; `arguments` is JSON, or a piece of it in a stream."""

    name: NotRequired[str]
    arguments: str


class ToolCallDelta(TypedDict):
    """A piece of a call: id, type and name come once."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: CalledFunction


class ToolCall(TypedDict):
    """A whole call."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class Delta(TypedDict, total=False):
    """A piece of an assistant's message."""

    role: Literal["assistant"]
    content: str
    reasoning: str
    tool_calls: list[ToolCallDelta]


class AssistantMessage(TypedDict):
    """An assistant's message."""

    role: Literal["assistant"]
    content: str | None
    reasoning: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall]]


class ChatChoice(TypedDict):
    """A choice of /v1/chat/completions."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Reason
    stop_reason: str | int | None
    token_ids: NotRequired[list[int]]


class ChatDelta(TypedDict):
    """A piece of a choice of a streamed chat."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Reason | None
    stop_reason: str | int | None
    token_ids: NotRequired[list[int]]


class _Answer(TypedDict):
    id: str
    created: int
    model: str
    system_fingerprint: str


class Completion(_Answer):
    """The answer of /v1/completions, or a chunk of its stream."""

    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: NotRequired[Usage | None]


class ChatCompletion(_Answer):
    """The answer of /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: NotRequired[PromptLogprobs]
    prompt_token_ids: NotRequired[list[int]]


class ChatChunk(_Answer):
    """A chunk of a streamed chat."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatDelta]
    usage: NotRequired[Usage | None]
    prompt_token_ids: NotRequired[list[int]]


@dataclass(frozen=True)
class Envelope:
    """The fields that every part of one answer repeats."""

    kind: str  # text_completion, chat.completion or chat.completion.chunk
    model: str
    id: str
    created: int = field(default_factory=lambda: int(time.time()))

    def wrap(self, choices: Sequence[Any], **more: Any) -> dict[str, Any]:
        """One object of the answer."""
        return {
            "id": self.id,
            "object": self.kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"fewbit-{__version__}",
            "choices": choices,
            **more,
        }


def new_id() -> str:
    """A name for a request that came without one."""
    return uuid.uuid4().hex


def usage(finishes: Iterable[Finish], prompts: int, reasoning: int = 0) -> Usage:
    """Token counts of a whole answer; each prompt counts once, however many choices it has.

    Args:
        finishes: In the order of the choices: all of the first prompt, then all of the second, ...
        prompts: How many prompts there are.
        reasoning: Tokens of the answer that were thoughts.
    """
    ends = list(finishes)
    firsts = ends[:: max(1, len(ends) // prompts)]
    counts = usage_so_far(sum(f.prompt_tokens for f in firsts), sum(f.output_tokens for f in ends))
    counts["prompt_tokens_details"] = {"cached_tokens": sum(f.cached_tokens for f in firsts)}
    counts["completion_tokens_details"] = {"reasoning_tokens": reasoning}
    return counts


def usage_so_far(prompt: int, output: int) -> Usage:
    """Token counts while an answer grows."""
    return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}


class Spelling:
    """How tokens are written down by themselves.

    Args:
        tokenizer: Whose tokens they are.
        as_ids: Whether each is `token_id:N`.
    """

    def __init__(self, tokenizer: Tokenizer, as_ids: bool = False) -> None:
        self._tokenizer, self._as_ids = tokenizer, as_ids

    def text(self, token: int) -> str:
        """A token's text; where it is a piece of a character, its bytes as OpenAI writes them."""
        if self._as_ids:
            return f"token_id:{token}"
        raw = self._tokenizer.token_bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{b:02x}" for b in raw)

    def bytes(self, token: int) -> list[int]:
        """The bytes that it stands for."""
        return list(self._tokenizer.token_bytes(token))

    def top(self, token: int, logprobs: TokenLogprobs) -> dict[str, float]:
        """The alternatives and the chosen token, by text; of two with one text the less likely goes by its id."""
        found: dict[str, float] = {}
        values = dict(logprobs.top) | {token: logprobs.chosen}
        for alternative, value in sorted(values.items(), key=lambda item: -item[1]):
            text = self.text(alternative)
            found[f"token_id:{alternative}" if text in found else text] = floor(value)
        return found

    def ranked(self, token: int, logprobs: TokenLogprobs) -> dict[str, Ranked]:
        """An entry of `prompt_logprobs`: the prompt's own token first."""
        ranks = {alternative: place for place, (alternative, _) in enumerate(logprobs.top, 1)}
        values = {token: logprobs.chosen} | dict(logprobs.top)
        return {
            str(t): {"logprob": floor(v), "rank": ranks.get(t), "decoded_token": self.text(t)}
            for t, v in values.items()
        }


class TextScribe:
    """Writes log-probabilities of /v1/completions; offsets go on over the pieces of a stream.

    A token's offset is where the text stood when it came: characters that it only begins or continues count later.

    Args:
        spelling: How tokens are written.
        detokenizer: Makes the text that the tokens add to.
        offset: Where that text begins in the choice's.

    Attributes:
        offset: Where the next token begins.
    """

    def __init__(self, spelling: Spelling, detokenizer: Detokenizer, offset: int = 0) -> None:
        self._spelling, self._detokenizer, self.offset = spelling, detokenizer, offset

    def of(self, tokens: Tokens) -> TextLogprobs:
        """The four arrays for these tokens; one without log-probabilities is the first of a text."""
        found: TextLogprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, logprobs in tokens:
            found["tokens"].append(self._spelling.text(token))
            found["token_logprobs"].append(None if logprobs is None else floor(logprobs.chosen))
            found["top_logprobs"].append(None if logprobs is None else self._spelling.top(token, logprobs))
            found["text_offset"].append(self.offset)
            self.offset += len(self._detokenizer.push(token))
        return found


def chat_logprobs(spelling: Spelling, tokens: Sequence[tuple[int, TokenLogprobs]]) -> ChatLogprobs:
    """Log-probabilities of /v1/chat/completions."""

    def entry(token: int, logprob: float) -> Alternative:
        return {"token": spelling.text(token), "logprob": floor(logprob), "bytes": spelling.bytes(token)}

    content: list[ChatToken] = [
        {**entry(token, p.chosen), "top_logprobs": [entry(t, value) for t, value in p.top]} for token, p in tokens
    ]
    return {"content": content, "refusal": None}


def prompt_logprobs(spelling: Spelling, prompt: Sequence[int], found: Sequence[TokenLogprobs]) -> PromptLogprobs:
    """The field of this name: nothing for the prompt's first token, then an entry for each."""
    return [None, *(spelling.ranked(token, p) for token, p in zip(prompt[1:], found, strict=True))]


def floor(logprob: float) -> float:
    """The number as JSON can say it."""
    return max(FLOOR, logprob)  # in this order a NaN is the floor too

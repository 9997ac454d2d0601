"""The bodies of OpenAI requests: every field that is honoured, its type, and what it means to the engine.

Strict: true is not 1, "10" is not 10, a field that is not here is an error. Ranges are the engine's to check.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from fewbit.engine.types import SamplingParams
from fewbit.errors import RequestError
from fewbit.serve.body import shown

MAX_CHOICES = 1024  # prompts times n, in one request
MAX_STOPS = 32
MAX_STOP_CHARS = 1024
_SEED_STEP = 0x9E3779B97F4A7C15  # odd, so that the seeds of 2**64 choices differ


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


def _check_prompt(value: Any) -> Any:
    """A text, ids, or an array of either."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise RequestError("prompt must be a text, an array of token ids, or a non-empty array of these", "prompt")
    kinds = {type(part) for part in value}
    if kinds == {int} or kinds == {str}:
        return value
    if kinds != {list}:
        raise RequestError(
            "prompt must hold either texts, or token ids, or arrays of token ids; not a mixture", "prompt"
        )
    for i, ids in enumerate(value):
        if not ids or any(type(t) is not int for t in ids):
            raise RequestError(f"prompt[{i}] must be a non-empty array of token ids", "prompt")
    return value


class StreamOptions(Strict):
    """How a stream is reported."""

    include_usage: bool | None = None


class Sampled(Strict):
    """What completions and chat share."""

    model: str | None = None  # None: the one that is served
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Annotated[tuple[str, ...], BeforeValidator(check_stop)] = ()
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[int], Field(fail_fast=True)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    # These cannot change the answer, so anything is fine.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    nested: ClassVar[Mapping[str, type[BaseModel]]] = {"stream_options": StreamOptions}
    # Fields that exist elsewhere and are not honoured here, with the values that ask for nothing.
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "logit_bias": ({},),
        "response_format": ({"type": "text"},),
        "structured_outputs": (),
        "best_of": (1,),
        "use_beam_search": (False,),
        "length_penalty": (1, 1.0),
        "prompt_logprobs": (),
        "truncate_prompt_tokens": (),
        "allowed_token_ids": (),
        "bad_words": ([],),
        "spaces_between_special_tokens": (True,),
        "priority": (0,),
        "return_token_ids": (False,),
        "return_tokens_as_token_ids": (False,),
        "cache_salt": (),
    }

    @property
    def choices(self) -> int:
        """How many answers to each prompt."""
        return 1 if self.n is None else self.n

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk of token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def check(self) -> None:
        """What no single field shows."""
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is only allowed with stream: true", "stream_options")
        if not 1 <= self.choices <= MAX_CHOICES:
            raise RequestError(f"n must be between 1 and {MAX_CHOICES}, got {self.n}", "n")
        if self.choices > 1 and self.temperature == 0:
            raise RequestError(f"n must be 1 when temperature is 0 (all choices would be equal), got {self.n}", "n")

    def sampling(self, **more: Any) -> SamplingParams:
        """What the engine is asked for; fields that are absent or null keep the engine's defaults."""
        names = (
            *("max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
            *("presence_penalty", "frequency_penalty", "seed", "ignore_eos"),
        )
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return SamplingParams(**given | {"stop_token_ids": tuple(self.stop_token_ids or ())} | more)


class CompletionRequest(Sampled):
    """POST /v1/completions."""

    prompt: Annotated[str | list[Any], BeforeValidator(_check_prompt)]
    logprobs: int | None = None
    echo: bool | None = None

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **Sampled.neutral,
        "suffix": ("",),
        "add_special_tokens": (True,),
    }

    def check(self) -> None:
        """See `Sampled.check`."""
        super().check()
        if self.echo and self.logprobs is not None:
            raise RequestError(
                "echo together with logprobs is not supported: log-probabilities are of generated tokens only", "echo"
            )
        prompts = len(self.prompts)
        if prompts * self.choices > MAX_CHOICES:
            raise RequestError(f"{prompts} prompts x n {self.choices} are more than {MAX_CHOICES} choices", "prompt")

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or many."""
        single = isinstance(self.prompt, str) or type(self.prompt[0]) is int
        return [self.prompt] if single else list(self.prompt)


def _join_content(value: Any) -> str:
    """A message's content: a text, or text parts, which are joined by line breaks."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a text or an array of text parts")
    for i, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise ValueError(f"part {i} has type '{shown(kind)}', which is not supported: this model reads text only")
        if kind is None or part.keys() != {"type", "text"} or not isinstance(part["text"], str):
            raise ValueError(f'part {i} must be {{"type": "text", "text": a text}}')
    return "\n".join(part["text"] for part in value)


class Message(Strict):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_join_content)]
    name: str | None = None
    # An assistant's message as this API returns it may be sent back; null is all that these may be.
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None
    reasoning: None = None

    def template_fields(self) -> dict[str, str]:
        """What a chat template sees."""
        return {"role": self.role, "content": self.content} | ({} if self.name is None else {"name": self.name})


class ChatRequest(Sampled):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    nested: ClassVar[Mapping[str, type[BaseModel]]] = {**Sampled.nested, "messages": Message}
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **Sampled.neutral,
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "functions": ([],),
        "function_call": ("none",),
        "modalities": (["text"],),
        "reasoning_effort": (),
        "verbosity": (),
        "prediction": (),
        "audio": (),
        "web_search_options": (),
        "chat_template": (),
        "chat_template_kwargs": ({},),
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
        "documents": ([],),
        "echo": (False,),
        "add_special_tokens": (False,),
    }

    def check(self) -> None:
        """See `Sampled.check`."""
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs is only allowed with logprobs: true", "top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise RequestError("max_tokens and max_completion_tokens say different things", "max_completion_tokens")

    @property
    def limit_tokens(self) -> int | None:
        """Most tokens to generate, by either name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def without_neutral(model: type[Sampled], fields: dict[str, Any]) -> dict[str, Any]:
    """`fields` less those that are known, not honoured, and ask for nothing.

    Raises:
        RequestError: One of them asks for something.
    """
    for name in fields.keys() & model.neutral.keys():
        value = fields[name]
        if value is not None and not any(type(value) is type(n) and value == n for n in model.neutral[name]):
            raise RequestError(f"'{name}' is not supported by this server, leave it out", name)
    return {name: value for name, value in fields.items() if name not in model.neutral}


def seed_of(seed: int | None, choice: int) -> int | None:
    """The seed of the `choice`-th answer: the first has the request's own."""
    return None if seed is None else (seed + choice * _SEED_STEP) % 2**64

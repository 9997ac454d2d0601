"""What completions and chat may ask: every field that is honoured, its type, and what it means to the engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, cast

from pydantic import BaseModel, BeforeValidator, Field, GetJsonSchemaHandler, WithJsonSchema
from pydantic_core import CoreSchema

from fewbit.engine.check import (
    MAX_ALLOWED_TOKENS,
    MAX_BAD_WORDS,
    MAX_BIASES,
    MAX_LOGPROBS,
    MAX_PRIORITY,
    MAX_SALT,
)
from fewbit.engine.types import SamplingParams
from fewbit.errors import RequestError
from fewbit.serve.body import shown
from fewbit.serve.exchange import SANE_ID
from fewbit.serve.openai.structured import FORMATS, ResponseFormat, StructuredOutputs
from fewbit.serve.schema import MAX_BAD_WORD_CHARS, MAX_CHOICES, MAX_STOPS, Strict, check_stop

_SEED_STEP = 0x9E3779B97F4A7C15  # odd, so that the seeds of 2**64 choices differ
_REMOVED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")  # vLLM's old names


def _check_biases(value: Any) -> tuple[tuple[int, float], ...]:
    """JSON's keys are strings: {"50256": -100}."""
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise RequestError(f"logit_bias must be an object of token ids and biases, got {shown(value)}", "logit_bias")
    if len(value) > MAX_BIASES:
        raise RequestError(f"logit_bias has {len(value)} entries, more than {MAX_BIASES}", "logit_bias")
    found = []
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise RequestError(f"logit_bias: '{shown(key)}' is no token id", "logit_bias")
        if type(bias) not in (int, float):
            raise RequestError(f"logit_bias: the bias of {key} must be a number, got {shown(bias)}", "logit_bias")
        found.append((int(key), float(bias)))
    return tuple(found)


def _check_bad_words(value: Any) -> tuple[str, ...]:
    """Words; empty ones forbid nothing."""
    words = [] if value is None else value
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise RequestError("bad_words must be an array of texts", "bad_words")
    if len(words) > MAX_BAD_WORDS:
        raise RequestError(f"bad_words holds {len(words)} words, more than {MAX_BAD_WORDS}", "bad_words")
    if any(len(word) > MAX_BAD_WORD_CHARS for word in words):
        raise RequestError(f"bad_words: a word has more than {MAX_BAD_WORD_CHARS} characters", "bad_words")
    return tuple(word for word in words if word)


def _check_request_id(value: Any) -> str | None:
    """A name for the request, which goes into headers and logs."""
    if value is None or (isinstance(value, str) and SANE_ID.fullmatch(value)):
        return value
    raise RequestError(f"request_id must be a text of the form {SANE_ID.pattern}", "request_id")


def _check_prompt(value: Any) -> Any:
    """A text, ids, or an array of either."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise RequestError("prompt must be a text, an array of token ids, or a non-empty array of these", "prompt")
    kinds = {type(part) for part in value}
    if kinds == {int} or kinds == {str}:
        return value
    if len(value) > MAX_CHOICES:
        raise RequestError(f"prompt holds {len(value)} prompts, more than {MAX_CHOICES}", "prompt")
    if kinds != {list}:
        raise RequestError(
            "prompt must hold either texts, or token ids, or arrays of token ids; not a mixture", "prompt"
        )
    for i, ids in enumerate(value):
        if not ids or any(type(t) is not int for t in ids):
            raise RequestError(f"prompt[{i}] must be a non-empty array of token ids", "prompt")
    return value


_IDS = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
_PROMPT = {"anyOf": [{"type": "string"}, _IDS, *({"type": "array", "items": x, "minItems": 1} for x in (
    {"type": "string"}, _IDS))]}  # fmt: skip
_STOP = {"anyOf": [{"type": "null"}, {"type": "string", "minLength": 1},
    {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": MAX_STOPS}]}  # fmt: skip
_BIASES = {"anyOf": [{"type": "null"}, {"type": "object", "propertyNames": {"pattern": "^[0-9]{1,10}$"},
    "additionalProperties": {"type": "number"}, "maxProperties": MAX_BIASES}]}  # fmt: skip
_WORDS = {"anyOf": [{"type": "null"}, {"type": "array", "items": {"type": "string"}, "maxItems": MAX_BAD_WORDS}]}
_NAME = {"anyOf": [{"type": "null"}, {"type": "string", "pattern": f"^{SANE_ID.pattern}$"}]}


def within(**limits: float) -> Any:
    """Says a range in the JSON schema; the engine checks it, in its own words."""
    return Field(json_schema_extra=dict(limits))


class StreamOptions(Strict):
    """How a stream is reported."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Sampled(Strict):
    """What completions and chat share."""

    model: str | None = None  # None: the one that is served
    max_tokens: Annotated[int | None, within(minimum=0)] = None
    temperature: Annotated[float | None, within(minimum=0)] = None
    top_p: Annotated[float | None, within(exclusiveMinimum=0, maximum=1)] = None
    top_k: Annotated[int | None, within(minimum=-1)] = None
    min_p: Annotated[float | None, within(minimum=0, maximum=1)] = None
    n: Annotated[int | None, within(minimum=1, maximum=MAX_CHOICES)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Annotated[tuple[str, ...], BeforeValidator(check_stop), WithJsonSchema(_STOP)] = ()
    seed: Annotated[int | None, within(minimum=0, maximum=2**64 - 1)] = None
    presence_penalty: Annotated[float | None, within(minimum=-2, maximum=2)] = None
    frequency_penalty: Annotated[float | None, within(minimum=-2, maximum=2)] = None
    repetition_penalty: Annotated[float | None, within(minimum=0.001, maximum=1000)] = None
    min_tokens: Annotated[int | None, within(minimum=0)] = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[int], Field(fail_fast=True)] | None = None
    logit_bias: Annotated[tuple[tuple[int, float], ...], BeforeValidator(_check_biases), WithJsonSchema(_BIASES)] = ()
    allowed_token_ids: (
        Annotated[list[int], Field(fail_fast=True, min_length=1, max_length=MAX_ALLOWED_TOKENS)] | None
    ) = None
    bad_words: Annotated[tuple[str, ...], BeforeValidator(_check_bad_words), WithJsonSchema(_WORDS)] = ()
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=1)] | None = None  # the last so many tokens of a prompt
    prompt_logprobs: Annotated[int | None, within(minimum=0, maximum=MAX_LOGPROBS)] = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_SALT)] | None = None
    request_id: Annotated[str | None, BeforeValidator(_check_request_id), WithJsonSchema(_NAME)] = None
    # These cannot change the answer, so anything is fine.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    nested: ClassVar[Mapping[str, type[BaseModel]]] = {"stream_options": StreamOptions, **FORMATS}
    # Fields that exist elsewhere and are not honoured here, with the values that ask for nothing.
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "best_of": (1,),
        "use_beam_search": (False,),
        "length_penalty": (1, 1.0),
        "spaces_between_special_tokens": (True,),
    }

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """The schema, with the fields that are taken only where they ask for nothing."""
        schema = handler(core)
        whole = handler.resolve_ref_schema(schema)
        whole["properties"] |= {name: {"enum": [None, *values]} for name, values in cls.neutral.items()}
        return schema

    @property
    def choices(self) -> int:
        """How many answers to each prompt."""
        return 1 if self.n is None else self.n

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk of token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def wants_running_usage(self) -> bool:
        """Whether each chunk of a stream carries the token counts so far."""
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)

    @property
    def asks_about_prompt(self) -> bool:
        """Whether there is something to say when nothing is generated."""
        return self.prompt_logprobs is not None

    def check(self) -> None:
        """What no single field shows."""
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is only allowed with stream: true", "stream_options")
        if self.wants_running_usage and not self.wants_usage:
            raise RequestError("continuous_usage_stats is only allowed with include_usage: true", "stream_options")
        if not 1 <= self.choices <= MAX_CHOICES:
            raise RequestError(f"n must be between 1 and {MAX_CHOICES}, got {self.n}", "n")
        if self.choices > 1 and self.temperature == 0:
            raise RequestError(f"n must be 1 when temperature is 0 (all choices would be equal), got {self.n}", "n")
        if self.prompt_logprobs is not None and self.stream:
            raise RequestError("prompt_logprobs is not allowed with stream: true", "prompt_logprobs")
        if self.max_tokens == 0 and not self.asks_about_prompt:
            raise RequestError(
                "max_tokens must be at least 1, got 0, which is for `echo` and `prompt_logprobs` only", "max_tokens"
            )
        if self.structured_outputs is not None and self.response_format not in (None, ResponseFormat(type="text")):
            raise RequestError("give response_format or structured_outputs, not both", "structured_outputs")

    def sampling(self, **more: Any) -> SamplingParams:
        """What the engine is asked for; fields that are absent or null keep the engine's defaults."""
        names = (
            *("max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
            *("presence_penalty", "frequency_penalty", "seed", "ignore_eos", "prompt_logprobs"),
        )
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.allowed_token_ids is not None:
            given["allowed_token_ids"] = tuple(self.allowed_token_ids)
        ids = {"stop_token_ids": tuple(self.stop_token_ids or ()), "logit_bias": self.logit_bias}
        return SamplingParams(**given | ids | more)


class CompletionRequest(Sampled):
    """POST /v1/completions."""

    prompt: Annotated[str | list[Any], BeforeValidator(_check_prompt), WithJsonSchema(_PROMPT)]
    logprobs: Annotated[int | None, within(minimum=0, maximum=MAX_LOGPROBS)] = None
    echo: bool | None = None

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {**Sampled.neutral, "suffix": ("",)}

    @property
    def asks_about_prompt(self) -> bool:
        """See `Sampled`."""
        return super().asks_about_prompt or bool(self.echo)

    def check(self) -> None:
        """See `Sampled.check`."""
        super().check()
        prompts = len(self.prompts)
        if prompts * self.choices > MAX_CHOICES:
            raise RequestError(f"{prompts} prompts x n {self.choices} are more than {MAX_CHOICES} choices", "prompt")

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or many."""
        single = isinstance(self.prompt, str) or type(self.prompt[0]) is int
        return [cast("str | list[int]", self.prompt)] if single else list(self.prompt)


def without_neutral(model: type[Sampled], fields: dict[str, Any]) -> dict[str, Any]:
    """`fields` less those that are known, not honoured, and ask for nothing.

    Raises:
        RequestError: One of them asks for something.
    """
    for name in _REMOVED:
        if name in fields:
            inner = name.removeprefix("guided_")
            raise RequestError(
                f"'{name}' is a removed field of vLLM's: send structured_outputs: {{\"{inner}\": ...}}", name
            )
    for name in fields.keys() & model.neutral.keys():
        value = fields[name]
        if value is not None and not any(type(value) is type(n) and value == n for n in model.neutral[name]):
            raise RequestError(f"'{name}' is not supported by this server, leave it out", name)
    return {name: value for name, value in fields.items() if name not in model.neutral}


def seed_of(seed: int | None, choice: int) -> int | None:
    """The seed of the `choice`-th answer: the first has the request's own."""
    return None if seed is None else (seed + choice * _SEED_STEP) % 2**64

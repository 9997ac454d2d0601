"""What goes in and out of the engine: a request, its events, one ending. Plain data, also on the wire."""

from __future__ import annotations

from typing import Literal

import msgspec

from fewbit.errors import FewbitError, RequestError

EndReason = Literal["stop", "length", "abort", "error"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How tokens are chosen and when to stop. Limits are checked by `check_request`, never clamped."""

    max_tokens: int = 16  # 0: nothing is generated, the prompt is only looked at
    min_tokens: int = 0  # until then neither an end-of-sequence nor a stop token may be chosen
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output
    presence_penalty: float = 0.0  # over output
    frequency_penalty: float = 0.0  # over output
    seed: int | None = None  # None: drawn by the engine
    logprobs: int | None = None  # how many alternatives to report beside each chosen token; None: report nothing
    stop_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences that may not be completed
    ignore_eos: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()  # (id, what is added to its logit)
    allowed_token_ids: tuple[int, ...] | None = None  # nothing else may be chosen
    prompt_logprobs: int | None = None  # as `logprobs`, for the tokens of the prompt; None: report nothing
    prompt_logprobs_from: int = 1  # index of the first prompt token to report; those before may come from the cache
    grammar: str | None = None  # the output keeps to it: as `fewbit.text.grammar` writes it


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt to continue. `id` is chosen by the client and names the request until its ending."""

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams = SamplingParams()
    priority: int = 0  # the lowest number runs first; among equals who came first
    salt: str = ""  # K and V of known prefixes are shared only among requests with the same one


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Natural-log probability of the chosen token and of the likeliest ones, before temperature and cuts."""

    chosen: float
    top: tuple[tuple[int, float], ...] = ()


class Ending(msgspec.Struct, frozen=True):
    """How a request ended. Every request gets exactly one."""

    reason: EndReason
    detail: str = ""  # for an error: what to tell the user
    stop_token: int | None = None  # the stop token id that ended it (it is not sent as a token)
    prompt_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens whose K and V were found in the prefix cache
    output_tokens: int = 0
    impossible: bool = False  # of an error: what was asked for cannot be, and asking again will not help


class Event(msgspec.Struct, frozen=True):
    """Something that happened to request `id`: a token, an ending, or (the last token) both.

    `prompt_logprobs` come before the first token, those of the prompt's second token first (or of
    `prompt_logprobs_from`), over one or more events.
    """

    id: str
    token: int | None = None
    logprobs: TokenLogprobs | None = None
    ending: Ending | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine is doing (gauges) and has done since it started (counters, named `..._total`)."""

    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0  # of those who wait
    waiting_preempted: int = 0  # of those who wait: were running already
    blocks: int = 0  # K/V blocks in all
    blocks_used: int = 0
    blocks_free: int = 0  # blocks_used + blocks_free == blocks
    blocks_cached: int = 0  # of the free ones: still findable as a prefix
    kv_bytes: int = 0  # really allocated
    steps_total: int = 0
    computed_tokens_total: int = 0  # tokens that went through the model
    prompt_tokens_total: int = 0  # of requests that were begun
    output_tokens_total: int = 0
    prefix_queries_total: int = 0  # prompt tokens looked up in the prefix cache
    prefix_hits_total: int = 0  # of these, found
    preemptions_total: int = 0
    endings_total: dict[str, int] = {}  # by EndReason
    busy_s: float = 0.0  # how long the step in progress has been running


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a client may want to know about an engine; it does not change while the engine lives."""

    vocab: int
    max_model_len: int
    max_batch: int
    max_queued: int
    block_size: int
    eos_token_ids: tuple[int, ...] = ()
    device: str = "cpu"


class OverloadedError(RequestError):
    """The queue is full, or the engine is shutting down: the same request may succeed later or elsewhere."""


class QueueFullError(OverloadedError):
    """As many requests wait as may."""


class EngineDownError(FewbitError):
    """The engine is dead, hung or unreachable: no request can be answered."""

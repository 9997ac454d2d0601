"""What goes in and out of the engine: a request, its events, one ending. Plain data, also on the wire."""

from __future__ import annotations

from typing import Literal

import msgspec

EndReason = Literal["stop", "length", "abort", "error"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How tokens are chosen and when to stop. Limits are checked by `check_request`, never clamped."""

    max_tokens: int = 16
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


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt to continue. `id` is chosen by the client and names the request until its ending."""

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams = SamplingParams()


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


class Event(msgspec.Struct, frozen=True):
    """Something that happened to request `id`: a token, an ending, or (the last token) both."""

    id: str
    token: int | None = None
    logprobs: TokenLogprobs | None = None
    ending: Ending | None = None

"""Is this a request the engine can honour? Everything is said here, in one line, before it is queued. No torch."""

from __future__ import annotations

import math

from fewbit.engine.config import EngineConfig
from fewbit.engine.types import GenerateRequest, SamplingParams
from fewbit.errors import RequestError

MAX_LOGPROBS = 20
MAX_BAD_WORDS = 128
MAX_BAD_WORD_TOKENS = 1024  # in all
REPETITION_PENALTY = (0.001, 1000)
MAX_STOP_TOKENS = 1024
MAX_BIASES = 1024  # OpenAI takes 300
MAX_BIAS = 100.0  # either way, as OpenAI has it
MAX_ALLOWED_TOKENS = 4096
MAX_PRIORITY = 2**31 - 1  # either way
MAX_SALT = 256  # characters


def check_request(request: GenerateRequest, config: EngineConfig) -> None:
    """Raise a `RequestError` that says what was given, what is allowed and which parameter it is about."""
    check_params(request.params, config.vocab)
    prompt, wanted = len(request.prompt), request.params.max_tokens
    if not request.id:
        raise RequestError("the request id is empty", "id")
    ok = abs(request.priority) <= MAX_PRIORITY
    _check(ok, "priority", request.priority, f"in [-{MAX_PRIORITY}, {MAX_PRIORITY}]")
    _check(len(request.salt) <= MAX_SALT, "salt", len(request.salt), f"at most {MAX_SALT} characters long")
    if prompt == 0:
        raise RequestError("the prompt is empty: at least one token is needed", "prompt")
    _check_ids(request.prompt, config.vocab, "prompt")
    longest = config.max_model_len - (1 if wanted else 0)
    if prompt > longest:
        raise RequestError(
            f"the prompt has {prompt} tokens and the model length is {config.max_model_len}, prompt and output "
            f"together: shorten it to at most {longest}",
            "prompt",
        )
    if prompt + wanted > config.max_model_len:
        raise RequestError(
            f"prompt {prompt} + max_tokens {wanted} = {prompt + wanted} tokens exceed the model length of "
            f"{config.max_model_len}: ask for at most {config.max_model_len - prompt} or shorten the prompt",
            "max_tokens",
        )
    stored = prompt + max(wanted, 1) - 1  # nothing comes after the last token, so its K and V are never stored
    blocks = -(-stored // config.block_size)
    if blocks > config.num_blocks:
        raise RequestError(
            f"prompt {prompt} + max_tokens {wanted}{' - 1' if wanted else ''} = {stored} tokens need {blocks} K/V "
            f"blocks of {config.block_size}, and there are {config.num_blocks} ({config.capacity} tokens): ask for "
            f"fewer tokens or start the engine with a larger K/V cache",
            "max_tokens",
        )


def check_params(params: SamplingParams, vocab: int) -> None:
    """The part of `check_request` that needs no prompt."""
    p = params
    _check(p.max_tokens >= 0, "max_tokens", p.max_tokens, "at least 0")
    _check(p.min_tokens >= 0, "min_tokens", p.min_tokens, "at least 0")
    _check(p.min_tokens <= p.max_tokens, "min_tokens", p.min_tokens, f"at most max_tokens ({p.max_tokens})")
    _check(math.isfinite(p.temperature) and p.temperature >= 0, "temperature", p.temperature, "finite and at least 0")
    _check(p.top_k >= -1, "top_k", p.top_k, "at least 1, or 0 or -1 for off")
    _check(0 < p.top_p <= 1, "top_p", p.top_p, "in (0, 1]")
    _check(0 <= p.min_p <= 1, "min_p", p.min_p, "in [0, 1]")
    least, most = REPETITION_PENALTY  # beyond them a product with a logit is no number any more
    _check(least <= p.repetition_penalty <= most, "repetition_penalty", p.repetition_penalty, f"in [{least}, {most}]")
    _check(-2 <= p.presence_penalty <= 2, "presence_penalty", p.presence_penalty, "in [-2, 2]")
    _check(-2 <= p.frequency_penalty <= 2, "frequency_penalty", p.frequency_penalty, "in [-2, 2]")
    if p.seed is not None:
        _check(0 <= p.seed < 2**64, "seed", p.seed, "in [0, 2**64)")
    _check(p.prompt_logprobs_from >= 1, "prompt_logprobs_from", p.prompt_logprobs_from, "at least 1")
    for name, count in (("logprobs", p.logprobs), ("prompt_logprobs", p.prompt_logprobs)):
        if count is not None:
            _check(0 <= count <= MAX_LOGPROBS, name, count, f"in [0, {MAX_LOGPROBS}]")
            _check(count <= vocab, name, count, f"at most the vocabulary ({vocab})")
    _check(len(p.stop_token_ids) <= MAX_STOP_TOKENS, "stop_token_ids", len(p.stop_token_ids), "at most 1024 ids")
    _check_ids(p.stop_token_ids, vocab, "stop_token_ids")
    _check(len(p.bad_words) <= MAX_BAD_WORDS, "bad_words", len(p.bad_words), f"at most {MAX_BAD_WORDS} words")
    total = sum(len(word) for word in p.bad_words)
    _check(total <= MAX_BAD_WORD_TOKENS, "bad_words", total, f"at most {MAX_BAD_WORD_TOKENS} tokens in all")
    for word in p.bad_words:
        if not word:
            raise RequestError("bad_words holds an empty sequence, which would forbid everything", "bad_words")
        _check_ids(word, vocab, "bad_words")
    _check_biases(p.logit_bias, vocab)
    if p.allowed_token_ids is not None:
        ok = 1 <= len(p.allowed_token_ids) <= MAX_ALLOWED_TOKENS
        _check(ok, "allowed_token_ids", len(p.allowed_token_ids), f"1 to {MAX_ALLOWED_TOKENS} ids")
        _check_ids(p.allowed_token_ids, vocab, "allowed_token_ids")


def _check_biases(biases: tuple[tuple[int, float], ...], vocab: int) -> None:
    _check(len(biases) <= MAX_BIASES, "logit_bias", len(biases), f"at most {MAX_BIASES} entries")
    ids = tuple(token for token, _ in biases)
    _check_ids(ids, vocab, "logit_bias")
    if len(set(ids)) < len(ids):
        twice = next(token for token in ids if ids.count(token) > 1)
        raise RequestError(f"logit_bias names token id {twice} more than once; give each id one bias", "logit_bias")
    for token, bias in biases:
        ok = -MAX_BIAS <= bias <= MAX_BIAS  # no NaN passes this
        _check(ok, "logit_bias", f"{bias} for token id {token}", f"in [-{MAX_BIAS:g}, {MAX_BIAS:g}]")


def _check(ok: bool, param: str, given: object, allowed: str) -> None:
    if not ok:
        raise RequestError(f"{param} must be {allowed}, got {given}", param)


def _check_ids(ids: tuple[int, ...], vocab: int, param: str) -> None:
    if ids and not (min(ids) >= 0 and max(ids) < vocab):
        index, wrong = next((i, t) for i, t in enumerate(ids) if not 0 <= t < vocab)
        raise RequestError(f"{param}[{index}] is token id {wrong}, outside the vocabulary of {vocab}", param)

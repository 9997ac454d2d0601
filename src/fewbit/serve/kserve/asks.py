"""From inputs to what is asked: one `Ask` a row of the request, whatever its inputs are called, and its jobs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from fewbit.engine.types import SamplingParams
from fewbit.errors import RequestError, nearest_name
from fewbit.serve import turns
from fewbit.serve.body import shown
from fewbit.serve.generation import Job
from fewbit.serve.kserve import guides
from fewbit.serve.kserve.messages import InferRequest
from fewbit.serve.kserve.signatures import BATCHES, Input, Signature
from fewbit.serve.kserve.tensors import Tensor, numbers, text
from fewbit.serve.openai.requests import seed_of
from fewbit.serve.schema import MAX_CHOICES, bad_word_ids, check_stop
from fewbit.serve.service import Service, with_seed
from fewbit.text import Tokenizer

Row = dict[str, Any]
"""What one row of a request asks for, by `Input.means`."""

_WORDS = ("stop", "bad_words")
_LISTS = (*_WORDS, "bias_words", "bias_weights", "bias", "stop_ids", "bad_ids", "tokens", "lengths")
_CUTS = ("temperature", "top_k", "top_p")
# What the engine calls by a name of its own.
_OURS = {"log_probs": "logprobs", "top_log_probs": "logprobs", "prompt_log_probs": "prompt_logprobs"}


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What one row asks for. None: nothing is said."""

    prompt: str | tuple[int, ...]
    prompt_tokens: int | None = None  # of the ids of `prompt` that count; the rest is padding
    begin: bool | None = None  # whether the prompt opens with the token that opens a text
    chat: bool = False  # the prompt is a chat, or a question in one
    max_tokens: int | None = None
    min_tokens: int | None = None
    choices: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    top_p_or_zero: float | None = None  # where 0 is what others say for "all"
    greedy: bool = False
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    bad_words: tuple[str, ...] = ()
    bad_ids: tuple[tuple[int, ...], ...] = ()
    stop: tuple[str, ...] = ()
    stop_ids: tuple[tuple[int, ...], ...] = ()
    end_id: int | None = None
    pad_id: int | None = None
    bias_words: tuple[str, ...] = ()
    bias_weights: tuple[float, ...] = ()
    bias: tuple[float, ...] = ()  # of each token of the vocabulary
    guide_type: str | None = None
    guide: str | None = None
    exclude_prompt: bool | None = None
    echo: bool | None = None
    stream: bool | None = None
    log_probs: bool = False
    top_log_probs: int | None = None
    prompt_log_probs: int | None = None
    perf: bool = False
    count_input: bool = False
    count_output: bool = False
    details: bool = False
    names: Mapping[str, str] = field(default_factory=dict)  # what the client calls these fields

    @property
    def has_prompt(self) -> bool | None:
        """Whether the answer begins with the prompt; None: the client does not say."""
        if self.echo is not None:
            return self.echo
        return None if self.exclude_prompt is None else not self.exclude_prompt


def read(signature: Signature, request: InferRequest) -> list[Row]:
    """What each row asks for.

    Raises:
        RequestError: An input is unknown, missing, of the wrong type or shape, or asks for what is not done here.
    """
    known = {i.name: i for i in signature.inputs}
    for name in request.inputs:
        if name not in known:
            raise RequestError(f"unknown input '{shown(name)}': {nearest_name(name[:100], known)}", shown(name))
    for one in signature.inputs:
        if one.required and one.name not in request.inputs:
            raise RequestError(f"{one.name} is required", one.name)
    first = next(i.name for i in signature.inputs if i.required)
    shape = request.inputs[first].shape
    batch = shape[0] if shape else 0
    if not 1 <= batch <= BATCHES:
        raise RequestError(f"'{first}' has {batch} rows, 1 to {BATCHES} are possible", first)
    rows: list[Row] = [{"names": {}} for _ in range(batch)]
    for name, tensor in request.inputs.items():
        _check(known[name], tensor)
        if not known[name].means:
            _check_neutral(known[name], tensor)
            continue
        for row, value in zip(rows, _values(known[name], tensor, batch), strict=True):
            _fill(row, known[name], value)
    return rows


def asks(rows: Sequence[Row], wanted: Sequence[str] = ()) -> list[Ask]:
    """The rows of a request that is generated for.

    Args:
        rows: From `read`.
        wanted: Fields that the outputs which are asked for turn on.

    Raises:
        RequestError: What cannot be asked together.
    """
    on = {f.name: True for f in fields(Ask) if f.default is False and f.name in wanted}
    found = [Ask(**row | on) for row in rows]
    total = sum(_choices(ask) for ask in found)
    if total > MAX_CHOICES:
        raise RequestError(f"the request wants {total} texts, more than {MAX_CHOICES}")
    return found


async def jobs(service: Service, ask: Ask, signature: Signature, priority: int) -> list[Job]:
    """One job for each text that a row asks for.

    Raises:
        RequestError: The engine could not do it; in the client's words.
    """
    try:
        params = _params(ask, signature, service.tokenizer)
        service.check_params(params)
        if ask.guide_type is not None or ask.guide is not None:
            params = await guides.guided(service, params, ask.guide_type, ask.guide, ask.names)
        ids = await _prompt(service, ask)
        stop = (*ask.stop, *(service.tokenizer.decode(word) for word in ask.stop_ids))
        job = service.job(ids, params, ask.max_tokens is not None, stop=stop, continues=not ask.chat, priority=priority)
    except RequestError as e:
        raise _in_their_words(e, ask.names) from e
    return [with_seed(job, seed_of(ask.seed, choice)) for choice in range(_choices(ask))]


# ---- reading ----


def _check(wanted: Input, tensor: Tensor) -> None:
    name, expected = wanted.name, (-1, *wanted.dims)
    if tensor.datatype != wanted.datatype:
        raise RequestError(f"'{name}' must be {wanted.datatype}, got {tensor.datatype}", name)
    ok = len(tensor.shape) == len(expected) and all(w in (-1, d) for w, d in zip(expected, tensor.shape, strict=True))
    if not ok:
        raise RequestError(f"the shape of '{name}' must be {list(expected)}, got {list(tensor.shape)}", name)


def _check_neutral(wanted: Input, tensor: Tensor) -> None:
    for value in tensor.values.reshape(-1).tolist():
        if value not in wanted.neutral:
            plain = value.decode(errors="replace") if isinstance(value, bytes) else value
            raise RequestError(
                f"'{wanted.name}': {shown(plain)} is not supported by this server, leave it out", wanted.name
            )


def _values(wanted: Input, tensor: Tensor, batch: int) -> list[Any]:
    """The value of each row."""
    name, values = wanted.name, tensor.values
    if wanted.means in _WORDS and values.shape[-1] == 1 and len(values) != batch:
        words = [word for e in values.reshape(-1) if (word := text(name, e))]
        return [check_stop(words, name)] * batch  # a column: words for every row
    if len(values) != batch:
        raise RequestError(f"'{name}' has {len(values)} rows, the request has {batch}", name)
    if wanted.datatype == "BYTES":
        return [[text(name, e) for e in row.reshape(-1)] for row in values]
    if wanted.datatype.startswith("FP"):  # the shortest decimal is what the client wrote: 0.7 means 0.7
        return [[float(str(e)) for e in row.reshape(-1)] for row in numbers(tensor)]
    return list(values) if len(wanted.dims) > 1 else [row.tolist() for row in values]


def _fill(row: Row, wanted: Input, value: Any) -> None:
    name, means = wanted.name, wanted.means
    if means in row and means not in _WORDS:
        raise RequestError(f"{row['names'][means]} and {name} are two names of one thing, give one", name)
    row["names"][means] = name
    if means in _WORDS:
        words = check_stop([word for word in value if word], name)
        row[means] = (*row.get(means, ()), *words)
    elif means in ("stop_ids", "bad_ids"):
        row[means] = _split(name, value)
    elif means in ("tokens", "lengths"):
        row[means] = value
    elif means in _LISTS or (means == "prompt" and wanted.datatype != "BYTES"):
        row[means] = tuple(value)
    else:
        row[means] = value[0]


def _split(name: str, value: np.ndarray) -> tuple[tuple[int, ...], ...]:
    """Words as TensorRT-LLM writes them: their ids one after the other, and where each of them ends; then -1."""
    ids, ends = value[0].tolist(), [end for end in value[1].tolist() if end != -1]
    if any(not 0 <= a < b <= len(ids) for a, b in zip([0, *ends], ends, strict=False)):
        raise RequestError(
            f"the second row of '{name}' must say where each word ends, in order; got {shown(ends)}", name
        )
    return tuple(tuple(ids[a:b]) for a, b in zip([0, *ends], ends, strict=False))


def _choices(ask: Ask) -> int:
    if ask.choices is not None and not 1 <= ask.choices <= MAX_CHOICES:
        name = ask.names["choices"]
        raise RequestError(f"{name} must be between 1 and {MAX_CHOICES}, got {ask.choices}", name)
    if (ask.choices or 1) > 1 and _greedy(ask):
        name = ask.names["choices"]
        raise RequestError(
            f"{name} {ask.choices} wants sampling: without a temperature above 0, top_k or top_p all would be equal",
            name,
        )
    return ask.choices or 1


# ---- to the engine ----


def _greedy(ask: Ask) -> bool:
    """Where nothing is said about sampling, the likeliest token is taken, as in Triton's models."""
    said = (ask.temperature, ask.top_k, ask.top_p, ask.top_p_or_zero)
    return ask.greedy or ask.temperature == 0 or all(value is None for value in said)


def _params(ask: Ask, signature: Signature, tokenizer: Tokenizer) -> SamplingParams:
    given: dict[str, Any] = {
        name: value
        for name in (*_CUTS, "repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens", "seed")
        if (value := getattr(ask, name)) is not None
    }
    if ask.top_p_or_zero:
        given["top_p"] = ask.top_p_or_zero
    if _greedy(ask):
        given["temperature"] = 0.0
    if ask.end_id is not None and ask.end_id not in tokenizer.eos_ids:  # it takes the place of the model's own
        given |= {"stop_token_ids": (ask.end_id,), "ignore_eos": True}
    if ask.log_probs or ask.top_log_probs is not None or ask.details:
        given["logprobs"] = ask.top_log_probs or 0
    if ask.prompt_log_probs is not None:
        given["prompt_logprobs"] = ask.prompt_log_probs
    return SamplingParams(
        max_tokens=signature.max_tokens if ask.max_tokens is None else ask.max_tokens,
        bad_words=(*bad_word_ids(ask.bad_words, tokenizer), *ask.bad_ids),
        logit_bias=biases(ask, tokenizer),
        **given,
    )


def biases(ask: Ask, tokenizer: Tokenizer) -> tuple[tuple[int, float], ...]:
    """What is added to the logits: a word's weight goes to the tokens that are this word, after a space or not."""
    if len(ask.bias_words) != len(ask.bias_weights):
        words, weights = (ask.names.get(m, m) for m in ("bias_words", "bias_weights"))
        raise RequestError(
            f"{len(ask.bias_words)} {words} and {len(ask.bias_weights)} {weights}: one for each", weights
        )
    found = {token: weight for token, weight in enumerate(ask.bias) if weight}
    for word, weight in zip(ask.bias_words, ask.bias_weights, strict=True):
        if not word:
            continue
        spelled = (tokenizer.encode(s, add_special_tokens=False) for s in {word, f" {word.lstrip()}"})
        single = {ids[0] for ids in spelled if len(ids) == 1}
        if not single:
            name = ask.names["bias_words"]
            raise RequestError(f"{name}: '{shown(word)}' is no single token of this model, only such have a bias", name)
        for token in single:
            found[token] = found.get(token, 0.0) + weight
    return tuple(sorted(found.items()))


async def _prompt(service: Service, ask: Ask) -> list[int]:
    if not isinstance(ask.prompt, str):
        ids = list(ask.prompt)
        if ask.prompt_tokens is not None:
            if not 0 <= ask.prompt_tokens <= len(ids):
                name = ask.names["prompt_tokens"]
                raise RequestError(f"{name} is {ask.prompt_tokens}, the row has {len(ids)} ids", name)
            ids = ids[: ask.prompt_tokens]
        return ids
    if ask.chat:
        return (await turns.encoded(service, _messages(ask)))[1]
    if ask.begin is None:
        return await service.encode(ask.prompt)
    ids = await service.encode(ask.prompt, add_special_tokens=False)
    bos = service.tokenizer.bos_id
    if ask.begin and bos is None:
        raise RequestError(f"{ask.names['begin']}: this model has no token that opens a text", ask.names["begin"])
    return [bos, *ids] if ask.begin and bos is not None else ids


def _messages(ask: Ask) -> list[dict[str, Any]]:
    """The messages of a chat in JSON; any other text is a question."""
    assert isinstance(ask.prompt, str)
    try:
        messages = json.loads(ask.prompt) if ask.prompt.lstrip().startswith("[") else None
    except (ValueError, RecursionError):
        messages = None
    if messages is None:
        return [{"role": "user", "content": ask.prompt}]
    for message in messages:
        ok = isinstance(message, dict) and message.keys() == {"role", "content"}
        if not ok or not all(isinstance(value, str) for value in message.values()):
            name = ask.names["prompt"]
            raise RequestError(f"{name}: each message of a chat must have a role and a content, both texts", name)
    return list(messages)


def _in_their_words(error: RequestError, names: Mapping[str, str]) -> RequestError:
    """The same error, about the input as the client calls it."""
    ours = {_OURS.get(means, means): name for means, name in names.items()}
    if type(error) is not RequestError or error.param not in ours:
        return error
    name = ours[error.param]
    return RequestError(str(error).replace("the prompt" if error.param == "prompt" else error.param, name), name)

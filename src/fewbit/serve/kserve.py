"""The v2 protocol (KServe, Triton): POST /v2/models/M/generate as Triton's TensorRT-LLM ensemble answers it.

A field may stand at the top or in `parameters`; a scalar may be an array of one; "" and [""] are no words. Where
nothing about sampling is said, the likeliest token is taken, as there. The text of the answer repeats the prompt
unless `exclude_input_in_output` is true.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from fewbit.engine.types import SamplingParams
from fewbit.errors import RequestError
from fewbit.serve.body import read_object, shown
from fewbit.serve.connection import body_of
from fewbit.serve.generation import Result, collect
from fewbit.serve.problems import UnknownModelError, json_response, validated
from fewbit.serve.schema import Strict, check_stop
from fewbit.serve.service import Service
from fewbit.text import Tokenizer

ENSEMBLE = "ensemble"
_DEFAULT_TOKENS = 20
_WORDS = ("bad_words", "stop_words", "stop")
# Fields of the ensemble that are not honoured, with the values that ask for nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "stream": (False,),
    "beam_width": (1,),
    "num_return_sequences": (1,),
    "length_penalty": (1, 1.0, 0, 0.0),
    "return_log_probs": (False,),
    "return_context_logits": (False,),
    "return_generation_logits": (False,),
    "return_perf_metrics": (False,),
    "return_num_input_tokens": (False,),
    "return_num_output_tokens": (False,),
    "details": (False,),
}


class GenerateBody(Strict):
    """The fields that are honoured, lifted to one level."""

    text_input: str
    id: str | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    bad_words: Any = None
    stop_words: Any = None
    stop: Any = None  # the Open Inference Protocol's name for stop_words
    exclude_input_in_output: bool | None = None
    end_id: int | None = None
    pad_id: int | None = Field(None, description="accepted, nothing is padded here")
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    random_seed: int | None = None


def routes(service: Service) -> APIRouter:
    """The router of one service."""
    router = APIRouter()

    @router.post("/v2/models/{model}/generate")
    @router.post("/v2/models/{model}/versions/{version}/generate")
    async def generate(request: Request, model: str, version: str = "1") -> Response:
        body = _parsed(await read_object(request))
        params = _params(body, service.tokenizer)
        service.check_params(params)
        stop = (*_words(body.stop_words, "stop_words"), *_words(body.stop, "stop"))
        service.check_model(model, ENSEMBLE)
        if version != "1":
            raise UnknownModelError(f"the model '{shown(model)}' has version 1 only, not '{shown(version)}'")
        service.check_ready()
        try:
            ids = await service.encode(body.text_input)
            job = service.job(ids, params, body.max_tokens is not None, stop=stop, continues=True)
        except RequestError as e:
            raise RequestError(str(e).replace("the prompt", "text_input"), "text_input") from e

        async def work() -> list[Result]:
            return await collect(await service.start([job]))

        (result,) = await body_of(request, work())
        text = result.text if body.exclude_input_in_output else body.text_input + result.text
        answer = {
            "model_name": model,
            "model_version": "1",
            "sequence_end": False,
            "sequence_id": 0,
            "sequence_start": False,
            "text_output": text,
        }
        return json_response({"id": body.id} | answer if body.id is not None else answer)

    return router


def _parsed(fields: dict[str, Any]) -> GenerateBody:
    parameters = fields.pop("parameters", None) or {}
    if not isinstance(parameters, dict):
        raise RequestError(f"parameters must be an object, got {shown(parameters)}", "parameters")
    if twice := sorted(fields.keys() & parameters.keys()):
        raise RequestError(f"'{shown(twice[0])}' stands both at the top and in parameters", shown(twice[0]))
    flat = {name: _scalar(name, value) for name, value in (fields | parameters).items()}
    for name in flat.keys() & _NEUTRAL.keys():
        value = flat.pop(name)
        if value is not None and not any(type(value) is type(n) and value == n for n in _NEUTRAL[name]):
            raise RequestError(f"'{name}': {shown(value)} is not supported by this server, leave it out", name)
    return validated(GenerateBody, flat)


def _scalar(name: str, value: Any) -> Any:
    """An array of one is its element, for everything but lists of words."""
    return value[0] if isinstance(value, list) and len(value) == 1 and name not in _WORDS else value


def _words(value: Any, param: str) -> tuple[str, ...]:
    """Words given as a string or an array; empty ones are none."""
    words = [value] if isinstance(value, str) else value
    if isinstance(words, list):
        words = [word for word in words if word != ""]
    return check_stop(words, param)


def _params(body: GenerateBody, tokenizer: Tokenizer) -> SamplingParams:
    if body.seed is not None and body.random_seed is not None:
        raise RequestError("seed and random_seed are two names of one thing, give one", "random_seed")
    names = (
        "temperature",
        "top_k",
        "top_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "min_tokens",
    )
    given: dict[str, Any] = {name: value for name in names if (value := getattr(body, name)) is not None}
    if not given.keys() & {"temperature", "top_k", "top_p"}:
        given["temperature"] = 0.0
    ends: dict[str, Any] = {}
    if body.end_id is not None and body.end_id not in tokenizer.eos_ids:  # it takes the place of the model's own
        ends = {"stop_token_ids": (body.end_id,), "ignore_eos": True}
    return SamplingParams(
        max_tokens=_DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens,
        seed=body.random_seed if body.seed is None else body.seed,
        bad_words=_bad_words(_words(body.bad_words, "bad_words"), tokenizer),
        **given,
        **ends,
    )


def _bad_words(words: tuple[str, ...], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Each word as it begins a text and as it follows a space."""
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        for spelled in (word, f" {word.lstrip()}"):
            if ids := tuple(tokenizer.encode(spelled, add_special_tokens=False)):
                found[ids] = None
    return tuple(found)

"""From the fields that completions and chat share to what the engine is asked."""

from __future__ import annotations

from typing import Any

import msgspec

from fewbit.engine.types import SamplingParams
from fewbit.serve.openai import structured
from fewbit.serve.openai.requests import Sampled
from fewbit.serve.schema import bad_word_ids
from fewbit.serve.service import Service


def params_of(service: Service, body: Sampled, **more: Any) -> SamplingParams:
    """All but the grammar, checked as the engine would."""
    words = bad_word_ids(body.bad_words, service.tokenizer)
    params = body.sampling(bad_words=words, **{k: v for k, v in more.items() if v is not None})
    service.check_params(params)
    return params


async def fitted(service: Service, body: Sampled, params: SamplingParams) -> SamplingParams:
    """The same with the grammar that the request asks for."""
    return await with_grammar(service, structured.wanted(body.response_format, body.structured_outputs), params)


async def with_grammar(
    service: Service, asked: tuple[structured.Make, str] | None, params: SamplingParams
) -> SamplingParams:
    """The same with a grammar; it has been compiled once when this returns."""
    if asked is None:
        return params
    return msgspec.structs.replace(params, grammar=await structured.compiled(*asked, service))


def cut(body: Sampled) -> dict[str, Any]:
    """The fields of a job that say how its text is cut and who it waits for."""
    return {
        "stop": body.stop,
        "include_stop": bool(body.include_stop_str_in_output),
        "skip_special_tokens": body.skip_special_tokens is not False,
        "priority": body.priority or 0,
        "salt": body.cache_salt or "",
    }

"""Guided decoding: a guide's type and text, in the names of TensorRT-LLM, as a grammar that the output keeps to."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from fewbit.engine.types import SamplingParams
from fewbit.errors import RequestError
from fewbit.serve.body import shown
from fewbit.serve.openai.structured import StructuredOutputs, compiled, wanted
from fewbit.serve.service import Service

TYPES = ("json", "json_schema", "regex", "ebnf_grammar")


async def guided(
    service: Service, params: SamplingParams, kind: str | None, guide: str | None, names: Mapping[str, str]
) -> SamplingParams:
    """`params` with the grammar.

    Args:
        service: The model.
        params: What else is asked.
        kind: One of `TYPES`; "" and None: no guide.
        guide: The schema, expression or grammar; nothing for "json", which is any JSON object.
        names: What the client calls `guide_type` and `guide`.

    Raises:
        RequestError: It is no such guide, or cannot be compiled.
    """
    kind_name, guide_name = names.get("guide_type", "guide type"), names.get("guide", "guide")
    if not kind:
        if guide:
            raise RequestError(f"{guide_name} wants a type: {', '.join(TYPES)}", guide_name)
        return params
    if kind not in TYPES:
        raise RequestError(f"{kind_name} must be one of {', '.join(TYPES)}, got {shown(kind)}", kind_name)
    if bool(guide) == (kind == "json"):
        raise RequestError(f"{kind_name} {kind} wants {'no' if guide else 'a'} guide", guide_name)
    asked = {"json": {"json_object": True}, "json_schema": {"json": guide}, "regex": {"regex": guide}}
    try:
        found = wanted(None, StructuredOutputs.model_validate(asked.get(kind, {"grammar": guide})))
    except RequestError as e:  # it speaks of the field that OpenAI's clients send
        text = str(e).replace("structured_outputs", guide_name).replace("the body", guide_name)
        raise RequestError(text, guide_name) from e
    assert found is not None
    return msgspec.structs.replace(params, grammar=await compiled(found[0], guide_name, service))

"""The generate extension: the inputs of one row as plain JSON, the outputs as a flat object.

A field may stand at the top or in `parameters`; a scalar may be an array of one; "" and [""] are no words.
"""

from __future__ import annotations

import json
from typing import Any

from fewbit.errors import RequestError, nearest_name
from fewbit.serve.body import shown
from fewbit.serve.kserve.messages import PARAMETERS, VERSION, InferRequest, checked_parameters
from fewbit.serve.kserve.signatures import Input, Signature
from fewbit.serve.kserve.tensors import Tensor, from_json, to_list

_WORDS = {"BYTES": "string", "BOOL": "boolean"}
_TYPES: dict[str, tuple[type, ...]] = {"string": (str,), "boolean": (bool,), "number": (int, float), "integer": (int,)}


def parsed(signature: Signature, fields: dict[str, Any]) -> InferRequest:
    """A request from a body.

    Raises:
        RequestError: A field is unknown, given twice, or of the wrong type.
    """
    inner = fields.pop("parameters", None) or {}
    if not isinstance(inner, dict):
        raise RequestError(f"parameters must be an object, got {shown(inner)}", "parameters")
    if twice := sorted(fields.keys() & inner.keys()):
        raise RequestError(f"'{shown(twice[0])}' stands both at the top and in parameters", shown(twice[0]))
    inputs: dict[str, Tensor] = {}
    parameters: dict[str, Any] = {}
    identity = ""
    known = [i.name for i in signature.inputs]
    for name, value in (fields | inner).items():
        one = signature.input(name)
        if value is None and (one is not None or name in PARAMETERS or name == "id"):
            continue
        if one is not None:
            inputs[name] = _tensor(one, value)
        elif name == "id":
            identity = _scalar("id", "string", value)
        elif name in PARAMETERS:
            parameters[name] = value
        else:
            hint = nearest_name(name[:100], (*known, *PARAMETERS, "id"))
            raise RequestError(f"unknown field '{shown(name)}': {hint}", shown(name))
    return InferRequest(inputs, None, identity, checked_parameters(parameters))


def flat(model: str, request: InferRequest, outputs: list[Tensor]) -> dict[str, Any]:
    """An answer: tensors of one element are scalars, others arrays."""
    answer: dict[str, Any] = {"id": request.id} if request.id else {}
    answer |= {
        "model_name": model,
        "model_version": VERSION,
        "sequence_end": False,
        "sequence_id": 0,
        "sequence_start": False,
    }
    for tensor in outputs:
        values = to_list(tensor)
        answer[tensor.name] = values[0] if len(values) == 1 else values
        if tensor.name == "details":  # an object in the Open Inference Protocol
            answer["details"] = json.loads(values[0])
    return answer


def _tensor(one: Input, value: Any) -> Tensor:
    kind = _WORDS.get(one.datatype, "number" if one.datatype.startswith("FP") else "integer")
    if one.dims == (1,):
        return from_json(one.name, one.datatype, [1, 1], [_scalar(one.name, kind, value)])
    if len(one.dims) > 1:
        raise RequestError(f"'{one.name}' has several dimensions, send it with infer", one.name)
    values = [value] if isinstance(value, _TYPES[kind]) else value
    if not isinstance(values, list):
        raise RequestError(f"{one.name} must be a {kind} or an array of {kind}s, got {shown(value)}", one.name)
    return from_json(one.name, one.datatype, [1, len(values)], values)


def _scalar(name: str, kind: str, value: Any) -> Any:
    """The element; an array of one will do."""
    only = value[0] if isinstance(value, list) and len(value) == 1 else value
    if type(only) not in _TYPES[kind]:
        got = "" if isinstance(only, (dict, list)) else f", got {shown(json.dumps(only))}"
        raise RequestError(f"{name} must be a valid {kind}{got}", name)
    return only

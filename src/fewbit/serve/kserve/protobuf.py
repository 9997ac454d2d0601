"""Inference calls in gRPC's messages, both ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fewbit.errors import RequestError
from fewbit.serve.body import shown
from fewbit.serve.kserve.messages import (
    VERSION,
    InferRequest,
    check_input_parameters,
    check_output_parameters,
    checked_parameters,
    unique,
)
from fewbit.serve.kserve.protocol import messages
from fewbit.serve.kserve.tensors import Tensor, from_bytes, from_elements, to_bytes

# Where the elements of a tensor stand that does not come as raw bytes. FP16 and BF16 have no such place.
_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


def parsed(message: Any) -> InferRequest:
    """A request from a ModelInferRequest.

    Raises:
        RequestError: Its tensors do not fit together, or a parameter is unknown.
    """
    unique([one.name for one in message.inputs], "input")
    unique([one.name for one in message.outputs], "output")
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        raise RequestError(f"raw_input_contents has {len(raw)} entries for {len(message.inputs)} inputs", "inputs")
    inputs = {}
    for i, one in enumerate(message.inputs):
        check_input_parameters(one.name, parameters(one.parameters))
        inputs[one.name] = _tensor(one, raw[i] if raw else None)
    for wanted in message.outputs:
        check_output_parameters(wanted.name, parameters(wanted.parameters))
    names = tuple(one.name for one in message.outputs) or None
    return InferRequest(inputs, names, message.id, checked_parameters(parameters(message.parameters)))


def answer(name: str, request_id: str, outputs: Sequence[Tensor]) -> Any:
    """A ModelInferResponse."""
    found = messages()["ModelInferResponse"](model_name=name, model_version=VERSION, id=request_id)
    for tensor in outputs:
        found.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        found.raw_output_contents.append(to_bytes(tensor))
    return found


def parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    """A message's parameters as plain values.

    Raises:
        RequestError: One has no value.
    """
    found = {}
    for name, parameter in given.items():
        choice = parameter.WhichOneof("parameter_choice")
        if choice is None:
            raise RequestError(f"the parameter '{shown(name)}' has no value", shown(name))
        found[name] = getattr(parameter, choice)
    return found


def _tensor(one: Any, raw: bytes | None) -> Tensor:
    typed = one.contents.ListFields()
    if raw is not None:
        if typed:
            raise RequestError(f"'{shown(one.name)}' has contents, and raw_input_contents are given too", one.name)
        return from_bytes(one.name, one.datatype, list(one.shape), raw)
    place = _CONTENTS.get(one.datatype, "raw_input_contents")
    if any(field.name != place for field, _ in typed):
        raise RequestError(f"the contents of '{shown(one.name)}', {shown(one.datatype)}, belong into {place}", one.name)
    return from_elements(one.name, one.datatype, list(one.shape), typed[0][1] if typed else ())

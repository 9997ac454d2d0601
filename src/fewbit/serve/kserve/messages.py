"""What an inference call says, whichever way it came; and its HTTP form: JSON, perhaps with binary tensors after it.

The header ``Inference-Header-Content-Length`` says where the JSON ends, in both directions. gRPC's form is in `rpc`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NotRequired

from typing_extensions import TypedDict

from fewbit.errors import RequestError, nearest_name
from fewbit.serve.body import parse_object, shown
from fewbit.serve.kserve.tensors import Tensor, from_bytes, from_json, to_bytes, to_list
from fewbit.serve.problems import json_bytes

HEADER_LENGTH = "Inference-Header-Content-Length"
MAX_TENSORS = 256
MAX_PRIORITY = 2**31 - 1
VERSION = "1"

PARAMETERS: Mapping[str, type] = {
    "priority": int,
    "timeout": int,  # microseconds
    "accumulate_tokens": bool,
    "triton_enable_empty_final_response": bool,
    "sequence_id": object,
    "sequence_start": bool,
    "sequence_end": bool,
}
"""The parameters that a request may have."""
_SEQUENCE = ("sequence_id", "sequence_start", "sequence_end")


class InputBody(TypedDict):
    """An input in JSON; its elements stand in `data`, flat or nested, or in the bytes after the JSON."""

    name: str
    datatype: str
    shape: list[int]
    data: NotRequired[list[Any]]
    parameters: NotRequired[dict[str, Any]]


class OutputBody(TypedDict):
    """An output that is wanted."""

    name: str
    parameters: NotRequired[dict[str, Any]]


class InferBody(TypedDict):
    """POST infer."""

    inputs: list[InputBody]
    outputs: NotRequired[list[OutputBody]]
    id: NotRequired[str]
    parameters: NotRequired[dict[str, Any]]


class InferAnswer(TypedDict):
    """The answer of infer."""

    id: NotRequired[str]
    model_name: str
    model_version: str
    outputs: list[InputBody]


@dataclass(frozen=True)
class InferRequest:
    """A call of a model.

    Attributes:
        inputs: By name.
        outputs: The names that are wanted; None: what the model gives by itself.
        id: The client's, sent back.
        parameters: Of the request; only those of `checked_parameters`.
    """

    inputs: Mapping[str, Tensor]
    outputs: tuple[str, ...] | None = None
    id: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def timeout_s(self) -> float | None:
        """How long it may take; None: as long as it takes."""
        micros = self.parameters.get("timeout", 0)
        return micros / 1e6 if micros else None

    @property
    def priority(self) -> int:
        """The lowest runs first."""
        return int(self.parameters.get("priority", 0))


def checked_parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a request.

    Raises:
        RequestError: One is unknown, of the wrong type, or asks for a sequence of requests that share state.
    """
    for name, value in given.items():
        wanted = PARAMETERS.get(name)
        if wanted is None:
            hint = nearest_name(shown(name), PARAMETERS)
            raise RequestError(f"unknown parameter '{shown(name)}' of the request: {hint}", shown(name))
        if wanted is not object and type(value) is not wanted:
            raise RequestError(f"the parameter '{name}' must be {wanted.__name__}, got {shown(value)}", name)
        if name in _SEQUENCE and value not in (0, "", False):
            raise RequestError(f"'{name}': requests that share state are not supported, leave it out", name)
        if wanted is int and not 0 <= value <= (MAX_PRIORITY if name == "priority" else 2**63):
            raise RequestError(f"the parameter '{name}' is {value}, which is out of range", name)
    return dict(given)


def check_input_parameters(name: str, given: Mapping[str, Any], known: Sequence[str] = ()) -> None:
    """Raise a RequestError for a parameter of an input that is not one of `known`."""
    _no_shared_memory(name, given)
    _known(given, known, f"parameter of '{shown(name)}'")


def check_output_parameters(name: str, given: Mapping[str, Any], known: Sequence[str] = ()) -> None:
    """Raise a RequestError for a parameter of an output that is not one of `known`, or asks for classes."""
    if given.get("classification", 0) != 0:
        raise RequestError(f"'{shown(name)}': classification is not supported, leave it out", name)
    check_input_parameters(name, given, (*known, "classification"))


def unique(items: Sequence[Any], what: str) -> None:
    """Raise a RequestError for a name that stands twice, or too many of them."""
    if len(items) > MAX_TENSORS:
        raise RequestError(f"{len(items)} {what}s are more than {MAX_TENSORS}", what)
    seen: set[Any] = set()
    for name in items:
        if name in seen:
            raise RequestError(f"the {what} '{shown(name)}' is given twice", shown(name))
        seen.add(name)


class Wanted:
    """In which form an HTTP client wants the outputs."""

    def __init__(self, everything: bool, some: Mapping[str, bool]) -> None:
        self._everything, self._some = everything, some

    def binary(self, name: str) -> bool:
        """Whether this output is sent as bytes after the JSON."""
        return self._some.get(name, self._everything)


def parse(body: bytes, header_length: str | None) -> tuple[InferRequest, Wanted]:
    """A request from an HTTP body.

    Args:
        body: All of it.
        header_length: Where the JSON ends, as the header says it; None: there is nothing after it.

    Raises:
        RequestError: It is no request.
    """
    end = len(body) if header_length is None else _split(body, header_length)
    fields = parse_object(body[:end])
    _known(fields, ("id", "parameters", "inputs", "outputs"), "field")
    identity = fields.get("id")
    if identity is not None and not isinstance(identity, str):
        raise RequestError(f"id must be a string, got {shown(identity)}", "id")
    parameters = _object(fields.get("parameters"), "parameters")
    everything = _flag(parameters.pop("binary_data_output", False), "binary_data_output")
    outputs, some = _outputs(fields.get("outputs"))
    request = InferRequest(
        _inputs(fields.get("inputs"), memoryview(body)[end:]),
        outputs,
        identity or "",
        checked_parameters(parameters),
    )
    return request, Wanted(everything, some)


def render(model: str, request: InferRequest, outputs: Sequence[Tensor], wanted: Wanted) -> tuple[bytes, int | None]:
    """A response's HTTP body, and where its JSON ends if something comes after it."""
    described, blobs = [], []
    for tensor in outputs:
        entry: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
        if wanted.binary(tensor.name):
            blobs.append(to_bytes(tensor))
            entry["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            entry["data"] = to_list(tensor)
        described.append(entry)
    named = {"id": request.id} if request.id else {}
    head = json_bytes(named | {"model_name": model, "model_version": VERSION, "outputs": described})
    return b"".join((head, *blobs)), len(head) if blobs else None


def _split(body: bytes, header_length: str) -> int:
    if not header_length.isdecimal() or not header_length.isascii() or len(header_length) > 12:
        raise RequestError(f"{HEADER_LENGTH} must be a number of bytes, got '{shown(header_length)}'", HEADER_LENGTH)
    end = int(header_length)
    if end > len(body):
        raise RequestError(f"{HEADER_LENGTH} says {end}, the body has {len(body)} bytes", HEADER_LENGTH)
    if end == 0:
        raise RequestError(
            f"{HEADER_LENGTH} 0, a body that is one raw tensor, is for models with one input; name the inputs in JSON",
            HEADER_LENGTH,
        )
    return end


def _inputs(given: Any, blobs: memoryview) -> dict[str, Tensor]:
    entries = _entries(given, "input")
    if not entries:
        raise RequestError("inputs is missing: at least one input is needed", "inputs")
    found, at = {}, 0
    for entry in entries:
        name = entry["name"]
        _known(entry, ("name", "datatype", "shape", "data", "parameters"), f"field of '{shown(name)}'")
        parameters = _object(entry.get("parameters"), "parameters")
        check_input_parameters(name, parameters, ("binary_data_size",))
        size = parameters.get("binary_data_size")
        if (size is None) == ("data" not in entry):
            raise RequestError(f"'{shown(name)}' must have either data or the parameter binary_data_size", name)
        if size is None:
            found[name] = from_json(name, entry.get("datatype"), entry.get("shape"), entry["data"])
            continue
        if type(size) is not int or not 0 <= size <= len(blobs) - at:
            left = len(blobs) - at
            raise RequestError(f"binary_data_size of '{name}' is {shown(size)}, {left} bytes are left", name)
        found[name] = from_bytes(name, entry.get("datatype"), entry.get("shape"), blobs[at : at + size])
        at += size
    if at != len(blobs):
        raise RequestError(f"{len(blobs) - at} bytes after the JSON belong to no input", "inputs")
    return found


def _outputs(given: Any) -> tuple[tuple[str, ...] | None, dict[str, bool]]:
    entries = _entries(given, "output")
    binary: dict[str, bool] = {}
    for entry in entries:
        name = entry["name"]
        _known(entry, ("name", "parameters"), f"field of '{shown(name)}'")
        parameters = _object(entry.get("parameters"), "parameters")
        check_output_parameters(name, parameters, ("binary_data",))
        if "binary_data" in parameters:
            binary[name] = _flag(parameters["binary_data"], "binary_data")
    return tuple(entry["name"] for entry in entries) or None, binary


def _entries(given: Any, what: str) -> list[dict[str, Any]]:
    entries = [] if given is None else given
    if not isinstance(entries, list) or any(not isinstance(e, dict) for e in entries):
        raise RequestError(f"{what}s must be an array of objects, got {shown(given)}", f"{what}s")
    for entry in entries:
        if not isinstance(entry.get("name"), str):
            raise RequestError(f"each {what} must have a name, a string; got {shown(entry.get('name'))}", "name")
    unique([entry["name"] for entry in entries], what)
    return entries


def _object(given: Any, what: str) -> dict[str, Any]:
    if given is not None and not isinstance(given, dict):
        raise RequestError(f"{what} must be an object, got {shown(given)}", what)
    return dict(given or {})


def _flag(given: Any, name: str) -> bool:
    if not isinstance(given, bool):
        raise RequestError(f"{name} must be true or false, got {shown(given)}", name)
    return given


def _known(given: Mapping[str, Any], names: Sequence[str], what: str) -> None:
    for name in given:
        if name not in names:
            raise RequestError(f"unknown {what} '{shown(name)}': {nearest_name(name[:100], names)}", shown(name))


def _no_shared_memory(name: str, parameters: Mapping[str, Any]) -> None:
    if any(key.startswith("shared_memory_") for key in parameters):
        raise RequestError(f"'{shown(name)}': shared memory is not supported, send the data in the request", name)

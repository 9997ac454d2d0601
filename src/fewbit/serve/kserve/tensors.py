"""The v2 protocol's tensors: datatypes, and the JSON and binary form of their elements, both ways. NumPy only."""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from fewbit.errors import RequestError, nearest_name
from fewbit.serve.body import shown

MAX_RANK = 8
MAX_ELEMENTS = 1 << 21
_LENGTH = struct.Struct("<I")  # before each element of a BYTES tensor

# BF16 has no NumPy type: its bits stand in 16-bit integers. BYTES are Python's own.
DATATYPES = MappingProxyType(
    {
        "BOOL": np.dtype(np.bool_),
        "UINT8": np.dtype("<u1"),
        "UINT16": np.dtype("<u2"),
        "UINT32": np.dtype("<u4"),
        "UINT64": np.dtype("<u8"),
        "INT8": np.dtype("<i1"),
        "INT16": np.dtype("<i2"),
        "INT32": np.dtype("<i4"),
        "INT64": np.dtype("<i8"),
        "FP16": np.dtype("<f2"),
        "BF16": np.dtype("<u2"),
        "FP32": np.dtype("<f4"),
        "FP64": np.dtype("<f8"),
        "BYTES": np.dtype(object),
    }
)


@dataclass(frozen=True, eq=False)
class Tensor:
    """A named array.

    Attributes:
        name: Of the input or output.
        datatype: A key of `DATATYPES`.
        values: Of that type, in the tensor's shape; elements of BYTES are `bytes`.
    """

    name: str
    datatype: str
    values: np.ndarray

    @property
    def size_bytes(self) -> int:
        """What its elements take."""
        return sum(map(len, self.values.flat)) if self.datatype == "BYTES" else self.values.nbytes

    @property
    def shape(self) -> tuple[int, ...]:
        """Its dimensions."""
        return self.values.shape


def texts(rows: Sequence[Any], shape: Sequence[int]) -> np.ndarray:
    """The values of a BYTES tensor from texts or bytes."""
    values = np.empty(len(rows), DATATYPES["BYTES"])
    values[:] = [row.encode("utf-8", "replace") if isinstance(row, str) else row for row in rows]
    return values.reshape(tuple(shape))


def from_json(name: str, datatype: Any, shape: Any, data: Any) -> Tensor:
    """A tensor whose elements stand in JSON, flat or nested, row by row.

    Raises:
        RequestError: Datatype, shape and data do not fit together.
    """
    if not isinstance(data, list):
        raise RequestError(f"the data of '{name}' must be an array, got {shown(data)}", name)
    return from_elements(name, datatype, shape, _flat(data))


def from_elements(name: str, datatype: Any, shape: Any, elements: Iterable[Any]) -> Tensor:
    """A tensor from its elements, row by row; those of BYTES are texts or bytes.

    Raises:
        RequestError: Datatype, shape and elements do not fit together.
    """
    kind = _kind(name, datatype)
    dims = _dims(name, shape)
    expected = math.prod(dims)
    flat = list(itertools.islice(elements, expected + 1))
    if len(flat) != expected:
        got = f"more than {expected}" if len(flat) > expected else str(len(flat))
        raise RequestError(f"the shape {list(dims)} of '{name}' wants {expected} elements, data has {got}", name)
    if datatype == "BYTES":
        return Tensor(name, datatype, texts([_encoded(name, i, v) for i, v in enumerate(flat)], dims))
    for i, value in enumerate(flat):
        _check_number(name, datatype, kind, i, value)
    return Tensor(name, datatype, np.array(flat, kind).reshape(dims))


def from_bytes(name: str, datatype: Any, shape: Any, data: bytes | memoryview) -> Tensor:
    """A tensor whose elements stand in memory: little-endian; each of BYTES after its length in 4 bytes.

    Raises:
        RequestError: Datatype, shape and data do not fit together.
    """
    kind = _kind(name, datatype)
    dims = _dims(name, shape)
    expected = math.prod(dims)
    if datatype == "BYTES":
        return Tensor(name, datatype, texts(_elements(name, expected, memoryview(data)), dims))
    if len(data) != expected * kind.itemsize:
        raise RequestError(
            f"the shape {list(dims)} of '{name}' wants {expected * kind.itemsize} bytes of {datatype}, got {len(data)}",
            name,
        )
    if datatype == "BOOL" and expected and max(data) > 1:
        raise RequestError(f"'{name}' is BOOL and holds a byte other than 0 and 1", name)
    return Tensor(name, datatype, np.frombuffer(data, kind).reshape(dims))


def to_list(tensor: Tensor) -> list[Any]:
    """The elements for JSON, flat.

    Raises:
        RequestError: They are bytes that no JSON string can hold.
    """
    flat = tensor.values.reshape(-1).tolist()
    if tensor.datatype != "BYTES":
        return flat
    try:
        return [element.decode() for element in flat]
    except UnicodeDecodeError as e:
        raise RequestError(f"'{tensor.name}' is not UTF-8: ask for it with binary_data true", tensor.name) from e


def to_bytes(tensor: Tensor) -> bytes:
    """The elements as `from_bytes` takes them."""
    if tensor.datatype != "BYTES":
        return tensor.values.astype(DATATYPES[tensor.datatype]).tobytes()
    return b"".join(_LENGTH.pack(len(element)) + element for element in tensor.values.reshape(-1).tolist())


def numbers(tensor: Tensor) -> np.ndarray:
    """The values as NumPy computes with them."""
    if tensor.datatype != "BF16":
        return tensor.values
    return (tensor.values.astype(np.uint32) << 16).view(np.float32)


def check_elements(rows: int, longest: int) -> None:
    """Rows that are filled up to the longest one must not make too large a tensor.

    Raises:
        RequestError: They do.
    """
    if rows * longest > MAX_ELEMENTS:
        raise RequestError(
            f"{rows} rows of up to {longest} tokens are {rows * longest} elements, more than {MAX_ELEMENTS}: "
            "send fewer rows, or shorter ones"
        )


def text(name: str, element: bytes) -> str:
    """An element of a BYTES tensor as text.

    Raises:
        RequestError: It is not UTF-8.
    """
    try:
        return element.decode()
    except UnicodeDecodeError as e:
        raise RequestError(f"'{name}' is not UTF-8 (byte {e.start})", name) from e


def _kind(name: str, datatype: Any) -> np.dtype:
    if not isinstance(datatype, str) or datatype not in DATATYPES:
        hint = nearest_name(shown(datatype), DATATYPES)
        raise RequestError(
            f"the datatype of '{name}' must be one of the protocol's, got {shown(datatype)}: {hint}", name
        )
    return DATATYPES[datatype]


def _dims(name: str, shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, Sequence) or isinstance(shape, str) or any(type(d) is not int for d in shape):
        raise RequestError(f"the shape of '{name}' must be an array of integers, got {shown(shape)}", name)
    if len(shape) > MAX_RANK:
        raise RequestError(f"the shape of '{name}' has {len(shape)} dimensions, more than {MAX_RANK}", name)
    if any(d < 0 for d in shape):
        raise RequestError(f"the shape {list(shape)} of '{name}' has a negative dimension", name)
    if math.prod(d or 1 for d in shape) > MAX_ELEMENTS:  # beside a 0 the others must still be believable
        raise RequestError(f"the shape {shown(list(shape))} of '{name}' has more than {MAX_ELEMENTS} elements", name)
    return tuple(shape)


def _flat(data: list[Any]) -> Iterator[Any]:
    for value in data:
        if isinstance(value, list):
            yield from _flat(value)  # as deep as the JSON parser went
        else:
            yield value


def _encoded(name: str, index: int, value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise RequestError(f"{name}[{index}] must be a string, got {shown(value)}", name)
    try:
        return value.encode()
    except UnicodeEncodeError as e:
        raise RequestError(f"{name}[{index}] holds half a surrogate pair, which is no character", name) from e


def _check_number(name: str, datatype: str, kind: np.dtype, index: int, value: Any) -> None:
    if kind.kind == "b":
        ok, wanted = type(value) is bool, "true or false"
    elif datatype == "BF16":
        raise RequestError(f"'{name}' is BF16, which JSON data cannot hold: send it in binary", name)
    elif kind.kind == "f":
        ok = type(value) in (int, float) and abs(value) <= float(np.finfo(kind).max)
        wanted = f"a number that fits {datatype}"
    else:
        limits = np.iinfo(kind)
        ok = type(value) is int and limits.min <= value <= limits.max
        wanted = f"an integer in [{limits.min}, {limits.max}]"
    if not ok:
        raise RequestError(f"{name}[{index}] must be {wanted}, got {shown(value)}", name)


def _elements(name: str, expected: int, data: memoryview) -> list[bytes]:
    found: list[bytes] = []
    at = 0
    while at < len(data):
        if len(found) == expected:
            raise RequestError(f"'{name}' has more bytes than its {expected} elements", name)
        if len(data) - at < _LENGTH.size:
            raise RequestError(f"'{name}' ends within the length of element {len(found)}", name)
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        if length > len(data) - at:
            raise RequestError(
                f"element {len(found)} of '{name}' claims {length} bytes, {len(data) - at} are left", name
            )
        found.append(bytes(data[at : at + length]))
        at += length
    if len(found) != expected:
        raise RequestError(f"the shape of '{name}' wants {expected} elements, data has {len(found)}", name)
    return found

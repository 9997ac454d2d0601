"""A request's body: read with a limit, unpacked with a limit, parsed as JSON with nothing that JSON does not allow."""

from __future__ import annotations

import asyncio
import contextlib
import json
import zlib
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

from starlette.requests import Request

from fewbit.engine.types import OverloadedError
from fewbit.errors import RequestError

P = ParamSpec("P")
T = TypeVar("T")

LIMIT_BYTES = 32 << 20
MAX_HELD_BYTES = 256 << 20  # of all large bodies that are being read and parsed
_LARGE_BYTES = 1 << 18  # from here on bodies are worked on beside the event loop
ENCODINGS = {"gzip": zlib.MAX_WBITS | 16, "deflate": zlib.MAX_WBITS}
"""How a body may be packed, and what zlib calls that."""


class _Share:
    """What one body takes of the memory that all of them have until they are parsed; small ones need none."""

    in_use = 0

    def __init__(self) -> None:
        self._mine = 0

    def take(self, size_bytes: int) -> None:
        """So much in all.

        Raises:
            OverloadedError: The others have left too little.
        """
        if size_bytes < _LARGE_BYTES:
            return
        more = size_bytes - self._mine
        if _Share.in_use + more > MAX_HELD_BYTES:
            raise OverloadedError(f"the bodies of requests take {MAX_HELD_BYTES} bytes already; retry later")
        _Share.in_use += more
        self._mine = size_bytes

    def free(self) -> None:
        """Give it back."""
        _Share.in_use -= self._mine
        self._mine = 0


class TooLargeError(RequestError):
    """The body exceeds the limit."""


class EncodingError(RequestError):
    """The body is packed in a way that is not known here."""


@contextlib.contextmanager
def held(size_bytes: int) -> Iterator[None]:
    """Work on a body of another kind, which shares the limit of all, within this block.

    Raises:
        OverloadedError: Other bodies take all the memory that there is for them.
    """
    share = _Share()
    share.take(size_bytes)
    try:
        yield
    finally:
        share.free()


async def read_object(request: Request, limit_bytes: int = LIMIT_BYTES) -> dict[str, Any]:
    """The JSON object that a request carries, whatever content type it claims (curl's default is a form's).

    Args:
        request: The request; its body has not been read.
        limit_bytes: Longest body.

    Raises:
        TooLargeError: The body is longer.
        EncodingError: It is packed in an unknown way.
        OverloadedError: Other bodies take all the memory that there is for them.
        RequestError: It is no JSON object.
    """
    return await read_body(request, parse_object, limit_bytes)


async def aside(size_bytes: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`work`, beside the event loop if so many bytes are much."""
    return work(*args, **kwargs) if size_bytes < _LARGE_BYTES else await asyncio.to_thread(work, *args, **kwargs)


async def read_body(request: Request, parse: Callable[[bytes], T], limit_bytes: int = LIMIT_BYTES) -> T:
    """What `parse` makes of the bytes that a request carries, unpacked as its Content-Encoding says.

    Args:
        request: The request; its body has not been read.
        parse: Called beside the event loop if the body is large.
        limit_bytes: Longest body, packed and unpacked.

    Raises:
        TooLargeError: The body is longer.
        EncodingError: It is packed in an unknown way.
        OverloadedError: Other bodies take all the memory that there is for them.
        RequestError: It cannot be unpacked.
    """
    encodings = [e.strip().lower() for e in ",".join(request.headers.getlist("content-encoding")).split(",")]
    named = [e for e in encodings if e not in ("", "identity")]
    if len(named) > 1 or (named and named[0] not in ENCODINGS):
        raise EncodingError(
            f"Content-Encoding '{shown(', '.join(named))}' is not supported: send the body as it is, or packed once "
            f"with {' or '.join(ENCODINGS)}"
        )
    share = _Share()
    try:
        body = await _read(request, limit_bytes, share)
        if named:
            body = await asyncio.to_thread(_unpacked, body, named[0], limit_bytes)
            share.take(len(body))
        return await aside(len(body), parse, body)
    finally:
        share.free()


def _unpacked(body: bytes, encoding: str, limit_bytes: int) -> bytes:
    """What was packed. The limit holds on the way: a small body may stand for a very long one."""
    packed = zlib.decompressobj(ENCODINGS[encoding])
    try:
        found = packed.decompress(body, limit_bytes + 1)
    except zlib.error as e:
        raise RequestError(f"the body is not {encoding}, as Content-Encoding says it is ({e})") from e
    if len(found) > limit_bytes:
        raise TooLargeError(f"the unpacked body is larger than the limit of {limit_bytes} bytes")
    if not packed.eof:
        raise RequestError(f"the body ends in the middle of its {encoding} data")
    if packed.unused_data:
        raise RequestError(f"{len(packed.unused_data)} bytes follow the end of the body's {encoding} data")
    return found


def packed(body: bytes, accepted: str) -> tuple[str, bytes]:
    """An answer's body as the client likes it best: by what it is packed ("": by nothing), and the bytes.

    Args:
        body: As it is.
        accepted: The request's Accept-Encoding.
    """
    for choice in accepted.split(","):
        name, _, weight = choice.partition(";")
        encoding = name.strip().lower()
        if encoding in ENCODINGS and weight.replace(" ", "") not in ("q=0", "q=0.0"):
            packer = zlib.compressobj(wbits=ENCODINGS[encoding])
            return encoding, packer.compress(body) + packer.flush()
    return "", body


def parse_optional(body: bytes) -> dict[str, Any]:
    """`parse_object`, where no body is an object of nothing."""
    return parse_object(body) if body.strip() else {}


def parse_object(body: bytes) -> dict[str, Any]:
    """Parse strictly: UTF-8 without a mark, no key twice, no NaN or infinity, no number beyond 64 bits."""
    if not body.strip():
        raise RequestError("the body is empty; expected a JSON object")
    if body.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise RequestError("the body starts with a byte order mark; send plain UTF-8")
    try:
        text = body.decode()
    except UnicodeDecodeError as e:
        raise RequestError(f"the body is not UTF-8 (byte {e.start})") from e
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=_int,
            parse_float=_float,
            parse_constant=_constant,
        )
    except json.JSONDecodeError as e:
        raise RequestError(f"the body is not JSON: {e.msg} at line {e.lineno}, column {e.colno}") from e
    except RecursionError as e:
        raise RequestError("the body nests too deeply") from e
    if not isinstance(value, dict):
        raise RequestError(f"the body must be a JSON object, got {_KINDS.get(type(value), 'a value')}")
    return value


_KINDS = {list: "an array", str: "a string", int: "a number", float: "a number", bool: "a boolean", type(None): "null"}


async def _read(request: Request, limit_bytes: int, share: _Share) -> bytes:
    too_large = TooLargeError(f"the body is larger than the limit of {limit_bytes} bytes")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > limit_bytes:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit_bytes:
            raise too_large
        share.take(len(body))
    return bytes(body)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise RequestError(f"the key '{shown(key)}' is given twice", key)
            seen.add(key)
    return found


def _int(digits: str) -> int:
    if len(digits) <= 20 and -(2**63) <= (value := int(digits)) < 2**64:
        return value
    raise RequestError(f"the number {shown(digits)} does not fit into 64 bits")


def _float(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise RequestError(f"the number {shown(digits)} is too large")
    return value


def _constant(name: str) -> float:
    raise RequestError(f"{name} is not JSON")


def shown(value: Any, limit_chars: int = 60) -> str:
    """A value as an error message may quote it: short."""
    text = str(value)
    return text if len(text) <= limit_chars else f"{text[:limit_chars]}..."

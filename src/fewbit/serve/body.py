"""A request's body: read with a limit, parsed as JSON with nothing let through that JSON does not allow."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.requests import Request

from fewbit.errors import RequestError

LIMIT_BYTES = 32 << 20
_DISCARD_S = 2.0  # how long the rest of a body that is too long is read and thrown away, so that the client reads us


class TooLargeError(RequestError):
    """The body exceeds the limit."""


async def read_object(request: Request, limit_bytes: int = LIMIT_BYTES) -> dict[str, Any]:
    """The JSON object that a request carries, whatever content type it claims (curl's default is a form's).

    Args:
        request: The request; its body has not been read.
        limit_bytes: Longest body.

    Raises:
        TooLargeError: The body is longer.
        RequestError: It is no JSON object.
    """
    return parse_object(await _read(request, limit_bytes))


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


async def _read(request: Request, limit_bytes: int) -> bytes:
    too_large = TooLargeError(f"the body is larger than the limit of {limit_bytes} bytes")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > limit_bytes:
        await _discard(request)
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit_bytes:
            body.clear()
            await _discard(request)
            raise too_large
    return bytes(body)


async def _discard(request: Request) -> None:
    """Many clients read nothing before they have sent everything."""
    try:
        async with asyncio.timeout(_DISCARD_S):
            while (message := await request.receive())["type"] == "http.request" and message.get("more_body"):
                pass
    except TimeoutError:
        pass


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

"""What goes over the engine's socket: frames of msgpack with a fixed schema, never pickle.

A frame is its length (4 bytes, big endian) and one tagged struct. The client sends `FromClient`, the engine answers
with `FromEngine`, first of all a `Hello`. Events of one step travel together.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterator, Sequence
from typing import Literal

import msgspec

from fewbit.engine.types import (
    EngineDownError,
    EngineInfo,
    Event,
    GenerateRequest,
    OverloadedError,
    QueueFullError,
    Stats,
)
from fewbit.errors import FewbitError, RequestError, UnsupportedError

VERSION = 2
MAX_FRAME = 64 << 20  # bytes; a prompt of a million tokens has some five
_POSITION = 512  # bytes that one position of a prompt takes at most: 21 numbers of nine, 20 ids of five, and more


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Queue a request: answered by `Accepted` or `Refused`."""

    request: GenerateRequest


class Abort(msgspec.Struct, frozen=True, tag=True):
    """End a request of this connection."""

    id: str


class Ping(msgspec.Struct, frozen=True, tag=True):
    """Answered by a `Pong` with the same serial number."""

    serial: int


class Hello(msgspec.Struct, frozen=True, tag=True):
    """The first message of the engine."""

    version: int
    info: EngineInfo


class Accepted(msgspec.Struct, frozen=True, tag=True):
    """The request is queued; its events follow."""

    id: str


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The request is not queued and will have no events."""

    id: str
    kind: Literal["request", "full", "overloaded", "down"]
    message: str
    param: str | None = None


class Events(msgspec.Struct, frozen=True, tag=True):
    """What happened to requests of this connection."""

    events: list[Event]


class Pong(msgspec.Struct, frozen=True, tag=True):
    """The engine process is there."""

    serial: int
    stats: Stats
    broken: str | None = None  # the engine itself broke down; nothing will be answered


FromClient = Submit | Abort | Ping
FromEngine = Hello | Accepted | Refused | Events | Pong

_encoder = msgspec.msgpack.Encoder()


def frame(message: FromClient | FromEngine) -> bytes:
    """A message as it goes over the socket."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME:
        raise RequestError(f"a message of {len(body)} bytes exceeds the engine's limit of {MAX_FRAME}; send less")
    return struct.pack(">I", len(body)) + body


def event_frames(events: Sequence[Event]) -> Iterator[bytes]:
    """The events of a step in as few frames as hold them: what prompts report may be much. One alone fits always."""
    if len(events) == 1 or sum(len(e.prompt_logprobs) for e in events) * _POSITION < MAX_FRAME // 2:
        yield frame(Events(list(events)))
    else:
        half = len(events) // 2
        yield from event_frames(events[:half])
        yield from event_frames(events[half:])


async def read_frame(reader: asyncio.StreamReader) -> bytes:
    """The body of the next frame.

    Raises:
        UnsupportedError: it is longer than any frame may be.
        asyncio.IncompleteReadError: the other side is gone.
    """
    (size,) = struct.unpack(">I", await reader.readexactly(4))
    if size > MAX_FRAME:
        raise UnsupportedError(f"a frame of {size} bytes exceeds the limit of {MAX_FRAME}")
    return await reader.readexactly(size)


def refusal(request_id: str, error: FewbitError) -> Refused:
    """An error as a message."""
    if isinstance(error, QueueFullError):
        return Refused(request_id, "full", str(error), error.param)
    if isinstance(error, OverloadedError):
        return Refused(request_id, "overloaded", str(error), error.param)
    if isinstance(error, RequestError):
        return Refused(request_id, "request", str(error), error.param)
    return Refused(request_id, "down", str(error))


def refused_error(message: Refused) -> FewbitError:
    """The inverse of `refusal`."""
    if message.kind == "down":
        return EngineDownError(message.message)
    kinds = {"full": QueueFullError, "overloaded": OverloadedError, "request": RequestError}
    return kinds[message.kind](message.message, message.param)

"""Calls of gRPC as they arrive: who may make them, how long their first message is waited for, how large all may be."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, Protocol

from fewbit.errors import RequestError
from fewbit.serve.body import aside, held
from fewbit.serve.kserve import protobuf
from fewbit.serve.kserve.messages import InferRequest

if TYPE_CHECKING:
    import grpc.aio

MAX_OPEN_CALLS = 64
"""Calls without a key whose message has not come; one more ends the oldest of them."""
MAX_SLOW_CALLS = 8
"""Of these, those whose message is on its way for longer than `QUICK_S`: it may be as large as any."""
QUICK_S = 0.5
ARRIVE_S = 10.0
"""How long they may take to send it."""
OPEN = ("ServerLive", "ServerReady", "Check")  # without a key, as over HTTP


class Keys(Protocol):
    """Says who may ask."""

    def allows(self, header: str | None) -> bool:
        """Whether this `authorization` header holds a key."""
        ...


def door(keys: Keys) -> grpc.aio.ServerInterceptor:
    """Refuses calls without a key before anything of them is read."""
    import grpc.aio

    async def refuse(requests: AsyncIterator[Any], context: Any) -> None:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "Unauthorized")

    class Door(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # gRPC says no types
        async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
            metadata = dict(details.invocation_metadata or ())
            if details.method.rpartition("/")[2] in OPEN or keys.allows(metadata.get("authorization")):
                return await continuation(details)
            return grpc.stream_stream_rpc_method_handler(refuse)

    return Door()


class Waiting:
    """Calls whose first message is waited for."""

    def __init__(self) -> None:
        self._calls: dict[asyncio.Task[bytes | None], None] = {}  # the oldest is the first
        self._slow: dict[asyncio.Task[bytes | None], None] = {}  # here too

    async def first(self, requests: AsyncIterator[bytes]) -> bytes | None:
        """The message; None: it did not come in time, or too many others wait too."""

        async def read() -> bytes | None:
            return await anext(aiter(requests), b"")  # no message at all is one without fields, as over HTTP

        task = asyncio.create_task(read())
        try:
            _add(self._calls, task, MAX_OPEN_CALLS)
            await asyncio.wait([task], timeout=QUICK_S)
            if not task.done():
                _add(self._slow, task, MAX_SLOW_CALLS)
                await asyncio.wait([task], timeout=ARRIVE_S - QUICK_S)
        finally:
            self._calls.pop(task, None)
            self._slow.pop(task, None)
            if not task.done():
                task.cancel()
        return None if task.cancelled() or not task.done() else task.result()


def _add(calls: dict[asyncio.Task[bytes | None], None], task: asyncio.Task[bytes | None], most: int) -> None:
    """One more; the oldest is ended where there are too many."""
    calls[task] = None
    if len(calls) > most:
        oldest = next(iter(calls))
        del calls[oldest]
        oldest.cancel()


async def message(kind: Any, raw: bytes) -> Any:
    """A message from its bytes.

    Raises:
        RequestError: They are none.
        OverloadedError: Other messages and bodies take all the memory that there is for them.
    """
    from google.protobuf.message import DecodeError

    try:
        with held(len(raw)):
            return await aside(len(raw), kind.FromString, raw)
    except DecodeError as e:
        raise RequestError(f"the message is no {kind.DESCRIPTOR.name}: {e}") from e


async def asked_of(request: Any) -> InferRequest:
    """What a ModelInferRequest asks for; see `protobuf.parsed`."""
    size = request.ByteSize()
    with held(size):
        return await aside(size, protobuf.parsed, request)

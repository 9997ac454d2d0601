"""A connection before it carries a request: limits of size, time and number, and each refusal as a proper answer.

This is uvicorn's HTTP/1.1 with what a server among strangers needs besides. Time is counted in sweeps, not read from
a clock: when this process itself was stopped for a while, that says nothing about its clients.
"""

from __future__ import annotations

import asyncio
import http
import itertools
import logging
import resource
import sys
from collections.abc import Iterable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from fewbit.serve.connection import SLOW_S
from fewbit.serve.problems import Problem, error_response

log = logging.getLogger(__name__)

_turns = itertools.count()
"""In which order connections began to be idle: time is only counted in sweeps."""

HEAD_BYTES = 64 << 10
HEAD_FIELDS = 128
METHOD_BYTES = 16
ARRIVE_S = 10.0  # to send a request in, and as much more as its size takes at
SLOWEST_BYTES_PER_S = 4096
MAX_CONNECTIONS = 8192
SWEEP_S = 1.0
_LINGER_S = 2.0  # how long a refused client may go on sending before it reads the refusal
_PAST_ANSWER_BYTES = 64 << 20  # what is read and thrown away of a body whose answer is given already


class HTTPConnection(H11Protocol):
    """One connection; uvicorn's `limit_concurrency` says how many there may be."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = _HTTP(h11.SERVER, HEAD_BYTES)
        self._refused = False
        self._received = 0  # bytes of the request that is arriving
        self._waited_s = 0.0  # for the rest of it
        self.turn = next(_turns)
        self._unsent = 0  # bytes that the client has not taken
        self._unsent_s = 0.0  # since it took some of them

    @property
    def idle(self) -> bool:
        """Whether it holds no request, or only the beginning of one's head."""
        return self.conn.their_state is h11.IDLE

    # ---- what asyncio and uvicorn call ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take it; where there are too many, those that have been idle for longest make room."""
        assert isinstance(transport, asyncio.Transport)
        super().connection_made(transport)
        limit = self.limit_concurrency
        if limit is not None and len(self.connections) >= limit and not _make_room(self.connections, self):
            self._refuse(503, "ServiceUnavailableError", f"{limit} connections are open; retry later")

    def data_received(self, data: bytes) -> None:
        """More of a request."""
        if self._refused:
            return
        self._received += len(data)
        before = self.conn.their_state
        super().data_received(data)
        if self.conn.their_state is h11.IDLE and before is h11.SEND_BODY:  # it was answered before it was read
            self._begin_waiting()
        elif self._received > _PAST_ANSWER_BYTES and self.conn.our_state is h11.DONE:
            self.transport.abort()

    def on_response_complete(self) -> None:
        """The next request may come."""
        self._begin_waiting()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """What came is not HTTP; uvicorn calls this where it caught the error that says what is wrong."""
        error = sys.exc_info()[1]
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        self._refuse(status, "BadRequestError", f"this is not HTTP as it should be: {error or msg}")

    def _unsupported_upgrade_warning(self) -> None:
        """An upgrade may be ignored, and is."""

    # ---- time ----

    def sweep(self) -> None:
        """Another `SWEEP_S` has passed: drop a client that sends or takes too slowly."""
        before, self._unsent = self._unsent, self.transport.get_write_buffer_size()
        self._unsent_s = self._unsent_s + SWEEP_S if self._unsent and self._unsent == before else 0.0
        if self._unsent_s > SLOW_S:
            self.transport.abort()
        if self._refused or self.flow.read_paused or self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            return
        self._waited_s += SWEEP_S
        if self._waited_s <= ARRIVE_S + self._received / SLOWEST_BYTES_PER_S:
            return
        if self._received == 0 or self.conn.our_state is h11.DONE:
            self.transport.close()
        else:
            text = f"the request did not arrive in time: {self._received} bytes in {self._waited_s:g} s"
            self._refuse(408, "RequestTimeoutError", text)

    def _begin_waiting(self) -> None:
        self._received, self._waited_s = 0, 0.0
        self.turn = next(_turns)

    # ---- refusing ----

    def _refuse(self, status: int, kind: str, message: str) -> None:
        """Answer, and throw away what still comes until the client has had time to read the answer."""
        self._refused = True
        self._unset_keepalive_if_required()
        path = ""
        if self.cycle is not None and not self.cycle.response_complete:
            path = self.cycle.scope["path"]
            self.cycle.disconnected = True  # whoever works on the request is told that nobody waits for it
            self.cycle.message_event.set()
            if self.cycle.response_started:
                self.transport.abort()
                return
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # it has its answer, and went on wrongly
            self.transport.abort()
            return
        answer = error_response(Problem(status, kind, message), path)
        headers = [*answer.raw_headers, (b"connection", b"close")]
        head = h11.Response(status_code=status, headers=headers, reason=http.HTTPStatus(status).phrase.encode())
        for event in (head, h11.Data(data=bytes(answer.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.write_eof()
        self.flow.resume_reading()
        self.loop.call_later(_LINGER_S, self.transport.abort)


class _HTTP(h11.Connection):
    """HTTP/1.1 without what two readers may understand differently, and with limits that do not depend on packets."""

    def next_event(self) -> Any:
        """See h11."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            if event.http_version not in (b"1.0", b"1.1"):
                raise h11.RemoteProtocolError("the version is neither 1.0 nor 1.1", error_status_hint=505)
            names = [name for name, _ in event.headers]
            if b"transfer-encoding" in names and b"content-length" in names:
                raise h11.RemoteProtocolError("both Transfer-Encoding and Content-Length are given")
            if len(event.method) > METHOD_BYTES:
                raise h11.RemoteProtocolError(f"the method has {len(event.method)} bytes, {METHOD_BYTES} are the most")
            size = len(event.method) + len(event.target) + sum(len(name) + len(value) for name, value in event.headers)
            if size > HEAD_BYTES or len(names) > HEAD_FIELDS:
                text = f"the head has {len(names)} fields and {size} bytes, {HEAD_FIELDS} and {HEAD_BYTES} are the most"
                raise h11.RemoteProtocolError(text, error_status_hint=431)
        return event


def sweep(connections: Iterable[Any]) -> None:
    """Call it every `SWEEP_S` seconds with all connections."""
    for connection in list(connections):
        connection.sweep()


def _make_room(connections: set[Any], new: HTTPConnection) -> bool:
    """Drop some idle connections at once, so that finding them costs little for each."""
    idle = sorted((c for c in connections if c.idle and c is not new), key=lambda c: c.turn)
    for connection in idle[: max(1, len(connections) // 20)]:
        connection.transport.abort()
        connections.discard(connection)
    return bool(idle)


def raise_file_limit() -> int:
    """Allow this process as many open files as it may have without asking anybody; returns how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 1 << 16 if hard == resource.RLIM_INFINITY else min(hard, 1 << 16)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return wanted
        except (ValueError, OSError) as e:
            log.warning("the limit of open files stays at %d: %s", soft, e)
    return soft if soft != resource.RLIM_INFINITY else 1 << 16

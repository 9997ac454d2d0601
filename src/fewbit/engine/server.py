"""The engine's side of the socket: connections in, events out. Runs on an asyncio loop beside the engine's thread."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

import msgspec

from fewbit.engine import wire
from fewbit.engine.loop import EngineLoop
from fewbit.engine.types import Event
from fewbit.errors import FewbitError, RequestError

if TYPE_CHECKING:
    from fewbit.engine.engine import Engine

log = logging.getLogger(__name__)

MAX_UNREAD = 64 << 20
"""Bytes that may wait for a client that does not read; after that it is dropped."""


class EngineServer:
    """Serves an engine to any number of connections; each owns the requests it submitted."""

    def __init__(self, engine: Engine) -> None:
        self._asyncio = asyncio.get_running_loop()
        self._owners: dict[str, asyncio.StreamWriter] = {}
        self._connections: set[asyncio.StreamWriter] = set()
        self._decoder = msgspec.msgpack.Decoder(wire.FromClient)
        self.ended = asyncio.Event()  # the engine will do nothing more: drained, stopped or broken
        self.loop = EngineLoop(engine, self._emit, self._loop_ended)

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client, until it leaves; what it left unfinished is aborted."""
        self._connections.add(writer)
        try:
            writer.write(wire.frame(wire.Hello(wire.VERSION, self.loop.info)))
            while True:
                self._take(self._decoder.decode(await wire.read_frame(reader)), writer)
        except (OSError, asyncio.IncompleteReadError):
            pass  # it left
        except (msgspec.DecodeError, FewbitError) as error:
            log.warning("dropping a client that sent something that cannot be understood: %s", error)
        finally:
            self._connections.discard(writer)
            for request_id in [i for i, owner in self._owners.items() if owner is writer]:
                del self._owners[request_id]
                self.loop.abort(request_id)
            writer.close()

    def _take(self, message: wire.FromClient, writer: asyncio.StreamWriter) -> None:
        match message:
            case wire.Submit(request):
                if request.id in self._owners:
                    error = RequestError(f"a request with the id '{request.id}' is still running", "id")
                    writer.write(wire.frame(wire.refusal(request.id, error)))
                    return
                self._owners[request.id] = writer
                self.loop.submit(request, lambda error: self._reply(request.id, writer, error))
            case wire.Abort(request_id):
                if self._owners.get(request_id) is writer:
                    self.loop.abort(request_id)
            case wire.Ping(serial):
                writer.write(wire.frame(wire.Pong(serial, self.loop.stats(), self.loop.broken)))

    def _reply(self, request_id: str, writer: asyncio.StreamWriter, error: FewbitError | None) -> None:
        """From any thread: tell a client whether its request was taken, before any of its events."""

        def tell() -> None:
            if error is not None and self._owners.get(request_id) is writer:
                del self._owners[request_id]
            if not writer.is_closing():
                message = wire.Accepted(request_id) if error is None else wire.refusal(request_id, error)
                writer.write(wire.frame(message))

        with contextlib.suppress(RuntimeError):  # the process is ending, and a grammar was still being compiled
            self._asyncio.call_soon_threadsafe(tell)

    def _loop_ended(self) -> None:
        self._asyncio.call_soon_threadsafe(self.ended.set)

    def _emit(self, events: list[Event]) -> None:
        """On the engine's thread."""
        self._asyncio.call_soon_threadsafe(self._deliver, events)

    def _deliver(self, events: list[Event]) -> None:
        by_owner: dict[asyncio.StreamWriter, list[Event]] = {}
        for event in events:
            owner = self._owners.get(event.id)
            if owner is None:  # its client left
                continue
            by_owner.setdefault(owner, []).append(event)
            if event.ending is not None:
                del self._owners[event.id]
        for writer, its in by_owner.items():
            if writer.is_closing():
                continue
            for frame in wire.event_frames(its):
                writer.write(frame)
            if writer.transport.get_write_buffer_size() > MAX_UNREAD:
                log.warning("dropping a client that does not read its events")
                writer.transport.abort()

    async def flush(self, limit_s: float) -> None:
        """Wait until all clients have been sent what is theirs, then close the connections."""
        for writer in list(self._connections):
            writer.close()
        closing = [asyncio.ensure_future(w.wait_closed()) for w in list(self._connections)]
        if closing:
            await asyncio.wait(closing, timeout=limit_s)

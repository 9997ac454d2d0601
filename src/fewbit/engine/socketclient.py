"""The client of an engine in another process: a unix socket, frames of msgpack (`wire`), a heartbeat. No torch."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from weakref import WeakValueDictionary

import msgspec

from fewbit.engine import wire
from fewbit.engine.client import Stream, check_new
from fewbit.engine.types import Ending, EngineDownError, EngineInfo, Event, GenerateRequest, Stats
from fewbit.errors import FewbitError

TICK_S = 0.5
SILENT_TICKS = 6
"""After so many ticks without a word from the engine it counts as hung. Ticks, not seconds: when this process itself
was stopped for a while, that says nothing about the engine."""


class SocketClient:
    """An `EngineClient` over a unix socket. Made by `connect`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, info: EngineInfo) -> None:
        self._reader, self._writer, self._info = reader, writer, info
        self._decoder = msgspec.msgpack.Decoder(wire.FromEngine)
        self._streams: WeakValueDictionary[str, Stream] = WeakValueDictionary()
        self._answers: dict[str, asyncio.Future[FewbitError | None]] = {}
        self._pongs: dict[int, asyncio.Future[Stats]] = {}
        self._serial = itertools.count()
        self._lost: str | None = None  # why the engine is gone for good
        self._broken: str | None = None  # its process is there, the engine is not
        self._silent = 0  # ticks since the last word
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._heartbeat())]

    @classmethod
    async def connect(cls, path: str | Path) -> SocketClient:
        """Connect to the engine that listens at `path`.

        Raises:
            EngineDownError: nobody does, or it is not an engine of this version.
        """
        try:
            reader, writer = await asyncio.open_unix_connection(path)
            hello = msgspec.msgpack.decode(await wire.read_frame(reader), type=wire.FromEngine)
        except (OSError, asyncio.IncompleteReadError) as error:
            raise EngineDownError(f"no engine answers at {path}: {error}") from None
        except msgspec.DecodeError as error:
            raise EngineDownError(f"what answers at {path} is no engine of this version: {error}") from None
        if not isinstance(hello, wire.Hello) or hello.version != wire.VERSION:
            raise EngineDownError(f"the engine at {path} speaks another version than {wire.VERSION}; restart it")
        return cls(reader, writer, hello.info)

    @property
    def info(self) -> EngineInfo:
        """See `EngineClient`."""
        return self._info

    async def submit(self, request: GenerateRequest) -> Stream:
        """See `EngineClient`."""
        self.health()
        check_new(request.id, self._streams)
        message = wire.frame(wire.Submit(request))
        stream = Stream(request.id, self.abort)
        self._streams[request.id] = stream
        answer = self._answers[request.id] = stream.loop.create_future()
        try:
            self._writer.write(message)
            refusal = await answer
        finally:
            self._answers.pop(request.id, None)
        if refusal is not None:
            stream.refused()
            raise refusal
        return stream

    def abort(self, request_id: str) -> None:
        """See `EngineClient`."""
        if self._lost is None:
            self._writer.write(wire.frame(wire.Abort(request_id)))

    async def stats(self) -> Stats:
        """See `EngineClient`."""
        self.health()
        return await self._ping()

    def health(self) -> None:
        """See `EngineClient`."""
        if self._lost is not None or self._broken is not None:
            raise EngineDownError(self._lost or self._broken or "")
        if self._silent >= SILENT_TICKS:
            raise EngineDownError(self._hung())

    async def close(self) -> None:
        """See `EngineClient`."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._end("the connection to the engine was closed")

    def _ping(self) -> asyncio.Future[Stats]:
        serial = next(self._serial)
        pong = self._pongs[serial] = asyncio.get_running_loop().create_future()
        self._writer.write(wire.frame(wire.Ping(serial)))
        return pong

    def _hung(self) -> str:
        return f"the engine has given no sign of life for {self._silent * TICK_S:g} s"

    async def _heartbeat(self) -> None:
        ping: asyncio.Future[Stats] | None = None
        while True:
            if ping is None or ping.done():
                ping = self._ping()
            await asyncio.sleep(TICK_S)
            self._silent += 1
            if self._silent == SILENT_TICKS:
                self._fail(self._hung())

    async def _read(self) -> None:
        try:
            while True:
                message = self._decoder.decode(await wire.read_frame(self._reader))
                self._silent = 0
                self._take(message)
        except (OSError, asyncio.IncompleteReadError):
            self._end("the engine process is gone")
        except (msgspec.DecodeError, FewbitError) as error:
            self._end(f"the engine sent something that cannot be understood: {error}")

    def _take(self, message: wire.FromEngine) -> None:
        match message:
            case wire.Events(events):
                for event in events:
                    stream = self._streams.get(event.id)
                    if stream is not None:
                        stream.push(event)
                        if event.ending is not None:
                            del self._streams[event.id]
            case wire.Accepted(request_id):
                self._answer(request_id, None)
            case wire.Refused(request_id):
                self._answer(request_id, wire.refused_error(message))
            case wire.Pong(serial, stats, broken):
                self._broken = broken
                pong = self._pongs.pop(serial, None)
                if pong is not None and not pong.done():
                    pong.set_result(stats)

    def _answer(self, request_id: str, refusal: FewbitError | None) -> None:
        answer = self._answers.get(request_id)
        if answer is not None and not answer.done():
            answer.set_result(refusal)

    def _end(self, reason: str) -> None:
        """The engine is gone for good: everyone who waits is told."""
        if self._lost is None:
            self._lost = reason
            self._writer.close()
        self._fail(reason)

    def _fail(self, reason: str) -> None:
        """Give every request an ending. If the engine is only hung, its own copies are aborted when it comes back."""
        error = EngineDownError(reason)
        for request_id, answer in list(self._answers.items()):
            self.abort(request_id)
            if not answer.done():
                answer.set_result(error)
        for request_id, stream in list(self._streams.items()):
            if request_id not in self._answers:
                self.abort(request_id)
                stream.push(Event(request_id, ending=Ending("error", reason)))
        self._streams.clear()
        for pong in self._pongs.values():
            if not pong.done():
                pong.set_exception(error)
                pong.exception()  # nobody may be waiting for a heartbeat's answer: that is no mistake
        self._pongs.clear()

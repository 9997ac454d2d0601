"""An engine in a thread of its own: commands in through a bounded inbox, events out through a callback."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from fewbit.engine.types import Ending, EngineDownError, Event, GenerateRequest, OverloadedError, Stats
from fewbit.errors import FewbitError

if TYPE_CHECKING:  # a process that only talks to an engine needs no torch
    from fewbit.engine.engine import Engine

log = logging.getLogger(__name__)

Reply = Callable[[FewbitError | None], None]


class EngineLoop:
    """Steps an engine as long as there is work.

    `emit` and the replies are called on the loop's thread and must not block. After `stop`, or if the engine breaks
    beyond one step, every request still gets its ending, and `broken` says what happened.
    """

    def __init__(
        self, engine: Engine, emit: Callable[[list[Event]], None], ended: Callable[[], None] | None = None
    ) -> None:
        """Start the thread; `ended` is called when it has nothing more to do, after the last `emit`."""
        self.info = engine.info
        self.broken: str | None = None
        self._engine, self._emit, self._ended = engine, emit, ended
        self._inbox: deque[tuple[GenerateRequest, Reply] | str] = deque()  # a request to submit, or an id to abort
        self._wake = threading.Condition()
        self._submits = 0  # of the inbox
        self._limit = engine.config.max_queued
        self._draining = self._stopping = False
        self._stats = engine.stats()
        self._step_began: float | None = None
        self._thread = threading.Thread(target=self._main, name="fewbit-engine", daemon=True)
        self._thread.start()

    # ---- from any thread ----

    def submit(self, request: GenerateRequest, reply: Reply) -> None:
        """Queue a request; `reply` is told None once it is accepted, else why not."""
        with self._wake:
            refusal = self._refusal()
            if refusal is None:
                self._inbox.append((request, reply))
                self._submits += 1
                self._wake.notify()
        if refusal is not None:
            reply(refusal)

    def _refusal(self) -> FewbitError | None:
        if self.broken is not None:
            return EngineDownError(self.broken)
        if self._draining or self._stopping:
            return OverloadedError("the engine is shutting down and takes no new requests")
        if self._submits >= self._limit:
            return OverloadedError(f"{self._submits} requests are waiting to be queued; retry later")
        return None

    def abort(self, request_id: str) -> None:
        """End a request; its ending is emitted unless it has one already."""
        with self._wake:
            self._inbox.append(request_id)
            self._wake.notify()

    def stats(self) -> Stats:
        """As of the last step."""
        began = self._step_began
        return msgspec.structs.replace(self._stats, busy_s=0.0 if began is None else time.monotonic() - began)

    def drain(self, limit_s: float) -> bool:
        """Take nothing new and wait until everything has ended, at most `limit_s` seconds. True: it has."""
        with self._wake:
            self._draining = True
            self._wake.notify()
        self._thread.join(limit_s)
        return not self._thread.is_alive()

    def stop(self, wait_s: float = 10.0) -> None:
        """Abort everything and end the thread."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join(wait_s)

    # ---- the loop's thread ----

    def _main(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as fault:  # house: whatever it is, everyone who waits has to be told
            self._step_began = None
            log.exception("the engine broke down")
            self.broken = f"the engine broke down: {type(fault).__name__}: {str(fault).partition(chr(10))[0]}"
        with self._wake:
            self._stopping = True
            left = list(self._inbox)
            self._inbox.clear()
        for command in left:
            if not isinstance(command, str):
                command[1](self._refusal())
        self._end_all()
        if self._ended is not None:
            self._ended()

    def _turn(self) -> bool:
        """Read the inbox, run a step. False: there is nothing more to do, ever."""
        engine = self._engine
        with self._wake:
            while not (self._inbox or engine.has_work or self._draining or self._stopping):
                self._wake.wait()
            commands = list(self._inbox)
            self._inbox.clear()
            self._submits = 0
            stopping, draining = self._stopping, self._draining
        events: list[Event] = []
        for command in commands:
            if isinstance(command, str):
                events += engine.abort(command)
            else:
                self._submit(*command)
        self._send(events)
        if stopping or (draining and not engine.has_work):
            return False
        self._step_began = time.monotonic()
        events = engine.step()
        self._step_began = None
        self._send(events)
        return True

    def _submit(self, request: GenerateRequest, reply: Reply) -> None:
        try:
            self._engine.submit(request)
        except FewbitError as refusal:
            reply(refusal)
        else:
            reply(None)

    def _send(self, events: list[Event]) -> None:
        self._stats = self._engine.stats()
        if events:
            self._emit(events)

    def _end_all(self) -> None:
        """Whoever is still there gets an ending, also if the engine cannot be trusted any more."""
        scheduler = self._engine.scheduler
        if self.broken is None:
            self._send([event for i in scheduler.requests for event in scheduler.abort(i)])
        else:
            self._emit(self._engine.unsent)
            self._emit([Event(i, ending=Ending("error", self.broken)) for i in scheduler.requests])

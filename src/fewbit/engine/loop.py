"""An engine in a thread of its own: commands in through a bounded inbox, events out through a callback."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import msgspec

from fewbit.engine.types import Ending, EngineDownError, Event, GenerateRequest, OverloadedError, QueueFullError, Stats
from fewbit.errors import FewbitError, RequestError

if TYPE_CHECKING:  # a process that only talks to an engine needs no torch
    from fewbit.engine.engine import Engine
    from fewbit.engine.request import Matcher

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
        # a request to submit, or an id to abort
        self._inbox: deque[tuple[GenerateRequest, Matcher | None, Reply] | str] = deque()
        self._compiler = ThreadPoolExecutor(1, "fewbit-grammars")  # so that no step waits for a grammar
        self._compiling: dict[str, bool] = {}  # ids of requests that wait for it: whether they were aborted since
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
            if refusal is None and request.params.grammar is not None and request.id not in self._compiling:
                self._compiling[request.id] = False
                self._compiler.submit(self._compile, request, request.params.grammar, reply)
            elif refusal is None:
                self._put(request, None, reply)
        if refusal is not None:
            reply(refusal)

    def _put(self, request: GenerateRequest, matcher: Matcher | None, reply: Reply) -> None:
        self._inbox.append((request, matcher, reply))
        self._submits += 1
        self._wake.notify()

    def _compile(self, request: GenerateRequest, grammar: str, reply: Reply) -> None:
        """On the compiler's thread."""
        matcher, refusal = None, None
        try:
            matcher = self._engine.grammars.matcher(grammar)
        except FewbitError as error:
            refusal = error
        except Exception as fault:  # house: whatever it is, the client waits for an answer
            log.exception("a grammar could not be compiled")
            refusal = RequestError(f"the grammar could not be compiled: {type(fault).__name__}", "grammar")
        with self._wake:
            aborted = self._compiling.pop(request.id)
            refusal = refusal or self._refusal()
            if refusal is None:
                self._put(request, matcher, reply)
                if aborted:
                    self._inbox.append(request.id)
        if refusal is not None:
            reply(refusal)

    def _refusal(self) -> FewbitError | None:
        if self.broken is not None:
            return EngineDownError(self.broken)
        if self._draining or self._stopping:
            return OverloadedError("the engine is shutting down and takes no new requests")
        if (count := self._submits + len(self._compiling)) >= self._limit:
            return QueueFullError(f"{count} requests are waiting to be queued; retry later")
        return None

    def abort(self, request_id: str) -> None:
        """End a request; its ending is emitted unless it has one already."""
        with self._wake:
            if request_id in self._compiling:
                self._compiling[request_id] = True
            else:
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
                command[2](self._refusal())
        self._compiler.shutdown(wait=False)  # who still waits for it is refused
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

    def _submit(self, request: GenerateRequest, matcher: Matcher | None, reply: Reply) -> None:
        try:
            self._engine.submit(request, matcher)
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

"""An engine process that is kept alive: one that dies or hangs is ended, and another started in its place.

To the rest of the server it is one `EngineClient`. While there is no engine, everything it is asked raises an
EngineDownError that says why and what is being done; requests that ran were told by the client that was lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fewbit.engine.config import EngineOptions
from fewbit.engine.spawn import COMMAND, EngineProcess, launch
from fewbit.engine.types import EngineDownError, EngineInfo, GenerateRequest, Stats
from fewbit.errors import FewbitError

if TYPE_CHECKING:
    from fewbit.engine.client import EngineClient, Stream

log = logging.getLogger(__name__)

LOOK_S = 0.25
DOWN_S = 7.0
"""A process that is there, but has been down for so long, is killed. Its requests have failed at once."""
STEP_S = 300.0
"""So is one whose step does not end."""
RESTARTS = 5
"""Attempts in a row, each of which waits twice as long as the one before; then the model is given up."""
BACKOFF_S = 0.5
STEADY_S = 60.0
"""An engine that ran for so long was well: counting begins anew."""

Tell = Callable[[str], None]


class Worker(Protocol):
    """One engine and what it runs in."""

    @property
    def client(self) -> EngineClient:
        """Talks to it."""
        ...

    def ended(self) -> str | None:
        """How its process ended, in words; None while it runs."""
        ...

    async def end(self) -> None:
        """End it now, whatever it is doing; returns when its memory is free."""
        ...


Start = Callable[[], Awaitable[Worker]]


class ProcessWorker:
    """An engine in a process of its own. Made by `start_process`."""

    def __init__(self, process: EngineProcess, client: EngineClient) -> None:
        self._process = process
        self.client = client

    def ended(self) -> str | None:
        """See `Worker`."""
        return self._process.exit_reason()

    async def end(self) -> None:
        """See `Worker`."""
        await self.client.close()
        await asyncio.to_thread(self._process.kill)  # it keeps nothing that would have to be saved


async def start_process(
    model: Path, options: EngineOptions, tell: Tell, drain_s: float, command: tuple[str, ...] = COMMAND
) -> ProcessWorker:
    """Start an engine process and wait until it takes requests. Cancelling ends the process.

    Args:
        model: The model directory.
        options: Of the engine.
        tell: Told in words what the process is doing.
        drain_s: How long a SIGTERM that somebody else sends to the process waits for running requests.
        command: The program, for tests.

    Raises:
        FewbitError: The engine could not open the model, in its own words.
    """
    loop = asyncio.get_running_loop()

    def say(text: str) -> None:
        loop.call_soon_threadsafe(tell, text)

    process = launch(model, options, drain_s=drain_s, command=command)
    own = ThreadPoolExecutor(1)  # loading takes minutes, and requests need the threads that all share
    try:
        await loop.run_in_executor(own, process.wait_ready, say)
        return ProcessWorker(process, await process.connect())
    except BaseException:
        process.process.kill()  # which also ends the thread that waits for it
        await asyncio.shield(asyncio.to_thread(process.kill))
        raise
    finally:
        own.shutdown(wait=False)


class Supervisor:
    """See `EngineClient`. Made by `supervise`.

    Args:
        worker: That runs now.
        start: Makes another.
        restarted: Called after each new start.
        lost: Told why, when it has given up.
    """

    def __init__(self, worker: Worker, start: Start, restarted: Callable[[], None], lost: Tell) -> None:
        self._worker: Worker | None = worker
        self._info = worker.client.info
        self._start, self._restarted, self._lost = start, restarted, lost
        self._down = ""  # why there is none
        self._ending: asyncio.Task[None] | None = None  # of the last one
        self._task = asyncio.create_task(self._watch())

    @property
    def info(self) -> EngineInfo:
        """See `EngineClient`."""
        return self._info

    async def submit(self, request: GenerateRequest) -> Stream:
        """See `EngineClient`."""
        return await self._client().submit(request)

    def abort(self, request_id: str) -> None:
        """See `EngineClient`."""
        if self._worker is not None:
            self._worker.client.abort(request_id)

    async def stats(self) -> Stats:
        """See `EngineClient`."""
        return await self._client().stats()

    def health(self) -> None:
        """See `EngineClient`."""
        self._client().health()

    async def close(self) -> None:
        """Stop watching, and end the engine."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if self._worker is not None:
            await self._end(self._worker, "the engine was stopped")
        elif self._ending is not None:
            await asyncio.shield(self._ending)

    async def _end(self, worker: Worker, why: str) -> None:
        """End the worker, even if this is cancelled meanwhile."""
        self._worker, self._down = None, why
        self._ending = asyncio.create_task(worker.end())
        await asyncio.shield(self._ending)

    def _client(self) -> EngineClient:
        if self._worker is None:
            raise EngineDownError(self._down)
        return self._worker.client

    async def _watch(self) -> None:
        failures = 0
        while True:
            began = time.monotonic()
            why = await self._until_lost()
            if time.monotonic() - began > STEADY_S:
                failures = 0
            while self._worker is None:
                failures += 1
                if failures > RESTARTS:
                    self._down = f"{why}; it was started {RESTARTS} times again in vain"
                    log.error("%s", self._down)
                    return self._lost(self._down)
                await self._restart(why, failures)

    async def _until_lost(self) -> str:
        """Wait until the engine is dead or hung, end what is left of it, and say why."""
        assert self._worker is not None
        worker, why = self._worker, None
        step = asyncio.create_task(_stuck_step(worker.client))
        hung_at: float | None = None
        try:
            while why is None:
                await asyncio.sleep(LOOK_S)
                reason = worker.ended()
                if reason is not None:
                    why = f"the engine process {reason}"
                elif step.done():
                    why = step.result()
                else:
                    hung_at, why = _hung(worker.client, hung_at)
        finally:
            step.cancel()
        log.error("%s; starting another", why)
        await self._end(worker, why)
        return why

    async def _restart(self, why: str, attempt: int) -> None:
        wait_s = BACKOFF_S * 2 ** (attempt - 1)
        self._down = f"{why}; it is being started again (attempt {attempt} of {RESTARTS})"
        await asyncio.sleep(wait_s)
        try:
            worker = await self._start()
        except Exception as error:  # house: whatever it is, the next attempt may do better, and there is a limit
            log.error("the engine could not be started again: %s", error)
            return
        self._worker, self._info = worker, worker.client.info
        log.warning("the engine is back after attempt %d", attempt)
        self._restarted()


def _hung(client: EngineClient, since: float | None) -> tuple[float | None, str | None]:
    """Since when the engine has been down, and why it has to be ended, if it has been so for too long."""
    try:
        client.health()
    except EngineDownError as error:
        now = time.monotonic()
        since = now if since is None else since
        return since, str(error) if now - since >= DOWN_S else None
    return None, None


async def _stuck_step(client: EngineClient) -> str:
    """Returns when a step of the engine does not end."""
    while True:
        await asyncio.sleep(STEP_S / 60)
        with contextlib.suppress(FewbitError):
            if (stats := await client.stats()).busy_s > STEP_S:
                return f"a step of the engine has not ended for {stats.busy_s:.0f} s"


async def supervise(start: Start, restarted: Callable[[], None], lost: Tell) -> Supervisor:
    """Start an engine, and keep it alive until the client is closed.

    Args:
        start: Starts one; see `start_process`.
        restarted: Called after each start but the first.
        lost: Told why, when it has given up.

    Raises:
        FewbitError: The first start failed.
    """
    return Supervisor(await start(), start, restarted, lost)

"""Sending requests when they are due, or when their turn comes, and keeping what became of each of them.

Open loop: every request has its time, however slow the server is. Closed loop: so many at once, the next when one is
over. What is sent, and where to, is the caller's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from fewbit.measure.load.answer import Record

HEARTBEAT_S = 0.01
"""How often the loop's own lateness is measured."""
Send = Callable[[int], Awaitable[Record]]
"""Sends the request of this index and returns its record; fails for no fault of the server's."""
Progress = Callable[[int, int], None]
"""Told how many requests are over, of how many."""


@dataclass(frozen=True)
class Run:
    """Requests that were sent, in order, and how well this process kept up.

    Attributes:
        records: one for each request; times count from the start of the schedule.
        late: by how many seconds the event loop was late at each heartbeat: stamps are off by up to so much.
        stopped: whether it ended early; requests that were not over then have no record.
    """

    records: list[Record]
    late: list[float]
    stopped: bool = False


async def drive(
    send: Send,
    count: int,
    *,
    due: Sequence[float] | None = None,
    limit: int | None = None,
    progress: Progress = lambda done, total: None,
    stop: asyncio.Event | None = None,
) -> Run:
    """Send `count` requests.

    Args:
        send: sends one of them.
        count: how many.
        due: open loop: seconds after the start for each, in order. None: closed loop, which needs a limit.
        limit: requests that may run at a time; those that are due wait in order.
        progress: told after each.
        stop: once it is set, nothing more is sent, and what is under way is dropped.
    """
    loop = asyncio.get_running_loop()
    late: list[float] = []
    heart = asyncio.create_task(_beat(late))
    gate = asyncio.Semaphore(limit) if limit is not None else None
    done = 0
    start = loop.time()

    async def one(index: int) -> Record:
        nonlocal done
        async with gate or nullcontext():
            record = await send(index)
        record.index, record.scheduled = index, None if due is None else start + due[index]
        done += 1
        progress(done, count)
        return record

    tasks: list[asyncio.Task[Record]] = []

    async def everything() -> None:
        async with asyncio.TaskGroup() as group:
            for index in range(count):
                if due is not None and (wait := start + due[index] - loop.time()) > 0:
                    await asyncio.sleep(wait)
                tasks.append(group.create_task(one(index)))

    try:
        stopped = await _until(everything(), stop)
    finally:
        heart.cancel()
    records = [task.result() for task in tasks if not task.cancelled()]
    for record in records:
        record.shift(-start)
    return Run(records, late, stopped)


async def _until(work: Coroutine[None, None, None], stop: asyncio.Event | None) -> bool:
    """Wait for some work, or drop it when it is to stop; returns whether it was dropped."""
    if stop is None:
        await work
        return False
    task, halt = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({task, halt}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
            return False
        return True
    finally:
        for one in (task, halt):
            one.cancel()
        await asyncio.gather(task, halt, return_exceptions=True)


async def _beat(late: list[float]) -> None:
    loop = asyncio.get_running_loop()
    while True:
        expected = loop.time() + HEARTBEAT_S
        await asyncio.sleep(HEARTBEAT_S)
        late.append(max(loop.time() - expected, 0.0))

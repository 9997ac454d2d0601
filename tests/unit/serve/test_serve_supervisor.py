"""An engine that dies, hangs, or cannot be brought back: over workers that are made of nothing."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from fake_engine import FakeEngine

from fewbit.engine.config import EngineOptions
from fewbit.engine.types import EngineDownError, GenerateRequest, SamplingParams
from fewbit.errors import CheckpointError
from fewbit.serve import supervisor
from fewbit.serve.supervisor import start_process, supervise


class FakeWorker:
    def __init__(self) -> None:
        self.client = FakeEngine(300)
        self.client.says = [5, 6, 7]
        self.status: str | None = None
        self.killed = False
        self.looks = 0  # how often it was looked after

    def ended(self) -> str | None:
        self.looks += 1
        return self.status

    async def end(self) -> None:
        self.killed = True

    def die(self) -> None:
        self.client.down, self.status = True, "was ended by SIGKILL"


class Factory:
    """Starts workers; fails where told to, and waits while its gate is closed."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked = 0
        self.workers: list[FakeWorker] = []
        self.failures = 0
        self.restarts = 0
        self.lost: list[str] = []

    async def start(self) -> FakeWorker:
        self.asked += 1
        await self.gate.wait()
        if self.failures:
            self.failures -= 1
            raise CheckpointError("the disk is gone")
        self.workers.append(FakeWorker())
        return self.workers[-1]

    def restarted(self) -> None:
        self.restarts += 1

    async def supervise(self):
        return await supervise(self.start, self.restarted, self.lost.append)


class Clock:
    """What the supervisor takes for the time; it goes on where a test says so."""

    now = 0.0


@pytest.fixture(autouse=True)
def clock(monkeypatch) -> Clock:
    monkeypatch.setattr(supervisor, "LOOK_S", 0.005)
    monkeypatch.setattr(supervisor, "BACKOFF_S", 0.01)
    made = Clock()
    monkeypatch.setattr(supervisor, "time", SimpleNamespace(monotonic=lambda: made.now))
    return made


async def until(true) -> None:
    async with asyncio.timeout(30):
        while not true():
            await asyncio.sleep(0.002)


async def looked_after(worker: FakeWorker) -> None:
    """The supervisor has seen how the worker is now, and has gone on: it looks no more at one that it gave up."""
    seen = worker.looks
    await until(lambda: worker.looks >= seen + 2)


REQUEST = GenerateRequest(id="r", prompt=(1,), params=SamplingParams(max_tokens=3))


async def answer(client) -> list[int]:
    return [e.token async for e in await client.submit(REQUEST) if e.token is not None]


def test_one_that_dies_is_started_again(run):
    async def main():
        factory = Factory()
        client = await factory.supervise()
        assert await answer(client) == [5, 6, 7]
        assert client.info.vocab == 300
        assert (await client.stats()).blocks == 64
        factory.gate.clear()
        factory.workers[0].die()
        with pytest.raises(EngineDownError):  # at once, whoever looks first
            client.health()
        await until(lambda: factory.asked == 2)
        assert factory.workers[0].killed
        with pytest.raises(
            EngineDownError, match=r"was ended by SIGKILL; it is being started again \(attempt 1 of 5\)"
        ):
            await client.submit(REQUEST)
        client.abort("r")  # no engine, no matter
        factory.gate.set()
        await until(lambda: factory.restarts == 1)
        client.health()
        assert await answer(client) == [5, 6, 7]
        await client.close()
        assert factory.workers[1].killed
        with pytest.raises(EngineDownError, match="was stopped"):
            client.health()
        assert not factory.lost

    run(main())


def test_one_that_hangs_is_ended_first(run, clock):
    async def main():
        factory = Factory()
        client = await factory.supervise()
        first = factory.workers[0]
        first.client.down = True  # no sign of life, but its process is there
        await looked_after(first)
        clock.now += 0.9 * supervisor.DOWN_S
        await looked_after(first)
        assert not first.killed
        clock.now = supervisor.DOWN_S
        await until(lambda: factory.restarts == 1)
        assert first.killed
        client.health()
        second = factory.workers[1]
        for _ in range(3):  # it is only slow, and each time counts for itself
            second.client.down = True
            await looked_after(second)
            clock.now += 0.9 * supervisor.DOWN_S
            await looked_after(second)
            second.client.down = False
            await looked_after(second)
        assert not second.killed
        assert factory.restarts == 1
        await client.close()

    run(main())


def test_a_step_that_does_not_end(run, monkeypatch):
    async def main():
        monkeypatch.setattr(supervisor, "STEP_S", 0.06)
        factory = Factory()
        client = await factory.supervise()
        stuck = factory.workers[0].client

        async def stats():
            from fewbit.engine.types import Stats

            return Stats(busy_s=1.0)

        monkeypatch.setattr(stuck, "stats", stats)
        await until(lambda: factory.restarts == 1)
        assert factory.workers[0].killed
        await client.close()

    run(main())


def test_a_start_that_fails_is_tried_again_a_few_times(run):
    async def main():
        factory = Factory()
        client = await factory.supervise()
        factory.failures = 3
        factory.workers[0].die()
        await until(lambda: factory.restarts == 1)
        assert factory.failures == 0
        assert not factory.lost
        factory.failures = 99
        factory.workers[1].die()
        await until(lambda: factory.lost)
        assert 99 - factory.failures == 1  # one of the five was left: the engine had not been well for a minute
        assert factory.lost == ["the engine process was ended by SIGKILL; it was started 5 times again in vain"]
        with pytest.raises(EngineDownError, match="5 times again in vain"):
            client.health()
        await client.close()

    run(main())


def test_one_that_is_being_ended_is_ended_whatever_happens(run, monkeypatch):
    async def main():
        factory = Factory()
        client = await factory.supervise()
        ending, gate = asyncio.Event(), asyncio.Event()

        async def end() -> None:
            ending.set()
            await gate.wait()
            factory.workers[0].killed = True

        monkeypatch.setattr(factory.workers[0], "end", end)
        factory.workers[0].die()
        await ending.wait()
        closing = asyncio.create_task(client.close())
        assert not (await asyncio.wait([closing], timeout=0.05))[0]
        gate.set()
        await closing
        assert factory.workers[0].killed

    run(main())


def test_loading_takes_no_thread_from_requests(run, monkeypatch, tmp_path):
    class Process:
        def wait_ready(self, progress) -> None:
            progress("reading weights")

        async def connect(self) -> FakeEngine:
            return FakeEngine(300)

    async def main():
        busy, told = threading.Event(), []
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        held = loop.run_in_executor(None, busy.wait)
        monkeypatch.setattr(supervisor, "launch", lambda *args, **kwargs: Process())
        try:
            async with asyncio.timeout(30):
                worker = await start_process(tmp_path, EngineOptions(), told.append, 0)
        finally:
            busy.set()
        assert worker.client.info.vocab == 300
        assert told == ["reading weights"]
        await held

    run(main())


def test_the_first_start_is_tried_once(run):
    async def main():
        factory = Factory()
        factory.failures = 1
        with pytest.raises(CheckpointError, match="the disk is gone"):
            await factory.supervise()

    run(main())

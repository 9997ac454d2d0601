"""Clients of an engine in this process and in another one: streams, aborts, refusals, death."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from tiny_engine import engine, request, slowed

from fewbit.engine import wire
from fewbit.engine.client import InProcessClient
from fewbit.engine.config import EngineOptions
from fewbit.engine.engine import generate
from fewbit.engine.socketclient import SILENT_TICKS, TICK_S, SocketClient
from fewbit.engine.spawn import spawn
from fewbit.engine.types import EngineDownError, Event, OverloadedError, TokenLogprobs
from fewbit.errors import CheckpointError, RequestError

COMMAND = (sys.executable, str(Path(__file__).with_name("tiny_engine.py")))


@pytest.fixture(scope="module")
def process():
    told = []
    with spawn("slow", EngineOptions(max_queued=4), progress=told.append, drain_s=60, command=COMMAND) as child:
        assert told == ["inventing weights"]
        yield child


@pytest.fixture(params=["in_process", "socket"])
def connect(request):
    """An async context manager that gives a client."""

    @contextlib.asynccontextmanager
    async def opened():
        if request.param == "socket":
            client = await request.getfixturevalue("process").connect()
        else:
            client = InProcessClient(slowed(engine(max_queued=4)))
        try:
            yield client
        finally:
            await client.close()

    return opened


async def until(client, condition, limit_s=30.0):
    """Poll the statistics until `condition` holds."""
    deadline = time.monotonic() + limit_s
    while not condition(stats := await client.stats()):
        assert time.monotonic() < deadline, stats
        await asyncio.sleep(0.01)
    return stats


async def collect(stream):
    return [event async for event in stream]


def test_events_stream_in_and_end_once(connect):
    async def main():
        async with connect() as client:
            assert client.info.vocab == 61
            requests = [request([1, 2, i], max_tokens=6, logprobs=1) for i in range(4)]
            streams = [await client.submit(r) for r in requests]
            answers = await asyncio.gather(*map(collect, streams))
            expected = generate(engine(), requests)
            for events, output in zip(answers, expected, strict=True):
                assert tuple(e.token for e in events) == output.tokens
                assert [e.logprobs.top[0][0] for e in events] == list(output.tokens)
                assert [e.ending is not None for e in events] == [False] * 5 + [True]
            stats = await until(client, lambda s: s.running == 0)
            assert stats.blocks_used == 0
            client.health()

    asyncio.run(main())


@pytest.mark.parametrize("way", ["cancel", "close", "drop", "abort", "never_read"])
def test_whoever_leaves_frees_the_blocks(connect, way):
    async def main():
        async with connect() as client:
            aborts = (await client.stats()).endings_total.get("abort", 0)
            stream = await client.submit(request([1, 2, 3], max_tokens=100))
            if way != "never_read":
                assert (await anext(stream)).token is not None
            await until(client, lambda s: s.running == 1)
            if way == "cancel":
                reader = asyncio.create_task(collect(stream))
                await asyncio.sleep(0.03)
                reader.cancel()
                await asyncio.gather(reader, return_exceptions=True)
                del reader
            elif way == "close":
                await stream.aclose()
                assert await collect(stream) == []
            elif way == "abort":
                client.abort(stream.id)
                assert (await collect(stream))[-1].ending.reason == "abort"
            del stream
            gc.collect()
            stats = await until(client, lambda s: s.running == 0)
            assert stats.blocks_used == 0
            assert stats.endings_total["abort"] == aborts + 1  # it did not come to its end

    asyncio.run(main())


def test_refusals_are_raised_where_the_request_is_made(connect):
    async def main():
        async with connect() as client:
            with pytest.raises(RequestError, match="the prompt is empty") as caught:
                await client.submit(request([]))
            assert caught.value.param == "prompt"
            stream = await client.submit(request([1], "twice", max_tokens=100))
            with pytest.raises(RequestError, match="still running"):
                await client.submit(request([1], "twice"))
            await stream.aclose()

            async def flood():  # 8 run at a time, 4 may wait
                return [await client.submit(request([1], max_tokens=100)) for _ in range(20)]

            with pytest.raises(OverloadedError, match="waiting"):
                await flood()
            gc.collect()
            await until(client, lambda s: s.running == s.waiting == 0)

    asyncio.run(main())


def test_a_client_that_vanishes_frees_its_blocks_and_disturbs_nobody(process):
    async def main():
        leaver, stayer = await process.connect(), await process.connect()
        aborts = (await stayer.stats()).endings_total.get("abort", 0)
        streams = [await leaver.submit(request([1, 2, i], max_tokens=100)) for i in range(3)]
        for stream in streams:
            await anext(stream)
        kept = await stayer.submit(request([5, 6], max_tokens=40))
        leaver._writer.transport.abort()
        await until(stayer, lambda s: s.endings_total.get("abort", 0) == aborts + 3)
        assert all([(await collect(s))[-1].ending.reason == "error" for s in streams])
        assert (await collect(kept))[-1].ending.reason == "length"
        await leaver.close()
        await stayer.close()

    asyncio.run(main())


def test_a_client_cannot_touch_the_requests_of_another(process):
    async def main():
        one, other = await process.connect(), await process.connect()
        stream = await one.submit(request([1], "mine", max_tokens=100))
        other.abort("mine")
        with pytest.raises(RequestError, match="still running"):
            await other.submit(request([1], "mine"))
        steps = (await other.stats()).steps_total
        await until(other, lambda s: s.steps_total > steps + 1)  # an abort would have come to the engine by now
        assert (await other.stats()).running == 1
        one.abort("mine")
        events = await collect(stream)
        assert len(events) > 2
        assert [e.ending.reason for e in events if e.ending] == ["abort"]
        await one.close()
        await other.close()

    asyncio.run(main())


@pytest.mark.parametrize("rubbish", [b"\xff\xff\xff\xff", b"\0\0\0\3abc", b"\0\0\0\1\x80", b"GET / HTTP/1.1\r\n\r\n"])
def test_rubbish_on_the_socket_costs_its_sender_the_connection_and_nothing_else(process, rubbish):
    async def main():
        reader, writer = await asyncio.open_unix_connection(process.socket)
        await wire.read_frame(reader)
        writer.write(rubbish)
        assert await asyncio.wait_for(reader.read(), 30) == b""
        writer.close()
        client = await process.connect()
        assert len(await collect(await client.submit(request([1], max_tokens=2)))) == 2
        await client.close()

    asyncio.run(main())


def test_the_socket_is_private_and_goes_with_its_process():
    with spawn("fine", command=COMMAND, drain_s=60) as child:
        folder = child.socket.parent
        assert folder.stat().st_mode & 0o777 == 0o700
    assert child.process.returncode == 0
    assert not folder.exists()


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        ("missing", CheckpointError, "no such directory: missing"),
        ("crash", EngineDownError, "ZeroDivisionError: on purpose"),
    ],
)
def test_an_engine_that_cannot_start_says_why(model, error, words, capfd):
    with pytest.raises(error, match=words):
        spawn(model, command=COMMAND)


def test_a_process_that_ends_without_a_word_is_an_error():
    with pytest.raises(EngineDownError, match="ended with status 3 before it was ready"):
        spawn("x", command=(sys.executable, "-c", "raise SystemExit(3)"))
    with pytest.raises(EngineDownError, match="cannot be started"):
        spawn("x", command=("/nonexistent/program",))


def test_kill_ends_every_request_at_once():
    async def main(child):
        client = await child.connect()
        streams = [await client.submit(request([1, i], max_tokens=100)) for i in range(3)]
        await anext(streams[0])
        os.kill(child.pid, signal.SIGKILL)
        for stream in streams:
            events = await collect(stream)
            assert events[-1].ending.reason == "error"
            assert "gone" in events[-1].ending.detail  # at once, not after some silence
            assert sum(e.ending is not None for e in events) == 1
        with pytest.raises(EngineDownError):
            client.health()
        with pytest.raises(EngineDownError):
            await client.submit(request([1]))
        with pytest.raises(EngineDownError):
            await client.stats()
        child.process.wait(30)
        assert child.exit_reason() == "was ended by SIGKILL"
        await client.close()
        with pytest.raises(EngineDownError, match="no engine answers"):
            await SocketClient.connect(child.socket)

    with spawn("slow", command=COMMAND) as child:
        asyncio.run(main(child))


def test_a_stopped_process_is_noticed_within_five_seconds_and_may_come_back():
    async def main(child):
        client = await child.connect()
        stream = await client.submit(request([1], max_tokens=100))
        await anext(stream)
        os.kill(child.pid, signal.SIGSTOP)
        assert TICK_S * SILENT_TICKS < 5
        events = await collect(stream)
        assert events[-1].ending.reason == "error"
        assert "no sign of life" in events[-1].ending.detail
        with pytest.raises(EngineDownError, match="no sign of life"):
            client.health()
        os.kill(child.pid, signal.SIGCONT)
        while True:
            with contextlib.suppress(EngineDownError):
                client.health()
                break
            await asyncio.sleep(0.05)
        await until(client, lambda s: s.running == 0)
        assert (await collect(await client.submit(request([1], max_tokens=2))))[-1].ending.reason == "length"
        await client.close()

    with spawn("slow", command=COMMAND, drain_s=60) as child:
        asyncio.run(main(child))


def test_sigterm_finishes_what_runs_and_takes_nothing_new(tmp_path):
    hurry = tmp_path / "hurry"

    async def main(child):
        client = await child.connect()
        stream = await client.submit(request([1], max_tokens=100))
        await anext(stream)
        os.kill(child.pid, signal.SIGTERM)

        async def until_refused():
            while True:
                await collect(await client.submit(request([2], max_tokens=1)))

        with pytest.raises(OverloadedError, match="shutting down"):
            await asyncio.wait_for(until_refused(), 30)
        hurry.touch()
        assert (await collect(stream))[-1].ending.reason == "length"
        assert await asyncio.to_thread(child.process.wait, 30) == 0
        await client.close()

    with spawn(f"slow:{hurry}", command=COMMAND, drain_s=120) as child:
        asyncio.run(main(child))


def test_sigterm_aborts_what_takes_too_long():
    async def main(child):
        client = await child.connect()
        stream = await client.submit(request([1], max_tokens=120))
        await anext(stream)
        os.kill(child.pid, signal.SIGTERM)
        assert (await collect(stream))[-1].ending.reason == "abort"
        assert await asyncio.to_thread(child.process.wait, 30) == 0
        await client.close()

    with spawn("slow", command=COMMAND, drain_s=0.2) as child:
        asyncio.run(main(child))


def test_the_engine_dies_with_its_parent():
    code = (
        "import sys, time; from fewbit.engine.spawn import spawn\n"
        f"child = spawn('slow', command={COMMAND!r}); print(child.pid, child.socket.parent, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid, folder = parent.stdout.readline().split()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    Path(folder, "engine.sock").unlink(missing_ok=True)
    Path(folder).rmdir()


def test_an_engine_that_breaks_down_tells_everybody(monkeypatch, caplog):
    async def main():
        machine = engine()
        client = InProcessClient(machine)
        monkeypatch.setattr(machine.scheduler, "commit", lambda *a: 1 / 0)
        stream = await client.submit(request([1]))
        (event,) = await collect(stream)
        assert event.ending.reason == "error"
        assert "broke down: ZeroDivisionError" in event.ending.detail
        with pytest.raises(EngineDownError, match="broke down"):
            await client.submit(request([1]))
        with pytest.raises(EngineDownError, match="broke down"):
            client.health()
        await client.close()

    asyncio.run(main())


def test_a_client_needs_no_torch():
    code = "import sys, fewbit.engine.spawn, fewbit.engine.client; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_big_prompts_travel_in_frames_that_are_read_again(monkeypatch):
    position = TokenLogprobs(-1.5, tuple((2**20 + i, -float(i)) for i in range(20)))
    events = [Event(f"r{i}", prompt_logprobs=(position,) * 512) for i in range(7)]
    assert len(list(wire.event_frames(events))) == 1
    monkeypatch.setattr(wire, "MAX_FRAME", 1 << 20)
    frames = list(wire.event_frames([*events, Event("r7", 5)]))
    assert len(frames) > 2
    assert all(len(frame) <= 1 << 20 for frame in frames)
    read = [event for frame in frames for event in msgspec.msgpack.decode(frame[4:], type=wire.FromEngine).events]
    assert read == [*events, Event("r7", 5)]


def test_everything_a_request_can_ask_arrives_at_the_other_side(connect):
    async def main():
        async with connect() as client:
            asked = {"prompt_logprobs": 2, "logprobs": 1, "logit_bias": ((7, 100.0),), "max_tokens": 2}
            stream = await client.submit(request([1, 2, 3, 4], priority=-3, salt="mine", **asked))
            events = [event async for event in stream]
            said = [x for e in events for x in e.prompt_logprobs]
            assert len(said) == 3
            assert all(len(x.top) == 2 for x in said)
            assert [e.token for e in events if e.token is not None] == [7, 7]
            stream = await client.submit(request([1, 2], allowed_token_ids=(5,), max_tokens=0))
            assert [e.ending.reason async for e in stream] == ["length"]
            with pytest.raises(RequestError, match="without a tokenizer") as caught:
                await client.submit(request([1, 2], grammar="start: x"))
            assert caught.value.param == "grammar"
            with pytest.raises(RequestError, match="priority"):
                await client.submit(request([1, 2], priority=1 << 40))

    asyncio.run(main())

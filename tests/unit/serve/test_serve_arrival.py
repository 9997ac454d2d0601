"""What calls of gRPC hold: while their message arrives, and while the model works."""

from __future__ import annotations

import asyncio
import sys
from types import SimpleNamespace

from fewbit.serve import Models
from fewbit.serve.kserve import arrival, protocol, rpc
from fewbit.serve.metrics import Metrics


async def never():
    """A call that is opened and sends nothing."""
    await asyncio.Event().wait()
    yield b""


async def once(raw: bytes):
    yield raw


def test_few_calls_without_a_key_may_be_slow(monkeypatch):
    """The oldest of the slow ones gives way; those that come at once are answered, however many wait."""
    monkeypatch.setattr(arrival, "QUICK_S", 0.01)
    monkeypatch.setattr(arrival, "ARRIVE_S", 600.0)

    async def main():
        waiting = arrival.Waiting()
        slow = [asyncio.create_task(waiting.first(never())) for _ in range(arrival.MAX_SLOW_CALLS + 2)]
        async with asyncio.timeout(60):
            while not all(t.done() for t in slow[:2]):
                await asyncio.sleep(0.01)
        assert [t.result() for t in slow[:2]] == [None, None]
        assert not any(t.done() for t in slow[2:])
        assert await waiting.first(once(b"x")) == b"x"
        for task in slow[2:]:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
        assert not waiting._slow
        assert not waiting._calls

    asyncio.run(main())


def test_a_stream_holds_no_message_while_the_model_works(monkeypatch):
    """Neither the bytes, in which fields that nobody knows may be, nor the message."""
    kind = protocol.messages()["ModelInferRequest"]
    raws = [kind(model_name="a", id="1").SerializeToString() + bytes([0xFA, 0x7F, 0x0A]) + b"0123456789"]
    parsed, held = [], []
    message = arrival.message

    async def noted(kind, raw):
        parsed.append(await message(kind, raw))
        return parsed[-1]

    monkeypatch.setattr(rpc, "message", noted)

    class Front:
        models = Models((), Metrics())

        async def stream(self, name, version, asked, lease):
            await asyncio.sleep(0)  # the reader of the stream goes on
            assert name == "a"
            held.append([sys.getrefcount(one[0]) for one in (raws, parsed)])
            yield ()

    async def requests():
        yield raws[0]

    async def write(reply):
        assert (reply.error_message, reply.infer_response.id) == ("", "1")

    context = SimpleNamespace(write=write, invocation_metadata=lambda: ())
    alone = [object()]
    asyncio.run(rpc._Grpc(Front(), None)._stream(requests(), context))
    assert held == [[sys.getrefcount(alone[0])] * 2]


def test_probes_wait_for_no_message():
    """A message that has no fields is not read: its sender cannot make the server hold it."""
    handlers = rpc._Grpc(SimpleNamespace(models=Models((), Metrics())), None).handlers()
    context = SimpleNamespace(invocation_metadata=lambda: ())

    async def ask(name):
        path = SimpleNamespace(method=f"/{protocol.INFERENCE}/{name}", invocation_metadata=())
        async with asyncio.timeout(60):
            return await handlers[0].service(path).stream_unary(never(), context)

    assert asyncio.run(ask("ServerLive")).live
    assert asyncio.run(ask("ServerReady")).ready in (True, False)

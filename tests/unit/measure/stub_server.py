"""A server that says what a script tells it to, when it tells it to. HTTP by hand, so that it can also be wrong."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

DONE = b"data: [DONE]\n\n"


@dataclass
class Script:
    """What one request gets.

    Attributes:
        parts: (seconds to wait, bytes of the body), one after the other.
        status: of the response.
        cut: the connection ends without the body's end.
        reset: it is reset, not closed.
    """

    parts: Sequence[tuple[float, bytes]]
    status: int = 200
    cut: bool = False
    headers: dict[str, str] = field(default_factory=dict)


def event(payload: Any) -> bytes:
    return b"data: " + json.dumps(payload).encode() + b"\n\n"


def text_chunk(text: str, finish: str | None = None) -> bytes:
    return event({"object": "text_completion", "choices": [{"index": 0, "text": text, "finish_reason": finish}]})


def usage_chunk(prompt: int, completion: int) -> bytes:
    return event({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion}})


def answer(
    ttft: float, gaps: Sequence[float], *, tokens: int | None = None, prompt: int = 7, tail: float = 0.0
) -> list[tuple[float, bytes]]:
    """A completion whose first word comes after `ttft`, each other after its gap; the end `tail` later."""
    parts = [(ttft, text_chunk("w "))] + [(gap, text_chunk("w ")) for gap in gaps]
    made = len(parts) if tokens is None else tokens
    return [*parts, (0.0, text_chunk("", "length")), (tail, usage_chunk(prompt, made)), (0.0, DONE)]


class Stub:
    """Attributes: `url`; `seen`: (path, headers, body) of each POST; `times`: when its head was read."""

    def __init__(self, script: Callable[[int, dict], Script]) -> None:
        self.script = script
        self.url = ""
        self.seen: list[tuple[str, dict[str, str], dict]] = []
        self.times: list[float] = []
        self.connections = 0
        self.models = ["stub"]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while await self._one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
        method, path, _ = first.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if method == "GET":
            body = json.dumps({"data": [{"id": name} for name in self.models]}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
            return True
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        number = len(self.seen)
        self.seen.append((path, headers, body))
        self.times.append(asyncio.get_running_loop().time())
        script = self.script(number, body)
        extra = "".join(f"{name}: {value}\r\n" for name, value in script.headers.items())
        writer.write(f"HTTP/1.1 {script.status} OK\r\ntransfer-encoding: chunked\r\n{extra}\r\n".encode())
        for delay, part in script.parts:
            if delay:
                await asyncio.sleep(delay)
            writer.write(b"%x\r\n%s\r\n" % (len(part), part))
            await writer.drain()
        if script.cut:
            return False
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return "connection" not in script.headers


@asynccontextmanager
async def stub_server(script: Callable[[int, dict], Script]):
    stub = Stub(script)
    server = await asyncio.start_server(stub.serve, "127.0.0.1", 0)
    stub.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield stub
    finally:
        server.close()

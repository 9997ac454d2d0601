"""HTTP/1.1 as a stopwatch needs it: bytes are stamped when they arrive, before anything is parsed.

An event loop hands out all that has arrived, one connection after the other. Parsing what one connection got would
delay the stamps of the next, so a connection only notes time and bytes; parsing comes in the loop's next round.
The clock is the loop's own (`loop.time`), by which requests are also sent.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from fewbit.errors import RequestError

MAX_HEAD = 1 << 18
"""Bytes of a response's head, at most."""
OnBody = Callable[[float, bytes], None]
"""Called with the time of arrival and bytes of the body."""


class ExchangeError(Exception):
    """A request got no whole answer; the message says why."""


class ResponseReader:
    """One response out of bytes that arrive in any pieces.

    Attributes:
        status: of the final response; 0 until its head is there.
        headers: names in lower case.
        done: the whole response was read.
        keep_alive: another request may follow on this connection.
    """

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.done = self.keep_alive = False
        self._buffer = bytearray()
        self._left = 0  # bytes of the body, or of the chunk with its line end
        self._step: Callable[[bytearray], bool] = self._head

    def feed(self, data: bytes) -> bytes:
        """Take bytes; return those of them that are the body's.

        Raises:
            ExchangeError: this is no HTTP response.
        """
        self._buffer += data
        body = bytearray()
        while not self.done and self._step(body):
            pass
        return bytes(body)

    def close(self) -> None:
        """The connection has ended.

        Raises:
            ExchangeError: in the middle of a response.
        """
        if self._step == self._until_close:
            self.done = True
        if not self.done:
            raise ExchangeError("the connection ended in the middle of the answer" if self.status else "no answer")

    def _head(self, body: bytearray) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > MAX_HEAD:
                raise ExchangeError(f"the answer's head has more than {MAX_HEAD} bytes")
            return False
        first, *lines = self._buffer[:end].decode("latin-1").split("\r\n")
        del self._buffer[: end + 4]
        version, _, rest = first.partition(" ")
        if not version.startswith("HTTP/1.") or not rest[:3].isdigit():
            raise ExchangeError(f"no HTTP answer but {first[:60]!r}")
        if rest[0] == "1":  # 100 Continue and the like: the answer is still to come
            return True
        self.status = int(rest[:3])
        self.headers = {name.strip().lower(): value.strip() for name, _, value in (s.partition(":") for s in lines)}
        connection = self.headers.get("connection", "").lower()
        self.keep_alive = "close" not in connection and (version != "HTTP/1.0" or "keep-alive" in connection)
        if "chunked" in self.headers.get("transfer-encoding", "").lower():
            self._step = self._size
        elif (length := self.headers.get("content-length")) is not None:
            if not (length.isascii() and length.isdigit()):
                raise ExchangeError(f"content-length {length!r} is no number")
            self._left, self._step = int(length), self._counted
        elif self.status in (204, 304):
            self.done = True
        else:
            self._step, self.keep_alive = self._until_close, False
        return True

    def _counted(self, body: bytearray) -> bool:
        self._take(body, self._left)
        self.done = self._left == 0
        return False

    def _until_close(self, body: bytearray) -> bool:
        self._take(body, len(self._buffer))
        return False

    def _size(self, body: bytearray) -> bool:
        line = self._line()
        if line is None:
            return False
        size = line.partition(b";")[0].strip()
        try:
            self._left = int(size, 16) if size.isalnum() else -1
        except ValueError:
            self._left = -1
        if self._left < 0:
            raise ExchangeError(f"{line[:30]!r} is no size of a chunk")
        self._step = self._chunk if self._left else self._trailer
        return True

    def _chunk(self, body: bytearray) -> bool:
        self._take(body, self._left)
        if self._left or len(self._buffer) < 2:
            return False
        if self._line() != b"":
            raise ExchangeError("a chunk is longer than it says")
        self._step = self._size
        return True

    def _trailer(self, body: bytearray) -> bool:
        line = self._line()
        self.done = line == b""
        return line is not None

    def _take(self, body: bytearray, count: int) -> None:
        """Move up to `count` bytes from the buffer to the body."""
        part = self._buffer[:count]
        body += part
        del self._buffer[: len(part)]
        self._left -= len(part)

    def _line(self) -> bytes | None:
        end = self._buffer.find(b"\r\n")
        if end < 0:
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 2]
        return line


class _Connection(asyncio.Protocol):
    """A connection that stamps what arrives; carries one exchange at a time."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._arrived: list[tuple[float, bytes | None]] = []  # None: the connection ended
        self._reader: ResponseReader | None = None
        self._on_body: OnBody = lambda stamp, body: None
        self._over: asyncio.Future[None] | None = None
        self._transport: asyncio.Transport | None = None
        self.fresh = True  # no exchange yet
        self.open = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._note(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        self._note(None)

    def close(self) -> None:
        """End it now."""
        self.open = False
        if self._transport is not None:
            self._transport.abort()

    async def exchange(self, request: bytes, on_body: OnBody) -> ResponseReader:
        """Send a request; return when its answer is complete."""
        assert self._transport is not None
        self._reader, self._on_body, self._over = ResponseReader(), on_body, self._loop.create_future()
        self._transport.write(request)
        try:
            await self._over
        finally:
            reader, self._reader, self.fresh = self._reader, None, False
        return reader

    def _note(self, data: bytes | None) -> None:
        if not self._arrived:
            self._loop.call_soon(self._read)
        self._arrived.append((self._loop.time(), data))

    def _read(self) -> None:
        arrived, self._arrived = self._arrived, []
        for stamp, data in arrived:
            reader, over = self._reader, self._over
            if reader is None or over is None or over.done():
                self.open = False  # nobody asked: nothing that follows can be trusted
                return
            try:
                if data is None:
                    reader.close()
                elif body := reader.feed(data):
                    self._on_body(stamp, body)
            except Exception as error:  # house: it is the exchange's own, raised where that is waited for
                self.open = False
                over.set_exception(error)
                return
            if reader.done:
                over.set_result(None)


@dataclass(frozen=True)
class Url:
    """Where a server is: ``http(s)://host[:port][/prefix]``."""

    text: str
    host: str
    port: int
    tls: bool
    prefix: str

    @classmethod
    def parse(cls, text: str) -> Url:
        """Read a URL; a trailing ``/v1`` is what every path begins with anyway.

        Raises:
            RequestError: it is none.
        """
        try:
            parts = urlsplit(text if "://" in text else f"http://{text}")
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise RequestError(f"URL {text}: expected http://host:port or https://host, for example 127.0.0.1:8000")
        tls = parts.scheme == "https"
        prefix = parts.path.rstrip("/").removesuffix("/v1")
        return cls(text, parts.hostname, port or (443 if tls else 80), tls, prefix)


class Client:
    """A server's connections, kept open between requests as long as both sides like."""

    def __init__(self, url: Url, headers: dict[str, str] | None = None) -> None:
        self.url = url
        self._idle: list[_Connection] = []
        self._headers = headers or {}
        self._ssl = ssl.create_default_context() if url.tls else None

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        """The bytes of a request, so that nothing is left to be made when it is due."""
        host = f"[{self.url.host}]" if ":" in self.url.host else self.url.host
        headers = {"Host": f"{host}:{self.url.port}", "Accept": "*/*", "User-Agent": "fewbit"} | self._headers
        if body:
            headers |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return f"{method} {self.url.prefix}{path} HTTP/1.1\r\n{lines}\r\n".encode("latin-1") + body

    async def exchange(self, request: bytes, on_body: OnBody) -> ResponseReader:
        """Send a request over an idle connection, else a new one.

        Args:
            request: from `request`.
            on_body: given the body as it arrives.

        Raises:
            ExchangeError: no connection, or no whole answer.
        """
        heard = False

        def hear(stamp: float, body: bytes) -> None:
            nonlocal heard
            heard = True
            on_body(stamp, body)

        while True:
            connection = await self._connection()
            fresh = connection.fresh
            try:
                reader = await connection.exchange(request, hear)
            except ExchangeError:
                if fresh or heard or connection.open:
                    raise
                continue  # the server had ended an idle connection: it has not seen this request
            except BaseException:  # a timeout: what this connection still carries is nobody's
                connection.close()
                raise
            if reader.keep_alive and connection.open:
                self._idle.append(connection)
            else:
                connection.close()
            return reader

    async def close(self) -> None:
        """End the idle connections."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _connection(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.open:
                return connection
        loop = asyncio.get_running_loop()
        try:
            _, made = await loop.create_connection(_Connection, self.url.host, self.url.port, ssl=self._ssl)
        except OSError as error:
            raise ExchangeError(f"cannot connect to {self.url.host}:{self.url.port} ({_reason(error)})") from error
        return made


def _reason(error: OSError) -> str:
    if error.errno is not None and error.errno > 0:  # asyncio puts its own words in the place of the system's
        return os.strerror(error.errno)
    return error.strerror or str(error) or type(error).__name__

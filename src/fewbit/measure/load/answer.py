"""One answer of an OpenAI-compatible server as it streams in: when what arrived, and what is wrong with it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import msgspec

from fewbit.measure.load.http import ExchangeError

_QUOTED = 300  # characters of a server's own words in an error


@dataclass
class Record:
    """What became of one request; times in seconds, by the clock of the event loop until `shift` says otherwise.

    Attributes:
        index: its place in the load.
        scheduled: when it was to be sent; None: when its turn came (closed loop).
        sent: when it was handed to the connection.
        ended: when it was over, well or not.
        first_chunk: arrival of the first chunk with choices, be they empty.
        arrivals: of each chunk with content (text, reasoning or a tool call).
        texts: the contents, one for each arrival.
        usage: the server's word on tokens, by OpenAI's names; empty: it gave none.
        finish_reason: why it ended, as the server says.
        closed: the stream ended with ``[DONE]``.
        error: why it failed; None: it did not.
    """

    index: int = 0
    scheduled: float | None = None
    sent: float = 0.0
    ended: float = 0.0
    first_chunk: float | None = None
    arrivals: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    usage: dict[str, int] = field(default_factory=dict)
    finish_reason: str | None = None
    closed: bool = False
    error: str | None = None

    @property
    def text(self) -> str:
        """The whole content."""
        return "".join(self.texts)

    def shift(self, seconds: float) -> None:
        """Count all times from another moment."""
        self.sent, self.ended = self.sent + seconds, self.ended + seconds
        self.scheduled = None if self.scheduled is None else self.scheduled + seconds
        self.first_chunk = None if self.first_chunk is None else self.first_chunk + seconds
        self.arrivals = [arrival + seconds for arrival in self.arrivals]


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _ToolCall(msgspec.Struct):
    function: _Function | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[_ToolCall] | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = 0


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decoder = msgspec.json.Decoder(_Chunk)


class EventReader:
    """Server-sent events out of bytes that arrive in any pieces; comments and other fields are left out."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, body: bytes) -> list[bytes]:
        """The data of every event that is complete now."""
        *lines, self._rest = (self._rest + body).split(b"\n")
        return [event for line in lines if (event := self._line(line)) is not None]

    def finish(self) -> list[bytes]:
        """What stands at the end without the empty line that should follow; many servers forget it."""
        found = [self._line(self._rest), self._line(b"")]
        self._rest = b""
        return [event for event in found if event is not None]

    def _line(self, line: bytes) -> bytes | None:
        line = line.removesuffix(b"\r")
        if line.startswith(b"data:"):
            self._data.append(line[5:].removeprefix(b" "))
        elif not line and self._data:
            event, self._data = b"\n".join(self._data), []
            return event
        return None


class AnswerReader:
    """Fills a record from the body of a streamed completion or chat completion."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._events = EventReader()
        self._raw = b""

    def push(self, stamp: float, body: bytes) -> None:
        """Take bytes of the body that arrived at `stamp`."""
        if len(self._raw) < 4 * _QUOTED:  # in case it turns out to be an error's
            self._raw += body
        for event in self._events.feed(body):
            self._event(stamp, event)

    def finish(self, status: int, stamp: float) -> None:
        """The response is complete.

        Raises:
            ExchangeError: it is no good answer.
        """
        if status != 200:
            raise ExchangeError(f"HTTP {status}: {_words(self._raw)}")
        for event in self._events.finish():
            self._event(stamp, event)
        r = self._record
        if r.error is not None:
            raise ExchangeError(r.error)
        if not r.closed and r.finish_reason is None:
            raise ExchangeError("the stream ended without a finish_reason and without [DONE]")
        if not r.arrivals:
            tokens = r.usage.get("completion_tokens")
            said = "" if tokens is None else f", though usage counts {tokens} tokens"
            raise ExchangeError(f"the answer held no content{said}")

    def _event(self, stamp: float, data: bytes) -> None:
        r = self._record
        if data == b"[DONE]":
            r.closed = True
            return
        try:
            chunk = _decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            r.error = r.error or f"not an OpenAI chunk ({error}): {_words(data)}"
            return
        if chunk.error is not None:
            r.error = r.error or f"error in the stream: {_words(data)}"
        if chunk.usage is not None:
            made = chunk.usage.completion_tokens or 0
            r.usage = {"prompt_tokens": chunk.usage.prompt_tokens, "completion_tokens": made}
        for choice in chunk.choices:
            if r.first_chunk is None:
                r.first_chunk = stamp
            if content := _content(choice):
                r.arrivals.append(stamp)
                r.texts.append(content)
            r.finish_reason = choice.finish_reason or r.finish_reason


def _content(choice: _Choice) -> str:
    if choice.text:
        return choice.text
    if (delta := choice.delta) is None:
        return ""
    calls = [call.function for call in delta.tool_calls or () if call.function]
    called = "".join((function.name or "") + (function.arguments or "") for function in calls)
    return (delta.reasoning or delta.reasoning_content or "") + (delta.content or "") + called


def _words(body: bytes) -> str:
    """A server's own words: the message of its error, or the bytes as text."""
    text = body.decode("utf8", "replace")
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        said = None
    if isinstance(said, dict) and "error" in said:
        said = said["error"]
        text = str(said.get("message", said) if isinstance(said, dict) else said)
    text = " ".join(text.split())
    return text[:_QUOTED] if text else "(an empty body)"

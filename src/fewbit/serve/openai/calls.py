"""What a model says, as the parts of a message: content, thoughts, calls of tools.

Models write calls in the dialect they were trained on, which their chat template shows. Text comes piece by piece and
goes out as soon as it is certain what it is; a call goes out as its name, then its arguments as they are written.
What looks like a call and is none stays content, to the letter.
"""

from __future__ import annotations

import json

from fewbit.serve.openai.dialects import THINK, THOUGHT, Dialect
from fewbit.serve.openai.shapes import AssistantMessage, Delta, ToolCall

_WORD = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")


class Speech:
    """Text in, deltas of a message out.

    Args:
        dialect: How calls are written; None: there are none.
        names: What may be called.
        thinks: Whether the model opens with thoughts; True: it may, "inside": the prompt has opened them already.
        only: All of the text is the arguments of this function.
        most: Calls after so many are left out; None: all go.
    """

    def __init__(
        self,
        dialect: Dialect | None = None,
        names: frozenset[str] = frozenset(),
        thinks: bool | str = False,
        only: str | None = None,
        most: int | None = None,
    ) -> None:
        self._dialect, self._names, self._most = dialect or Dialect(), names, most
        self._active = dialect is not None
        self.thinking = thinks == "inside"
        self._fresh = bool(thinks) and not self.thinking  # thoughts may still begin
        self._after_thought = False
        self._start = True  # nothing has been said yet
        self._held = ""  # not certain yet
        self._since: str | None = None  # within calls: what to say after all if this is none
        self._call: _Call | None = None
        self.calls = 0
        if only is not None:
            self._since, self._call = "", _Call(only)

    def push(self, text: str) -> list[Delta]:
        """Take text; return what is certain now."""
        self._held += text
        return self._go_on(last=False)

    def finish(self) -> list[Delta]:
        """The text is over: what was held back."""
        deltas = self._go_on(last=True)
        if self._since is not None and not self._spent and not (self._call and self._call.begun):
            rest, self._since, self._call = self._since + self._held, None, None
            if rest.strip(" \n\t" + "".join(f for f in self._dialect.fillers if len(f) == 1)):
                deltas += _said(rest)
        return deltas

    @property
    def _spent(self) -> bool:
        """Whether no more calls are wanted."""
        return self._most is not None and self.calls >= self._most

    def _go_on(self, last: bool) -> list[Delta]:
        deltas: list[Delta] = []
        while True:
            before = (self._held, self._since, self._call, self.thinking, self._fresh)
            if self._fresh:
                self._begin(last)
            elif self.thinking:
                deltas += self._think(last)
            elif self._since is None:
                deltas += self._say(last)
            else:
                deltas += self._read_call(last)
            if before == (self._held, self._since, self._call, self.thinking, self._fresh):
                return deltas

    def _begin(self, last: bool) -> None:
        """Is the first thing that is said a thought?"""
        text = self._held.lstrip()
        if text.startswith(THINK):
            self._held, self.thinking, self._fresh = text.removeprefix(THINK), True, False
        elif last or not THINK.startswith(text):
            self._fresh = False

    def _think(self, last: bool) -> list[Delta]:
        thought, end, rest = self._held.partition(THOUGHT)
        if end:
            self.thinking, self._after_thought, self._held = False, True, rest
        else:
            keep = 0 if last else _overlap(thought, THOUGHT)
            thought, self._held = thought[: len(thought) - keep], thought[len(thought) - keep :]
        return [{"reasoning": thought}] if thought else []

    def _say(self, last: bool) -> list[Delta]:
        """Content, until a call may begin."""
        if self._after_thought:  # line breaks there are no content
            self._held = self._held.lstrip("\n")
            self._after_thought = not self._held
        text, dialect = self._held, self._dialect
        if not self._active:
            self._held = ""
            return _said(text)
        if self._start and dialect.bare:
            body = text.lstrip()
            if body[:1] in ("{", "["):
                self._since, self._held = text[: len(text) - len(body)], body
                return []
            if not body and not last:
                return []
        at = text.find(dialect.opens) if dialect.opens else -1
        if at >= 0:
            before, end = text[:at].rstrip(), at + len(dialect.opens)
            self._since, self._held = text[len(before) : end], text[end:]
            return self._content(before)
        keep = 0
        if not last:
            keep = _overlap(text, dialect.opens)
            keep = len(text) - len(text[: len(text) - keep].rstrip())  # spaces before a call are no content
        self._held = text[len(text) - keep :]
        return self._content(text[: len(text) - keep])

    def _content(self, text: str) -> list[Delta]:
        self._start = self._start and not text.strip()
        return _said(text)

    def _read_call(self, last: bool) -> list[Delta]:
        """Within calls: the next one, or what stands between two."""
        if self._call is None:
            return self._between(last)
        used = self._call.feed(self._held)
        call, read, self._held = self._call, self._held[:used], self._held[used:]
        if not call.begun:  # else it is one, and never said as text
            self._since = (self._since or "") + read
        if call.broken or (call.done and not call.fits(self._names)):
            said, self._since, self._call = self._since or "", None, None
            return [] if call.begun or self._spent else self._content(said)
        deltas = self._of_call(call) if call.begun or not self._spent else []
        if call.done:
            self._since, self._call = "", None
        return deltas

    def _between(self, last: bool) -> list[Delta]:
        text = self._held.lstrip()
        spaces = self._held[: len(self._held) - len(text)]
        since = self._since or ""
        if not last and any(f.startswith(text) and f != text for f in self._dialect.fillers):
            return []
        for filler in self._dialect.fillers:
            if text.startswith(filler):
                if filler == self._dialect.opens:
                    self._since = filler
                elif since:  # else a call is over, and this belonged to it
                    self._since = since + spaces + filler
                self._held = text[len(filler) :]
                return []
        if text.startswith("{"):
            self._since, self._held, self._call = since + spaces, text, _Call()
            return []
        word = text[: next((i for i, c in enumerate(text) if c not in _WORD), len(text))]
        rest = text[len(word) :].lstrip()
        if self._dialect.named and word in self._names and rest[:1] not in ("", "["):
            self._since, self._held, self._call = since + spaces + word, rest, _Call(word)
            return []
        if self._dialect.named and word in self._names and rest.startswith("[ARGS]"):
            self._since, self._held, self._call = since + spaces + word, rest.removeprefix("[ARGS]"), _Call(word)
            return []
        unclear = self._dialect.named and (rest == "" or (word in self._names and "[ARGS]".startswith(rest)))
        if last or not (unclear or not text):
            said = since + self._held if since else text
            self._since, self._held = None, ""
            return self._content(said if said.strip() else "")
        return []

    def _of_call(self, call: _Call) -> list[Delta]:
        deltas: list[Delta] = []
        fragment = call.fragment(self._names)
        if fragment is None:
            return []
        if not call.begun:
            call.begun = True
            self.calls += 1
            deltas.append({
                "tool_calls": [{
                    "index": self.calls - 1,
                    "id": self._dialect.new_id(),
                    "type": "function",
                    "function": {"name": call.name or "", "arguments": ""},
                }]
            })  # fmt: skip
        if fragment:
            deltas.append({"tool_calls": [{"index": self.calls - 1, "function": {"arguments": fragment}}]})
        return deltas


class _Call:
    """One call while it is written: a JSON object of a name and arguments, or only the arguments.

    Attributes:
        name: As soon as it is known.
        done: The object is complete.
        broken: It is no JSON object.
        begun: Its name is out.
    """

    def __init__(self, name: str | None = None) -> None:
        self.name = name
        self.done = self.broken = self.begun = False
        self._raw = ""
        self._depth = 0
        self._quoted = self._escaped = False
        self._phase = "open" if name is None else "value"
        self._floor = 1 if name is None else 0  # the depth at which the arguments stand
        self._key = "" if name is None else "arguments"
        self._start: int | None = None  # of the key or the value that is being read
        self._value: tuple[int, int | None] | None = None  # where the arguments are
        self._sent = 0

    def feed(self, text: str) -> int:
        """Read on; return how many characters belong to this call."""
        base = len(self._raw)
        self._raw += text
        for i, c in enumerate(text):
            self._step(c, base + i)
            if self.done or self.broken:
                self._raw = self._raw[: base + i + 1]
                return i + 1
        return len(text)

    def fits(self, names: frozenset[str]) -> bool:
        """Whether the complete object is a call of one of these."""
        return self.begun or (self.name in names and self._text() is not None)

    def fragment(self, names: frozenset[str]) -> str | None:
        """What is new of the arguments; None while it is not certain that this is a call."""
        if self.name not in names or (self._value is None and not self.done):
            return None
        if self._value is None or self._raw[self._value[0]] != "{":  # no arguments, or a text of JSON
            return self._text() if self.done else None
        start, end = self._value
        begin = max(start, self._sent)
        self._sent = len(self._raw) if end is None else end
        return self._raw[begin : self._sent]

    def _text(self) -> str | None:
        """The arguments of a complete call as JSON of an object; None if they are something else."""
        if self._value is None:
            return "{}"
        text = self._raw[self._value[0] : self._value[1]]
        try:
            value = json.loads(text)
            if isinstance(value, str):
                text, value = value, json.loads(value)
        except (ValueError, RecursionError):
            return None
        return "{}" if value is None else text if isinstance(value, dict) else None

    def _step(self, c: str, at: int) -> None:
        if self._quoted:
            if self._escaped or c == "\\":
                self._escaped = not self._escaped
            elif c == '"':
                self._quoted = False
                if self._phase == "key":
                    self._key, self._phase = self._raw[self._start or 0 : at + 1][1:-1], "colon"
                elif self._depth == self._floor:
                    self._end_value(at + 1)
            return
        if c.isspace():
            return
        match self._phase:
            case "open":
                self._depth, self._phase, self.broken = 1, "key", c != "{"
            case "key" | "comma" if c == "}":
                self.done = True
            case "key":
                self._quoted, self._start, self.broken = True, at, c != '"'
            case "comma":
                self._phase, self.broken = "key", c != ","
            case "colon":
                self._phase, self._start, self.broken = "value", None, c != ":"
            case "value":
                self._read_value(c, at)

    def _read_value(self, c: str, at: int) -> None:
        if self._start is None:
            self._start = at
            if self._key in ("arguments", "parameters"):
                self._value = (at, None)
            if self._floor == 0 and c != "{":
                self.broken = True
        if c == '"':
            self._quoted = True
        elif c in "{[":
            self._depth += 1
        elif c in "}]":
            self._depth -= 1
            if self._depth == self._floor:
                self._end_value(at + 1)
            elif self._depth < self._floor:  # a number, true, false or null was the object's last value
                self._end_value(at)
                self.done = True
        elif c == "," and self._depth == self._floor:
            self._end_value(at)
            self._phase = "key"

    def _end_value(self, end: int) -> None:
        text = self._raw[self._start or 0 : end]
        if self._value is not None and self._value[1] is None:
            self._value = (self._value[0], end)
        if self._key == "name":
            try:
                name = json.loads(text)
            except ValueError:
                name = None
            self.name, self.broken = name, not isinstance(name, str)
        self._phase = "comma"
        self.done = self._floor == 0


def message_of(deltas: list[Delta]) -> AssistantMessage:
    """The whole message that deltas add up to."""
    content = "".join(d.get("content", "") for d in deltas)
    reasoning = "".join(d.get("reasoning", "") for d in deltas)
    calls: list[ToolCall] = []
    for delta in deltas:
        for part in delta.get("tool_calls", ()):
            if "id" in part:
                calls.append({"id": part["id"], "type": "function", "function": {**part["function"]}})
            else:
                calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
    message: AssistantMessage = {"role": "assistant", "content": None if calls and not content else content}
    if reasoning:
        message["reasoning"] = reasoning
    if calls:
        message["tool_calls"] = calls
    return message


def _said(text: str) -> list[Delta]:
    return [{"content": text}] if text else []


def _overlap(text: str, mark: str) -> int:
    """How many of the last characters of `text` may begin `mark`."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)

"""Text that may be sent while tokens still arrive: never half a character, never a piece of a stop string."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from fewbit.text.tokenizer import Detokenizer, Tokenizer


class TextStream:
    """Tokens in, sendable text out, until a stop string is complete.

    Of several stop strings the one that is complete first ends the text (the longest of those that end at the same
    character), so the result does not depend on how the text falls into tokens.

    Attributes:
        stopped: The stop string that ended the text; None while there is none.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
        after: Sequence[int] = (),
        visible: Collection[int] = (),
    ) -> None:
        """Start a stream.

        Args:
            tokenizer: Whose tokens will come.
            stop: Strings that end the text; an empty one is ignored.
            include_stop: Whether the stop string itself is part of the text.
            skip_special_tokens: Whether special tokens are left out of the text.
            min_tokens: Stop strings are looked for only in the text after this many tokens.
            after: The ids of a prompt whose text goes on; none for an answer that is a text of its own.
            visible: Special tokens that are text all the same.
        """
        self.stopped: str | None = None
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens, after, visible)
        self._stop = sorted((s for s in stop if s), key=len, reverse=True)
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._tokens = 0
        self._held = ""  # certain text that may be the beginning of a stop string

    def push(self, token_id: int) -> str:
        """Take a token; return the text that may be sent now. Nothing comes after a stop."""
        if self.stopped is not None:
            return ""
        self._tokens += 1
        new = self._detokenizer.push(token_id)
        if not self._stop:
            return new
        if self._tokens <= self._min_tokens:
            return self._release(new)
        self._held += new
        end = self._find(self._held)
        if end is None and (pending := self._detokenizer.peek()) and not pending.endswith("\ufffd"):
            # Whole characters may be held back because a later byte could spoil them. Ending here, they stand.
            end = self._find(self._held + pending)
        if end is not None:
            return self._cut(*end)
        keep = self._possible_start(self._held)
        return self._release(keep=keep)

    def finish(self) -> str:
        """The text still held back; the tokens are over."""
        if self.stopped is not None:
            return ""
        self._held += self._detokenizer.finish()
        if self._stop and self._tokens > self._min_tokens and (end := self._find(self._held)) is not None:
            return self._cut(*end)
        return self._release()

    def _release(self, new: str = "", keep: int = 0) -> str:
        text = self._held + new
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _find(self, text: str) -> tuple[str, str] | None:
        """The stop string that is complete first in `text`, and the text before it."""
        found = [(at + len(s), at, s) for s in self._stop if (at := text.find(s)) >= 0]
        if not found:
            return None
        _, at, stop = min(found)
        return stop, text[:at]

    def _cut(self, stop: str, before: str) -> str:
        self.stopped, self._held = stop, ""
        return before + stop if self._include_stop else before

    def _possible_start(self, text: str) -> int:
        """How many of the last characters of `text` might begin a stop string."""
        for n in range(min(len(self._stop[0]) - 1, len(text)), 0, -1):
            tail = text[-n:]
            if any(s.startswith(tail) for s in self._stop):
                return n
        return 0

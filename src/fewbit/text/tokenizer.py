"""A model's tokenizer, and text that grows token by token. What the tokens mean to a model is left to others."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import tokenizers

from fewbit.errors import CheckpointError, RequestError
from fewbit.text import pieces
from fewbit.text.chat import ChatTemplate
from fewbit.text.settings import TokenizerSettings, read_json, read_settings

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")  # how byte-fallback vocabularies spell one byte
_ROLES = ("system", "developer", "user", "assistant", "tool")  # of the turns of a chat
_UNFINISHED = "\ufffd"  # what a decoder writes for bytes that are no character (yet)


class Tokenizer:
    """Text to token ids and back, as the model's directory says.

    Attributes:
        bos_id: The id that opens a text, if the model knows one.
        eos_id: The tokenizer's own end-of-sequence id, if it has one.
        eos_ids: Every id that ends a text: the tokenizer's, and those of the model's configuration.
        special_ids: Ids that `decode` leaves out by default.
        special_tokens: The texts of special tokens by the names of their roles, as `eos_token`.
        vocab_size: Number of tokens, added ones included.
        chat_template: The template for messages; None for a model that only completes text.
    """

    def __init__(self, backend: tokenizers.Tokenizer, settings: TokenizerSettings, layout: dict[str, Any]) -> None:
        self._backend = backend
        backend.no_truncation()
        backend.no_padding()
        self._add_missing(settings)
        roles = {role: backend.token_to_id(text) for role, text in settings.roles.items()}
        self.special_tokens = dict(settings.roles)
        self.bos_id: int | None = roles.get("bos_token", settings.bos_id)
        self.eos_id: int | None = roles.get("eos_token")
        self.eos_ids = settings.eos_ids | ({self.eos_id} if self.eos_id is not None else set())
        if self.eos_id is None and self.eos_ids:
            self.eos_id = min(self.eos_ids)
        self._added = dict(backend.get_added_tokens_decoder())
        self.special_ids = frozenset(i for i, t in self._added.items() if t.special)
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.chat_template = ChatTemplate(settings.template, settings.roles) if settings.template else None
        self._byte_level = '"ByteLevel"' in json.dumps(layout.get("decoder"))

    @classmethod
    def load(cls, model_dir: Traversable) -> Tokenizer:
        """Open the tokenizer of a model directory.

        Args:
            model_dir: A directory, or what looks like one, with a tokenizer.json, or with a tokenizer.model from which
                one is made; the JSON files beside it are read where they exist.

        Raises:
            CheckpointError: tokenizer.json is missing or broken, or a file beside it is.
        """
        file = model_dir / "tokenizer.json"
        if not file.is_file() and (model_dir / pieces.MODEL).is_file():
            text = pieces.convert(model_dir)
            if isinstance(model_dir, Path):
                with contextlib.suppress(OSError):  # one that cannot be written to is converted every time
                    (model_dir / "tokenizer.json").write_text(text, "utf8")
            return cls(tokenizers.Tokenizer.from_str(text), read_settings(model_dir), json.loads(text))
        if not file.is_file():
            others = [n for n in ("vocab.json", "vocab.txt", "tekken.json") if (model_dir / n).is_file()]
            found = (
                f"it holds {others[0]}, which fewbit does not read" if others else "no other tokenizer file is there"
            )
            raise CheckpointError(
                f"{model_dir}: no tokenizer.json ({found}). Convert it once with transformers: "
                f"AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
            )
        layout = read_json(file)
        try:
            backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as e:  # the library raises a plain Exception
            raise CheckpointError(f"{file}: not a tokenizer that the tokenizers library can open ({e})") from e
        return cls(backend, read_settings(model_dir), layout)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens spelled out in the text count as such.

        Args:
            text: Any text that UTF-8 can say.
            add_special_tokens: Whether to open (and end) the ids as tokenizer.json's post-processor does
                (`add_bos_token` beside it is history); not for rendered chats, which spell them out.

        Raises:
            RequestError: `text` holds half of a surrogate pair.
        """
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise RequestError(
                f"the text holds a lone surrogate (U+{ord(text[e.start]):04X}) at character {e.start}, which no "
                "encoding can express; send whole characters"
            ) from e
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def token_id(self, text: str) -> int | None:
        """The id of the token that is spelled so in the vocabulary."""
        return self._backend.token_to_id(text)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; ids that no token has add nothing."""
        known = [i for i in ids if 0 <= i < 1 << 32]
        return str(self._backend.decode(known, skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for inside a text: a piece of a character is a piece of its bytes."""
        piece = self._backend.id_to_token(token_id)
        if piece is None:
            return b""
        if token_id in self._added:
            return str(piece).encode()
        if self._byte_level:
            return bytes(b for c in piece for b in _BYTE_OF.get(c, c.encode()))
        if byte := _BYTE_PIECE.fullmatch(piece):
            return bytes.fromhex(byte[1])
        return str(piece).replace("▁", " ").encode()

    @cached_property
    def special_texts(self) -> re.Pattern[str]:
        """Finds the special tokens that a text spells out, and whatever begins or ends texts."""
        return _any_of(self._special.values())

    def turn_texts(self, source: str, besides: Collection[str] = ()) -> re.Pattern[str]:
        """Finds those special tokens that may begin or end a turn of a chat.

        They begin or end texts, stand in the template, or name a role: templates put these together from the role.

        Args:
            source: Of the chat template.
            besides: Texts that count as none of these, though they stand there.
        """
        return _any_of(
            text
            for i, text in self._special.items()
            if self._bounds(i) or (text not in besides and (text in source or any(r in text for r in _ROLES)))
        )

    @cached_property
    def _special(self) -> dict[int, str]:
        return {i: t.content for i, t in self._added.items() if i in self.special_ids or self._bounds(i)}

    def _bounds(self, token: int) -> bool:
        """Whether it begins or ends texts."""
        return token == self.bos_id or token in self.eos_ids

    @cached_property
    def byte_ids(self) -> frozenset[int]:
        """Ids of byte-fallback tokens: several together make one character."""
        if self._byte_level:
            return frozenset()
        pieces = ((f"<0x{b:02X}>", self._backend.token_to_id(f"<0x{b:02X}>")) for b in range(256))
        return frozenset(i for _, i in pieces if i is not None)

    @cached_property
    def longest_token(self) -> int:
        """Characters in the longest token: a text of n characters has at least n / longest_token tokens."""
        return max((len(piece) for piece in self._backend.get_vocab(with_added_tokens=True)), default=1)

    def _add_missing(self, settings: TokenizerSettings) -> None:
        """Tokens that only the JSON files beside tokenizer.json know."""
        present = {t.content for t in self._backend.get_added_tokens_decoder().values()}
        for text, flags in settings.added.items():
            if text not in present:
                names = ("single_word", "lstrip", "rstrip", "normalized", "special")
                token = tokenizers.AddedToken(text, **{n: bool(flags[n]) for n in names if n in flags})
                self._backend.add_tokens([token])


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Finds any of these, the longer first."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


class Detokenizer:
    """Text of tokens that arrive one by one. Law: all that is given out, joined, is `decode` of all ids.

    A window of ids is decoded again with each token: the text that it added is new. The window starts at a token
    that has text of its own, since many decoders treat the first space of a text differently; for a text that goes
    on where a prompt ended, that is the prompt's last token.

    Args:
        tokenizer: Whose tokens will come.
        skip_special_tokens: Whether special tokens are left out of the text.
        after: The ids of the text that the tokens go on with; none for a text of its own.
        visible: Special tokens that are text all the same.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool = True,
        after: Sequence[int] = (),
        visible: Collection[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_ids - frozenset(visible) if skip_special_tokens else frozenset()
        self._window: list[int] = []
        self._sent = 0  # characters of the window's text that were given out
        if after and after[-1] not in tokenizer.special_ids | tokenizer.byte_ids:
            text = self._decode(after[-1:])
            if text and not text.endswith(_UNFINISHED):
                self._window, self._sent = [after[-1]], len(text)

    def push(self, token_id: int) -> str:
        """Take a token; return the text that is certain now, never half a character."""
        if token_id in self._hidden:
            return ""
        self._window.append(token_id)
        if token_id in self._tokenizer.byte_ids:  # a later byte may still spoil the whole run
            return ""
        text = self._decode(self._window)
        whole = not text.endswith(_UNFINISHED)
        new = self._take(text if whole else text[:-1])
        if whole:
            self._shorten()
        return new

    def peek(self) -> str:
        """What `finish` would return now."""
        return self._decode(self._window)[self._sent :]

    def finish(self) -> str:
        """The text that was held back; the stream is over."""
        return self._take(self._decode(self._window))

    def _take(self, text: str) -> str:
        new = text[self._sent :]
        self._sent = max(self._sent, len(text))
        return new

    def _shorten(self) -> None:
        """Forget ids that cannot matter any more; all text up to here is given out."""
        for n in range(1, min(4, len(self._window))):
            tail = self._window[-n:]
            if text := self._decode(tail):
                self._window, self._sent = tail, len(text)
                return

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def _byte_alphabet() -> Iterable[tuple[str, bytes]]:
    """The printable stand-in of each byte in byte-level vocabularies: itself where printable, else from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    yield from ((chr(b), bytes([b])) for b in printable)
    yield from ((chr(0x100 + i), bytes([b])) for i, b in enumerate(rest))


_BYTE_OF = dict(_byte_alphabet())

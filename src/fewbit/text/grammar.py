"""What an output has to look like, and which tokens may come next. The work is llguidance's. No torch.

A grammar travels as a text that `from_json_schema`, `from_regex`, `from_choices` or `from_lark` wrote. `compile` makes
a `Matcher` of it for one tokenizer, which follows one output. Whatever a stranger sends, that is an error in one line
or a grammar whose steps take milliseconds: the text, its depth, the parser's work and its states are limited, and a
grammar that was never seen is first compiled in a process of its own, under a limit of time and memory (`trial`).
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from fewbit.errors import RequestError
from fewbit.text.tokenizer import Tokenizer
from fewbit.text.trial import LIMITS, trial

if TYPE_CHECKING:
    import llguidance

MAX_CHARS = 1 << 20
MAX_DEPTH, MAX_VALUES = 128, 200_000  # of a JSON schema
MAX_CHOICES = 10_000
MAX_EBNF = 1 << 16  # characters; it is converted by code that takes its time
_PROTOTYPES = 64  # compiled grammars that are kept, for each tokenizer

JSON_STYLE = {
    "whitespace_flexible": False,  # else a small model may go on writing blanks for ever
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": True,
}
"""As Python writes it: one line, a blank after commas and colons. `oneOf` is taken as `anyOf`."""

_FREE = '\n%llguidance {"no_forcing": true}\n'
"""Where one text is forced, the model chooses the tokens that say it: many tokenizers cut it differently alone."""


# ---- grammars as texts ----


def from_json_schema(schema: dict[str, Any]) -> str:
    """A grammar of the JSON values that a schema allows, in `JSON_STYLE`.

    Raises:
        RequestError: it is no object, or nested too deeply. What is wrong inside is found out by `compile`.
    """
    if not isinstance(schema, dict):
        raise RequestError(f"a JSON schema is an object, got {type(schema).__name__}", "grammar")
    level: list[Any] = [schema]
    count = 0
    for _ in range(MAX_DEPTH):
        inner = [x.values() if isinstance(x, dict) else x for x in level if isinstance(x, dict | list)]
        count += sum(map(len, inner))
        if count > MAX_VALUES:
            raise RequestError(f"the JSON schema holds {count} values or more, {MAX_VALUES} at most", "grammar")
        level = [value for values in inner for value in values]
        if not level:
            return _written(f"start: %json {json.dumps({**schema, 'x-guidance': JSON_STYLE})}")
    raise RequestError(f"the JSON schema is nested more than {MAX_DEPTH} levels deep; use $defs and $ref", "grammar")


def any_json_object() -> str:
    """A grammar of all JSON objects."""
    return from_json_schema({"type": "object"})


def from_regex(pattern: str) -> str:
    """A grammar of the texts that a regular expression matches from end to end.

    The syntax is that of Rust's `regex`: no look-around and no back references; ``^`` and ``$`` at the ends are fine.

    Raises:
        RequestError: it is empty or no text. What is wrong inside is found out by `compile`.
    """
    if not isinstance(pattern, str) or not pattern:
        raise RequestError(f"a regular expression is a text of at least one character, got {pattern!r}", "grammar")
    inside = re.sub(r"\\.|/|\n", lambda m: {"/": "\\/", "\n": "\\n"}.get(m[0], m[0]), pattern, flags=re.DOTALL)
    return _written(f"start: /{inside}/")


def from_choices(choices: Sequence[str]) -> str:
    """A grammar of some given texts.

    Raises:
        RequestError: there are none, too many, or one of them is empty or no text.
    """
    if isinstance(choices, str) or not 1 <= len(choices) <= MAX_CHOICES:
        raise RequestError(f"a choice needs 1 to {MAX_CHOICES} texts, got {len(choices)}", "grammar")
    for index, text in enumerate(choices):
        if not isinstance(text, str) or not text:
            raise RequestError(f"choice[{index}] must be a text of at least one character, got {text!r}", "grammar")
    return from_regex("|".join(re.sub(r"[\\.+*?()|\[\]{}^$#&~-]", r"\\\g<0>", text) for text in choices))


def from_lark(text: str) -> str:
    """A grammar in the dialect of Lark that llguidance reads, whose first rule is ``start``.

    EBNF as llama.cpp writes it (GBNF: ``root ::= ...``) is converted.

    Raises:
        RequestError: it cannot be converted. What else is wrong is found out by `compile`.
    """
    if not isinstance(text, str) or not text.strip():
        raise RequestError("the grammar is empty", "grammar")
    if "::=" not in text:
        return _written(text)
    if len(text) > MAX_EBNF:
        raise RequestError(f"EBNF may have {MAX_EBNF} characters, got {len(text)}; write it in Lark", "grammar")
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return _written(any_to_lark(text))
    except Exception as fault:  # house: the library raises errors of its own, and recurses as deep as it is nested
        raise RequestError(f"the EBNF grammar cannot be converted: {_reason(str(fault))}", "grammar") from fault


def _written(lark: str) -> str:
    text = json.dumps({"grammars": [{"lark_grammar": lark + _FREE}]})
    if len(text) > MAX_CHARS:
        raise RequestError(f"the grammar takes {len(text)} characters, {MAX_CHARS} at most", "grammar")
    return text


# ---- following an output ----


class Matcher:
    """Follows one output token by token."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab: int, eos_ids: Collection[int]) -> None:
        self._matcher = matcher
        self._width = -(-vocab // 32) * 4
        self._eos = sum(1 << i for i in set(eos_ids) if 0 <= i < vocab)
        self._text = ((1 << vocab) - 1) & ~self._eos
        self._allowed: int | None = None  # bits of what may come next, without the ends

    def mask(self) -> bytes:
        """What may come next: bit ``i % 32`` of word ``i // 32`` for token i, words of four bytes, the low one first.

        The ids that end a text are allowed exactly where the grammar allows the end.

        Raises:
            RequestError: nothing may, or it takes too much to find out.
        """
        allowed = self._next()
        if self._matcher.is_accepting():
            allowed |= self._eos
        elif not allowed:
            raise RequestError(
                "the grammar cannot be satisfied: no token of this model can come next, and the end may not", "grammar"
            )
        return allowed.to_bytes(self._width, "little")

    def accept(self, token: int) -> None:
        """Take the next token of the output.

        Raises:
            RequestError: it is not allowed, or it takes too much to find out.
        """
        self._allowed = None
        if not self._matcher.consume_token(token):
            raise RequestError(f"the output left the grammar: {_reason(self._matcher.get_error())}", "grammar")

    @property
    def done(self) -> bool:
        """Whether the output is complete and nothing but its end can follow."""
        return bool(self._matcher.is_accepting()) and not self._next()

    def _next(self) -> int:
        if self._allowed is None:
            allowed = 0
            if not self._matcher.is_stopped():
                allowed = int.from_bytes(self._matcher.compute_bitmask(), "little")
            if self._matcher.is_error() and "NoExtensionBias" not in self._matcher.get_error():
                raise RequestError(f"the grammar cannot go on: {_reason(self._matcher.get_error())}", "grammar")
            self._allowed = allowed & self._text
        return self._allowed


class _Vocabulary:
    """A tokenizer as llguidance sees it, and what was compiled for it."""

    def __init__(self, tokenizer: Tokenizer, vocab: int) -> None:
        import llguidance

        tokens = [tokenizer.token_bytes(i) for i in range(vocab)]
        special = sorted(i for i in tokenizer.special_ids | tokenizer.eos_ids if i < vocab)

        class Wrapper:
            """One more token ends a text: which ids do so in the model is `Matcher`'s business."""

            eos_token_id, bos_token_id = vocab, None
            special_token_ids = (*special, vocab)
            is_tokenizer_wrapper = True

            def __init__(self) -> None:
                self.tokens = [*tokens, b"<end of text>"]

            def __call__(self, text: str) -> list[int]:
                return []  # what is forced would be cut into tokens, see `_FREE`

        wrapper: Any = Wrapper()
        self._vocabulary = llguidance.LLTokenizer(wrapper)
        self._prototypes: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, grammar: str) -> llguidance.LLMatcher:
        import llguidance

        with self._lock:
            found = self._prototypes.pop(grammar, None)
        if found is None:
            found = llguidance.LLMatcher(
                self._vocabulary, grammar, log_level=0, limits=llguidance.LLParserLimits(**LIMITS)
            )
        copy = found.deep_copy()
        with self._lock:
            self._prototypes[grammar] = found
            while len(self._prototypes) > _PROTOTYPES:
                self._prototypes.popitem(last=False)
        return copy


_vocabularies: WeakKeyDictionary[Tokenizer, dict[int, _Vocabulary]] = WeakKeyDictionary()
_lock = threading.Lock()


def compile(grammar: str, tokenizer: Tokenizer, vocab: int, eos_ids: Collection[int] | None = None) -> Matcher:
    """A matcher at the beginning of an output. May take a second; any thread may call it.

    Args:
        grammar: as the functions above write it.
        tokenizer: the model's.
        vocab: how many ids the model knows, which may be more than the tokenizer has.
        eos_ids: ids that end a text; None: the tokenizer's.

    Raises:
        RequestError: it is wrong, satisfied by nothing, or too complex.
    """
    if len(grammar) > MAX_CHARS:
        raise RequestError(f"the grammar takes {len(grammar)} characters, {MAX_CHARS} at most", "grammar")
    if wrong := trial(grammar):
        raise RequestError(f"the grammar cannot be used: {_reason(wrong)}", "grammar")
    with _lock:
        sizes = _vocabularies.setdefault(tokenizer, {})
        if vocab not in sizes:
            sizes[vocab] = _Vocabulary(tokenizer, vocab)
    matcher = sizes[vocab].matcher(grammar)
    if matcher.is_error():
        raise RequestError(f"the grammar cannot be used: {_reason(matcher.get_error())}", "grammar")
    made = Matcher(matcher, vocab, tokenizer.eos_ids if eos_ids is None else eos_ids)
    made.mask()
    return made


def _reason(text: str) -> str:
    """What llguidance says, in one line."""
    if remote := re.search(r"Resource '(.*?)' is not present in a registry", text):
        return f"the $ref to '{remote[1][:200]}' leads out of the schema, and nothing is fetched; put it into $defs"
    if "too many expressions" in text or "fuel" in text or "NoExtensionBias" in text:
        known = {"NoExtensionBias": "nothing satisfies it"}
        return next((words for key, words in known.items() if key in text), "it is too complex")
    text = re.sub(r"^at \S+: (failed to compile JSON schema: )", "", text)
    lines = [line.strip() for line in text.partition("<state>")[0].splitlines() if line.strip()]
    if inner := next((line for line in lines if line.startswith("error: ")), None):
        return f"invalid regular expression: {inner.removeprefix('error: ')}"
    return lines[0][:300] if lines else "it is invalid"

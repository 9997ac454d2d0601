"""Matchers for requests with a grammar. The tokenizer that they need is opened when the first one comes. No torch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from fewbit.errors import FewbitError, RequestError

if TYPE_CHECKING:
    from fewbit.text import Tokenizer
    from fewbit.text.grammar import Matcher


class Grammars:
    """Compiles grammars for one model. Any thread may ask, and may have to wait a second.

    Args:
        tokenizer: opens the model's tokenizer; None: it has none.
        vocab: how many ids the model knows.
        eos_ids: ids that end a text.
    """

    def __init__(self, tokenizer: Callable[[], Tokenizer] | None, vocab: int, eos_ids: Collection[int]) -> None:
        self._open, self._vocab, self._eos_ids = tokenizer, vocab, eos_ids
        self._tokenizer: Tokenizer | None = None
        self._lock = threading.Lock()

    def matcher(self, grammar: str) -> Matcher:
        """A matcher at the beginning of an output.

        Raises:
            RequestError: the grammar cannot be used, or there is no tokenizer.
        """
        from fewbit.text.grammar import compile

        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = self._opened()
        return compile(grammar, self._tokenizer, self._vocab, self._eos_ids)

    def _opened(self) -> Tokenizer:
        if self._open is None:
            raise RequestError("this engine was made without a tokenizer, and a grammar needs one", "grammar")
        try:
            return self._open()
        except FewbitError as error:
            raise RequestError(f"a grammar needs the model's tokenizer: {error}", "grammar") from error

"""Text to calibrate and to check on: the user's file, or the public-domain text shipped with fewbit."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from fewbit.errors import RecipeError
from fewbit.text.tokenizer import Tokenizer
from fewbit.text.windows import read_documents, windows

SHIPPED = "calibration.txt.gz"
CHECK_WINDOWS, CHECK_LENGTH = 2, 64
"""How much held-out text the logits of a finished checkpoint are compared on."""


def shipped_text() -> Path:
    """The public-domain text in the package (story books; see the model card of `storyteller`)."""
    return Path(str(importlib.resources.files("fewbit.compress") / SHIPPED))


def calibration_windows(path: Path | None, tokenizer: Tokenizer, samples: int, length: int) -> list[list[int]]:
    """`samples` windows of `length` token ids from a file, or from the shipped text.

    Raises:
        RecipeError: the file is missing, broken or empty, or holds fewer windows than asked for.
    """
    found = windows(read_documents(path or shipped_text()), tokenizer, length, samples)
    if len(found) < samples:
        raise RecipeError(
            f"{path or 'the shipped text'} holds {len(found)} windows of {length} tokens, asked for {samples}; "
            "give more text, or lower --samples or --length"
        )
    return found


def check_windows(tokenizer: Tokenizer | None, vocab: int) -> list[list[int]]:
    """Windows from the end of the shipped text, which calibration does not reach.

    Without a tokenizer the text's bytes, folded into the vocabulary, stand in for tokens.
    """
    (text,) = read_documents(shipped_text())
    assert isinstance(text, str)
    tail = text[-40_000:]
    if tokenizer is None:
        ids = [byte % vocab for byte in tail.encode()[: CHECK_WINDOWS * CHECK_LENGTH]]
        return [ids[i : i + CHECK_LENGTH] for i in range(0, len(ids), CHECK_LENGTH)]
    return windows([tail], tokenizer, CHECK_LENGTH, CHECK_WINDOWS)

"""Text to calibrate and to check on: the user's files, or the public-domain text shipped with fewbit."""

from __future__ import annotations

import hashlib
import importlib.resources
import random
from collections.abc import Sequence
from pathlib import Path

from fewbit.checkpoint import Checkpoint
from fewbit.compress.recipe import Calibration
from fewbit.errors import CheckpointError, RecipeError
from fewbit.text.arrow import saved_files
from fewbit.text.tokenizer import Tokenizer
from fewbit.text.windows import read_documents, windows

SHIPPED = "calibration.txt.gz"
CHECK_WINDOWS, CHECK_LENGTH = 2, 64
"""How much held-out text the logits of a finished checkpoint are compared on."""


def shipped_text() -> Path:
    """The public-domain text in the package (story books; see the model card of `storyteller`)."""
    return Path(str(importlib.resources.files("fewbit.compress") / SHIPPED))


def calibration_windows(calibration: Calibration, tokenizer: Tokenizer | None) -> list[list[int]]:
    """The windows of token ids that a recipe asks for, file by file in the order in which it names them.

    Raises:
        RecipeError: a file is missing, broken or empty, or holds fewer windows than asked for.
    """
    c, found = calibration, []
    for name, path, count in _files(c):
        if count == 0:
            raise RecipeError(f"the share of {name} is no window of {c.samples}; raise it, or --samples")
        some = windows(read_documents(path), tokenizer, c.length, None if c.seed else count)
        if len(some) < count:
            raise RecipeError(
                f"{name} holds {len(some)} windows of {c.length} tokens, asked for {count}; give more text, or lower "
                "--samples or --length"
            )
        found += random.Random(c.seed).sample(some, count) if c.seed else some
    return found


def _files(calibration: Calibration) -> list[tuple[str, Path, int]]:
    """Each file's name in words, where it is, and how many windows it gives."""
    if not calibration.data:
        return [("the shipped text", shipped_text(), calibration.samples)]
    counts = zip(calibration.data, calibration.counts(), strict=True)
    return [(str(source.path), source.path, count) for source, count in counts]


def windows_of(checkpoint: Checkpoint, calibration: Calibration | None) -> tuple[list[list[int]], list[list[int]]]:
    """Windows to calibrate on (none for None) and windows to check on.

    Raises:
        RecipeError, CheckpointError: the data are missing, too short, or not of this model's vocabulary or context.
    """
    tokenizer = None
    if "tokenizer.json" in checkpoint.files or (calibration and not _begin_with_ids(calibration)):
        tokenizer = Tokenizer.load(checkpoint.folder)
    vocab = checkpoint.spec.vocab
    held_out, found = check_windows(tokenizer, vocab), []
    if calibration:
        found = calibration_windows(calibration, tokenizer)
    if (largest := max(max(w) for w in (*found, *held_out))) >= vocab:
        raise CheckpointError(f"the data hold token {largest}, the model's vocabulary has {vocab}")
    if found and (longest := max(map(len, found))) > checkpoint.spec.context:
        raise RecipeError(f"windows of {longest} tokens exceed the model's {checkpoint.spec.context}; see --length")
    return found, held_out


def _begin_with_ids(calibration: Calibration) -> bool:
    """Whether every file seems to hold token ids, for which a model needs no tokenizer."""
    return all(isinstance(next(iter(read_documents(path)), None), list) for _, path, _ in _files(calibration))


def in_words(windows: Sequence[Sequence[int]], calibration: Calibration) -> str:
    """Which data were used, for a report."""
    shortest, longest = (f(map(len, windows)) for f in (min, max))
    tokens = f"{longest}" if shortest == longest else f"{shortest} to {longest}"
    return f"{len(windows)} windows of {tokens} tokens of {data_named(calibration)}"


def data_hash(calibration: Calibration) -> str:
    """SHA-256 of all files of calibration data, one after the other."""
    digest = hashlib.sha256()
    for _, path, _ in _files(calibration):
        for part in saved_files(path) if path.is_dir() else [path]:
            with part.open("rb") as file:
                while piece := file.read(1 << 20):
                    digest.update(piece)
    return digest.hexdigest()


def data_named(calibration: Calibration) -> str:
    """Where the data come from, in words."""
    if not calibration.data:
        return "public-domain stories shipped with fewbit"
    if len(calibration.data) == 1:
        return str(calibration.data[0].path)
    return ", ".join(f"{name} ({count})" for name, _, count in _files(calibration))


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

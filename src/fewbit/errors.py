"""What a user can be told: every error that a user, a file or a recipe can cause.

The command line prints such an error as one line and exits with 2 (3: `JournalError`); the server answers 400.
Anything else that escapes is a fault of ours. A message says what was given, what was expected and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FewbitError(Exception):
    """Base of all errors that are not fewbit's own fault."""


class RecipeError(FewbitError):
    """A recipe, or a setting of a command, that cannot be carried out."""


class JournalError(RecipeError):
    """Results that are kept and cannot be gone on with: another process adds to them, or they are of something else."""

    STATUS = 3
    """Exit status of a command, by which one that started it knows."""


class CheckpointError(FewbitError):
    """A model directory that is missing, damaged, incomplete or contradicts itself."""


class UnsupportedError(FewbitError):
    """Something well formed that fewbit (or the chosen target) cannot do."""


class RequestError(FewbitError):
    """A request to the engine or the server that cannot be honoured."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


def nearest_name(given: str, known: Iterable[str]) -> str:
    """The hint that ends an error about an unknown name: the nearest known one, or all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(names)}"

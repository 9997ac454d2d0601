"""A journal of results: a line for each as soon as it is known, so that a run that was stopped goes on."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fewbit.errors import JournalError

SCHEMA = 1
_MISSING = object()


class Journal:
    """A file of JSON lines. The first holds the settings, each other one a result with the fields that name it.

    A line is on the disk before `add` returns. A last line without its end, which a power cut leaves, is cut off, and
    its result is asked for again.

    Args:
        path: The file; its folder is made.
        settings: Everything that decides the results; a journal of others is refused.
        names: Fields of a line that name its result.
        option: With which a user gives another folder; said in errors.
        check: Raises a ValueError, KeyError or TypeError for a line that is no result.

    Raises:
        JournalError: The file is of other settings, no journal, damaged, in use elsewhere, or cannot be locked.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        names: tuple[str, ...],
        option: str = "-o",
        check: Callable[[Mapping[str, Any]], object] = lambda line: None,
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self._names, self._option, self._check = path, names, option, check
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            if isinstance(error, BlockingIOError):
                told = f"another fewbit writes to it; wait, or give this one its own {option}"
            else:
                told = f"cannot be locked ({error.strerror}); give a folder on another file system with {option}"
            raise JournalError(f"{path}: {told}") from None
        try:
            self._known = self._read(json.loads(json.dumps({"schema": SCHEMA, **settings})))
        except BaseException:
            self._file.close()
            raise

    def __len__(self) -> int:
        """How many results it holds."""
        return len(self._known)

    def find(self, *names: Any) -> dict[str, Any] | None:
        """The line of a result, by the values of its names; None: it is not known."""
        return self._known.get(names)

    def add(self, line: Mapping[str, Any]) -> dict[str, Any]:
        """Keep a result."""
        self._write(line)
        kept = self._known[tuple(line[name] for name in self._names)] = dict(line)
        return kept

    def close(self) -> None:
        """Let the file go."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _read(self, settings: Mapping[str, Any]) -> dict[tuple[Any, ...], dict[str, Any]]:
        self._file.seek(0)
        whole = self._file.read()
        complete = whole[: whole.rfind(b"\n") + 1]
        if not complete:
            if not _line({"settings": settings}).startswith(whole):  # what a power cut may leave of the first line
                raise self._foreign()
            self._file.truncate(0)
            self._write({"settings": settings})
            return {}
        first, *lines = complete.split(b"\n")[:-1]
        try:
            before = json.loads(first)["settings"].items()
        except (ValueError, KeyError, TypeError, AttributeError):
            raise self._foreign() from None
        self._check_same(dict(before), settings)
        found: dict[tuple[Any, ...], dict[str, Any]] = {}
        for number, text in enumerate(lines, 2):
            try:
                line = json.loads(text)
                self._check(line)
                found[tuple(line[name] for name in self._names)] = line
            except (ValueError, KeyError, TypeError, AttributeError):
                raise JournalError(f"{self.path}, line {number}: not a line of a journal; remove it") from None
        self._file.truncate(len(complete))
        return found

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(_line(line))
        self._file.flush()
        os.fsync(self._file.fileno())

    def _foreign(self) -> JournalError:
        return JournalError(f"{self.path}, line 1: not a line of a journal; give another {self._option}")

    def _check_same(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        for key in dict.fromkeys((*before, *now)):
            old, new = (settings.get(key, _MISSING) for settings in (before, now))
            if old != new:
                was, given = ("nothing" if value is _MISSING else json.dumps(value) for value in (old, new))
                raise JournalError(
                    f"{self.path} holds results with {key} {_short(was)}, now it is {_short(given)}; "
                    f"go on with the same settings, or give another {self._option}"
                )


def digest(value: Any) -> str:
    """A word for what JSON can say, for settings and names: 16 digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:117]}..."

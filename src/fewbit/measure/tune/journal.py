"""The journal of a search: a line for each finished measurement, so that a search that was stopped goes on."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fewbit.errors import RecipeError

SCHEMA = 1
_MISSING = object()


class Journal:
    """A file of JSON lines. The first holds the settings, each other one what one measurement of a candidate gave.

    A line is on the disk before the next measurement begins. A last line without its end, which a power cut leaves, is
    measured again.

    Args:
        path: the file; its folder is made.
        settings: everything that decides the figures and the order; a journal of others is refused.

    Raises:
        RecipeError: the file is of other settings, damaged, or in use by another process.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise RecipeError(
                f"{path}: another fewbit tune is at work in this folder; give this one its own --run"
            ) from None
        try:
            self._known = self._read(json.loads(json.dumps({"schema": SCHEMA, **settings})))
        except BaseException:
            self._file.close()
            raise

    def __len__(self) -> int:
        """How many measurements it holds."""
        return len(self._known)

    def find(self, candidate: str, stage: str) -> dict[str, Any] | None:
        """What a measurement gave; None: it is not finished."""
        return self._known.get((candidate, stage))

    def add(self, candidate: str, stage: str, found: Mapping[str, Any]) -> dict[str, Any]:
        """Keep what a measurement gave."""
        line = {"candidate": candidate, "stage": stage, **found}
        self._write(line)
        self._known[candidate, stage] = line
        return line

    def close(self) -> None:
        """Let the file go."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _read(self, settings: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
        self._file.seek(0)
        whole = self._file.read()
        complete = whole[: whole.rfind(b"\n") + 1]
        if len(complete) < len(whole):
            self._file.truncate(len(complete))
        lines = []
        for number, line in enumerate(complete.splitlines(), 1):
            try:
                lines.append(json.loads(line))
                _ = lines[-1]["settings"] if number == 1 else (lines[-1]["candidate"], lines[-1]["stage"])
            except (ValueError, KeyError, TypeError):
                raise RecipeError(f"{self.path}, line {number}: not a line of a journal; remove the folder") from None
        if not lines:
            self._write({"settings": settings})
            return {}
        _check_same(self.path, lines[0]["settings"], settings)
        return {(line["candidate"], line["stage"]): line for line in lines[1:]}

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _check_same(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for key in dict.fromkeys((*before, *now)):
        old, new = (settings.get(key, _MISSING) for settings in (before, now))
        if old != new:
            was, given = ("nothing" if value is _MISSING else json.dumps(value) for value in (old, new))
            raise RecipeError(
                f"{path.parent} holds a search with {key} {_short(was)}, now it is {_short(given)}; "
                "go on with the same settings, or give another --run"
            )


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:117]}..."

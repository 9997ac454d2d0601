"""A run's folder: one JSON file for each row, written when the row ends, so that a run that stops goes on later.

A row's file is named after what was measured and a hash of everything that decides it. It holds the object that the
command prints with ``--json``, so that what any command printed can be put beside it. A row that failed is a row, too:
its file says why.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewbit.checkpoint import Checkpoint
from fewbit.errors import FewbitError, RequestError
from fewbit.measure.journal import digest
from fewbit.measure.rows import file_hash
from fewbit.text import Tokenizer

SCHEMA = 1
"""Of the objects in the files; the same as of what commands print."""


@dataclass(frozen=True)
class Row:
    """One thing to be measured.

    Attributes:
        command: that measures it: ``bench offline``, ``eval``.
        name: for the file, to be read by people.
        key: everything that decides the figures, as JSON has it.
    """

    command: str
    name: str
    key: Mapping[str, Any]

    def __hash__(self) -> int:
        return hash(self.file)

    @property
    def file(self) -> str:
        """Its file in a folder."""
        return f"{_words(f'{self.command} {self.name}')}-{digest([self.command, self.key])[:10]}.json"


def _words(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]+", "-", text).strip("-")[:100]


class RunFolder:
    """The rows of one folder; several processes may use it at a time.

    Raises:
        RequestError: the folder cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(f"--run-dir {path}: cannot be made ({error.strerror}); name another folder") from None

    def read(self, row: Row) -> dict[str, Any] | None:
        """What is known of a row; None: it has not been measured.

        Raises:
            RequestError: its file is damaged.
        """
        file = self.path / row.file
        return read_object(file) if file.exists() else None

    def write(self, row: Row, found: Mapping[str, Any]) -> Path:
        """Keep what a row gave: see `write_object`."""
        file = self.path / row.file
        whole = {"schema": SCHEMA, "command": row.command, "key": row.key, **found}
        write_object(file, whole)
        return file

    def rows(self, command: str) -> Iterator[dict[str, Any]]:
        """The object of every row of a command.

        Raises:
            RequestError: a file is damaged.
        """
        return map(read_object, sorted(self.path.glob(f"{_words(command)}-*.json")))

    def forget(self, row: Row) -> None:
        """Let a row be measured again."""
        (self.path / row.file).unlink(missing_ok=True)


def write_object(file: Path, whole: Mapping[str, Any]) -> None:
    """Write a JSON object; readers see the whole file, or what was there before."""
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(whole, indent=1, default=str) + "\n", "utf8")
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        RequestError: there is none.
    """
    try:
        found = json.loads(file.read_text("utf8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"{file}: not JSON ({error}); remove it, and its row is measured again") from None
    if not isinstance(found, dict):
        raise RequestError(f"{file}: expected a JSON object; remove the file or take it out of the folder")
    return found


def identity(checkpoint: Checkpoint) -> str:
    """A word for what a model directory holds now: its config, its weights' names, sizes and times, its tokenizer.

    It keys rows and journals alike. The tokenizer of a model that is one file lies in that file.
    """
    files = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in map(Path, checkpoint.sources))
    beside, folder = {}, checkpoint.folder
    if isinstance(folder, Path):
        if "tokenizer.model" in checkpoint.files and "tokenizer.json" not in checkpoint.files:
            with suppress(FewbitError):  # opening it leaves a tokenizer.json there: let that be before the first row
                Tokenizer.load(folder)
        names = {*checkpoint.files, "tokenizer.json"}
        beside = {name: file_hash(folder / name) for name in names if (folder / name).is_file()}
    text = json.dumps([checkpoint.config, files, beside], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

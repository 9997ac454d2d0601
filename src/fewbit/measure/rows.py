"""Files of prompts and questions: JSON Lines, plain or gzipped, with every fault named by its line."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fewbit.errors import RecipeError


def read_text(path: Path) -> str:
    """A UTF-8 file, gzipped or not.

    Raises:
        RecipeError: It cannot be read.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return data.decode("utf8")
    except (OSError, EOFError, zlib.error) as error:
        raise RecipeError(f"{path}: cannot be read ({error})") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 at byte {error.start}") from None


def rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where a row stands, and the row, for each line of a .jsonl or .jsonl.gz that is not empty.

    Raises:
        RecipeError: The file cannot be read, a line is no JSON object, or there is none.
    """
    found = False
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where, found = f"{path} line {number}", True
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"{where}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise RecipeError(f"{where}: expected an object, found {type(row).__name__}")
        yield where, row
    if not found:
        raise RecipeError(f"{path}: holds no row")


def file_hash(path: Path) -> str:
    """SHA-256 of a file as it lies there."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

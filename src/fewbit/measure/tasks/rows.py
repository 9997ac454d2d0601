"""Rows of JSON Lines, plain or gzipped, with every fault named by its line."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

from fewbit.errors import RecipeError


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl or .jsonl.gz file.

    Raises:
        RecipeError: It is missing, empty, or a line is no JSON object.
    """
    rows = []
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    rows.append(_object(path, number, line))
    except FileNotFoundError as e:
        raise RecipeError(f"{path}: no such file") from e
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as e:
        raise RecipeError(f"{path}: not readable ({e})") from e
    if not rows:
        raise RecipeError(f"{path}: the file holds no rows")
    return rows


def fingerprint(path: Path) -> str:
    """The SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise RecipeError(f"{path}, line {number}: not JSON ({e})") from e
    if not isinstance(row, dict):
        raise RecipeError(f"{path}, line {number}: expected an object, got {type(row).__name__}")
    return row

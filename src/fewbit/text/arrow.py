"""The folder of a data set that Hugging Face's `datasets` saved to disk: a list of Arrow streams beside their names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fewbit.errors import RecipeError

COLUMNS = ("text", "messages", "ids")


def saved_files(path: Path) -> list[Path]:
    """The Arrow streams of a saved data set, in order.

    Raises:
        RecipeError: no such folder, or one with several splits.
    """
    if (path / "dataset_dict.json").is_file():
        splits = sorted(state.parent.name for state in path.glob("*/state.json"))
        raise RecipeError(f"{path} holds the splits {', '.join(splits)}; name one of them, as {path}/SPLIT")
    try:
        state = json.loads((path / "state.json").read_text("utf8"))
        return [path / str(file["filename"]) for file in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise RecipeError(f"{path}: expected a file, or the folder of a data set saved by `datasets`") from None


def saved_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows, each with the one column that fewbit reads.

    Raises:
        RecipeError: no such folder, several splits, no such column, or pyarrow is missing.
    """
    files = saved_files(path)
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise RecipeError(f"{path} is an Arrow data set: pip install 'fewbit[data]', or save it as .jsonl") from None
    return _rows(path, files)


def _rows(path: Path, files: list[Path]) -> Iterator[dict[str, Any]]:
    import pyarrow as pa

    for file in files:
        try:
            with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as stream:
                there = [name for name in COLUMNS if name in stream.schema.names]
                if len(there) != 1:
                    names = ", ".join(stream.schema.names)
                    raise RecipeError(f"{path}: expected one column of {', '.join(COLUMNS)}, got {names}")
                for batch in stream:
                    yield from ({there[0]: value} for value in batch.column(there[0]).to_pylist())
        except (OSError, pa.ArrowInvalid) as error:
            raise RecipeError(f"{file}: not readable ({error})") from error

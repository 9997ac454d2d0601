"""Which kernels a record was made with: a hash of everything under ``ops/`` that runs on a GPU."""

from __future__ import annotations

import hashlib
from pathlib import Path

OPS = Path(__file__).resolve().parent.parent / "src" / "fewbit" / "ops"


def ops_digest() -> str:
    """12 hexadecimal digits of the names and contents of all files of the operations, those for CPUs left out."""
    found = hashlib.sha256()
    for file in sorted(OPS.rglob("*")):
        if file.suffix in (".py", ".json") and not file.name.startswith("cpu") and file.parent.name != "cpu":
            found.update(file.relative_to(OPS).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return found.hexdigest()[:12]


if __name__ == "__main__":
    print(ops_digest())

"""What a GGUF file holds: metadata by key, and where each tensor lies. Versions 2 and 3, little-endian.

Layout: magic, version, count of tensors, count of keys; the keys with their typed values; for each tensor its name,
sizes (the fastest first), type and offset; padding; the tensors.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fewbit.errors import CheckpointError, UnsupportedError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9


@dataclass(frozen=True)
class Kind:
    """A type of tensor: so many numbers lie in so many bytes."""

    name: str
    numbers: int
    nbytes: int


KINDS = {
    0: Kind("F32", 1, 4), 1: Kind("F16", 1, 2), 30: Kind("BF16", 1, 2),
    2: Kind("Q4_0", 32, 18), 3: Kind("Q4_1", 32, 20), 6: Kind("Q5_0", 32, 22), 7: Kind("Q5_1", 32, 24),
    8: Kind("Q8_0", 32, 34),
    10: Kind("Q2_K", 256, 84), 11: Kind("Q3_K", 256, 110), 12: Kind("Q4_K", 256, 144), 13: Kind("Q5_K", 256, 176),
    14: Kind("Q6_K", 256, 210), 20: Kind("IQ4_NL", 32, 18), 23: Kind("IQ4_XS", 256, 136),
}  # fmt: skip
"""By their number in the file: those that are read."""


@dataclass(frozen=True)
class Raw:
    """One tensor: its type, its shape as everybody else writes it (the fastest last), its first byte in the file."""

    kind: Kind
    shape: tuple[int, ...]
    start: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, the last axis."""
        return self.shape[-1] // self.kind.numbers * self.kind.nbytes


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, Raw]]:
    """Metadata and tensors of a file.

    Raises:
        CheckpointError: it is no GGUF file, or a damaged one.
        UnsupportedError: another version, byte order, or a type of tensor that is not read.
    """
    with path.open("rb") as file:
        return _Header(path, file).read()


class _Header:
    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file, self.size = path, file, os.fstat(file.fileno()).st_size

    def read(self) -> tuple[dict[str, Any], dict[str, Raw]]:
        if self.file.read(4) != b"GGUF":
            raise CheckpointError(f"{self.path} is no GGUF file: it does not begin with 'GGUF'")
        (version,) = self.numbers("I", 1)
        if version not in (2, 3):
            raise UnsupportedError(f"{self.path}: GGUF version {version} is not supported; known: 2, 3, little-endian")
        tensors, keys = self.numbers("Q", 2)
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self.name()
            if key in metadata:
                raise CheckpointError(f"{self.path.name}: metadata '{key}' is there twice")
            metadata[key] = self.value(self.numbers("I", 1)[0])
        found = [self.tensor() for _ in range(tensors)]
        align = metadata.get("general.alignment", 32)
        if not isinstance(align, int) or align < 1:
            raise CheckpointError(f"{self.path.name}: general.alignment is {align!r}, expected a number of bytes")
        begin = -(-self.file.tell() // align) * align
        return metadata, self.placed(found, begin)

    def placed(self, found: list[tuple[str, Kind, tuple[int, ...], int]], begin: int) -> dict[str, Raw]:
        """The tensors by name, each inside the file and none over another."""
        placed: dict[str, Raw] = {}
        end = begin
        for name, kind, shape, offset in sorted(found, key=lambda item: item[3]):
            raw = Raw(kind, shape, begin + offset)
            if name in placed:
                raise CheckpointError(f"{self.path.name}: tensor '{name}' is there twice")
            if raw.start < end:
                raise CheckpointError(f"{self.path.name}: tensor '{name}' lies over another")
            end = raw.start + math.prod(shape[:-1]) * raw.row_bytes
            if end > self.size:
                raise CheckpointError(f"{self.path.name} ends inside tensor '{name}': the file is truncated")
            placed[name] = raw
        return placed

    def tensor(self) -> tuple[str, Kind, tuple[int, ...], int]:
        name = self.name()
        (axes,) = self.numbers("I", 1)
        if not 1 <= axes <= 4:
            raise CheckpointError(f"{self.path.name}: tensor '{name}' has {axes} axes, expected 1 to 4")
        shape = tuple(reversed(self.numbers("Q", axes)))
        number, offset = self.numbers("I", 1)[0], self.numbers("Q", 1)[0]
        if number not in KINDS:
            known = ", ".join(kind.name for kind in KINDS.values())
            raise UnsupportedError(f"{self.path.name}: tensor '{name}' is of GGML type {number}; known: {known}")
        kind = KINDS[number]
        if shape[-1] % kind.numbers:
            raise CheckpointError(
                f"{self.path.name}: '{name}' has rows of {shape[-1]}, no multiple of {kind.numbers} ({kind.name})"
            )
        return name, kind, shape, offset

    def numbers(self, code: str, count: int) -> tuple[Any, ...]:
        layout = f"<{count}{code}"
        if struct.calcsize(layout) > self.size:
            raise CheckpointError(f"{self.path.name} is damaged: it promises {count} numbers, more than it can hold")
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def string(self) -> str:
        (length,) = self.numbers("Q", 1)
        return self.take(length).decode("utf8", "replace")

    def name(self) -> str:
        text = self.string()
        if len(text) > 256 or not text.isprintable():
            raise CheckpointError(f"{self.path.name} is damaged: its header holds no names where names belong")
        return text

    def take(self, length: int) -> bytes:
        if length > self.size - self.file.tell():
            raise CheckpointError(f"{self.path.name} ends inside its header: the file is truncated or damaged")
        return self.file.read(length)

    def value(self, kind: int) -> Any:
        if kind == _FLOAT32:
            # the shortest number that is this float32: 1e-5 as config.json had it, not 9.99999974e-06
            return float(str(np.float32(self.numbers("f", 1)[0])))
        if kind in _SCALARS:
            return self.numbers(_SCALARS[kind], 1)[0]
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise CheckpointError(f"{self.path.name} is damaged: metadata of type {kind}")
        (of,), (count,) = self.numbers("I", 1), self.numbers("Q", 1)
        if of in _SCALARS:
            return list(self.numbers(_SCALARS[of], count))
        if of != _STRING:
            raise UnsupportedError(f"{self.path.name}: metadata in arrays of type {of} are not supported")
        return [self.string() for _ in range(count)]

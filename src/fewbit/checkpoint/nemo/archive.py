"""The members of a .nemo archive, or of the folder one was unpacked to: where their bytes lie, and how to read them."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path, PurePosixPath
from typing import IO, Any

from fewbit.errors import CheckpointError

CONFIG = "model_config.yaml"
_HASH = re.compile(r"^[0-9a-f]{32}_")
"""What NeMo puts before the name of a file that it packs."""


@dataclass(frozen=True)
class Member:
    """`size` bytes of `file` from `start`."""

    file: Path
    start: int
    size: int

    def read(self, start: int = 0, size: int | None = None) -> bytes:
        """All of it, or some.

        Raises:
            CheckpointError: the file ends early.
        """
        size = self.size - start if size is None else size
        with self.file.open("rb") as stream:
            stream.seek(self.start + start)
            data = stream.read(size)
        if len(data) != size or start + size > self.size:
            raise CheckpointError(f"{self.file.name} ends early: the file is truncated")
        return data


def is_archive(path: Path) -> bool:
    """Whether it is a .nemo file, or a folder that one was unpacked to."""
    return (path.is_file() and path.suffix == ".nemo") or (path / CONFIG).is_file()


def members_of(path: Path) -> dict[str, Member]:
    """Every file of an archive or folder by its name in there. Nothing but headers is read.

    Raises:
        CheckpointError: damaged, compressed, or a member that points outside of it.
    """
    if path.is_dir():
        found = {}
        for file in sorted(path.rglob("*")):
            if file.is_symlink():
                raise CheckpointError(f"{file} is a link; expected the files of an unpacked .nemo archive")
            if file.is_file():
                found[file.relative_to(path).as_posix()] = Member(file, 0, file.stat().st_size)
        return found
    with path.open("rb") as stream:
        if stream.read(2) == b"\x1f\x8b":
            raise CheckpointError(f"{path} is compressed; unpack it once: gunzip < {path.name} > plain.nemo")
    found = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                name = PurePosixPath(info.name)
                if name.is_absolute() or ".." in name.parts or "\\" in info.name:
                    raise CheckpointError(f"{path}: member '{info.name}' points outside of the archive")
                if info.isdir():
                    continue
                if not info.isreg():
                    raise CheckpointError(f"{path}: member '{info.name}' is a link or a device; expected files only")
                if name.as_posix() in found:
                    raise CheckpointError(f"{path}: member '{name}' is there twice")
                found[name.as_posix()] = Member(path, info.offset_data, info.size)
    except tarfile.TarError as error:
        raise CheckpointError(f"{path} is damaged or no .nemo archive ({error})") from None
    return found


class TokenizerFolder(Traversable):
    """The files of the tokenizer as if they lay in a folder of their own, without NeMo's hash before their names."""

    def __init__(self, path: Path, found: dict[str, Member]) -> None:
        self._path = path
        self._files = {}
        for name, member in found.items():
            plain = _HASH.sub("", PurePosixPath(name).name)
            if plain.endswith(".model"):
                plain = "tokenizer.model"  # its name is whatever it was trained under
            self._files[plain] = MemberPath(plain, member)

    @property
    def name(self) -> str:
        """Of the archive."""
        return self._path.name

    def iterdir(self) -> Iterator[Traversable]:
        """The files."""
        yield from self._files.values()

    def is_dir(self) -> bool:
        """It is."""
        return True

    def is_file(self) -> bool:
        """It is not."""
        return False

    def joinpath(self, *descendants: Any) -> Traversable:
        """One of the files, there or not."""
        name = "/".join(str(part) for part in descendants)
        return self._files.get(name) or MemberPath(name, None)

    __truediv__ = joinpath

    def open(self, *_: Any, **__: Any) -> Any:
        """A folder has no bytes."""
        raise IsADirectoryError(str(self._path))

    def read_bytes(self) -> bytes:
        """A folder has no bytes."""
        raise IsADirectoryError(str(self._path))

    def read_text(self, *_: Any, **__: Any) -> str:
        """A folder has no text."""
        raise IsADirectoryError(str(self._path))

    def __str__(self) -> str:
        return str(self._path)


class MemberPath(Traversable):
    """A file that lies in an archive; without a member it is not there."""

    def __init__(self, name: str, member: Member | None) -> None:
        self._name, self._member = name, member

    @property
    def name(self) -> str:
        """Of the file."""
        return self._name

    def is_file(self) -> bool:
        """Whether it is there."""
        return self._member is not None

    def is_dir(self) -> bool:
        """It is not."""
        return False

    def iterdir(self) -> Iterator[Traversable]:
        """It holds none."""
        return iter(())

    def joinpath(self, *descendants: Any) -> Traversable:
        """It holds none."""
        return MemberPath("/".join([self._name, *map(str, descendants)]), None)

    __truediv__ = joinpath

    def read_bytes(self) -> bytes:
        """Its bytes.

        Raises:
            FileNotFoundError: it is not there.
        """
        if self._member is None:
            raise FileNotFoundError(self._name)
        return self._member.read()

    def open(self, mode: str = "r", *_: Any, encoding: str | None = None, **__: Any) -> IO[Any]:
        """Its bytes or its text as a stream."""
        raw = io.BytesIO(self.read_bytes())
        return raw if "b" in mode else io.TextIOWrapper(raw, encoding=encoding or "utf8")

    def read_text(self, encoding: str | None = None, *_: Any) -> str:
        """Its text."""
        return self.read_bytes().decode(encoding or "utf8")

    def __str__(self) -> str:
        return self._name

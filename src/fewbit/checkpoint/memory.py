"""A folder of texts that lie in no directory: the tokenizer of a file that holds all of a model."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from importlib.resources.abc import Traversable
from typing import IO, Any

Make = Callable[[], str]


class MemoryFolder(Traversable):
    """A folder of texts, or one of them; each is made when it is read.

    Args:
        where: what it is called, for errors.
        texts: of a folder: texts by name.
        text: of a file: what makes it; None: there is no such file.
    """

    def __init__(self, where: str, texts: Mapping[str, Make] | None = None, text: Make | None = None) -> None:
        self._where, self._texts, self._text = where, texts, text

    @property
    def name(self) -> str:
        """Its last name."""
        return self._where.rpartition("/")[2]

    def __str__(self) -> str:
        return self._where

    def is_dir(self) -> bool:
        """Whether it is the folder."""
        return self._texts is not None

    def is_file(self) -> bool:
        """Whether it is a text that is there."""
        return self._text is not None

    def iterdir(self) -> Iterator[Traversable]:
        """All texts of a folder."""
        return (self.joinpath(name) for name in self._texts or ())

    def joinpath(self, *descendants: Any) -> Traversable:
        """One text, also one that is not there."""
        name = "/".join(map(str, descendants))
        return MemoryFolder(f"{self._where}/{name}", text=(self._texts or {}).get(name))

    def __truediv__(self, child: Any) -> Traversable:
        return self.joinpath(child)

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        """The text."""
        if self._text is None:
            raise FileNotFoundError(self._where)
        return self._text()

    def read_bytes(self) -> bytes:
        """The text in UTF-8."""
        return self.read_text().encode()

    def open(self, mode: str = "r", *args: Any, **kwargs: Any) -> IO[Any]:
        """The text as a stream, or its bytes with ``rb``."""
        return io.BytesIO(self.read_bytes()) if "b" in mode else io.StringIO(self.read_text())

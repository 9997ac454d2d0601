"""Directories of a model without its head, whose tensors lack what their family's names begin with (GPT-2's own)."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.checkpoint.files import CPU, Files
from fewbit.checkpoint.layout import Stored

_HEAD = "lm_head."


class Prefixed:
    """The same files, their tensors called as the family does; see `fewbit.checkpoint.files.Files`."""

    def __init__(self, files: Files, prefix: str) -> None:
        self.path: Path = files.path
        self.folder: Traversable = files.folder
        self.sources: tuple[Path, ...] = files.sources
        self.config: Mapping[str, Any] = files.config
        self._files, self._names = files, {_named(name, prefix): name for name in files.entries}
        self.entries: dict[str, Stored] = {mine: files.entries[theirs] for mine, theirs in self._names.items()}

    def read(self, name: str, device: torch.device = CPU) -> Tensor:
        """See `fewbit.checkpoint.files.Files.read`."""
        return self._files.read(self._names[name], device)


def _named(name: str, prefix: str) -> str:
    return name if name.startswith(_HEAD) else prefix + name


def with_prefix(files: Files, prefix: str) -> Files:
    """The files themselves where any name begins as the family's do, else `Prefixed`."""
    if not prefix or any(name.startswith(prefix) for name in files.entries):
        return files
    return Prefixed(files, prefix)

"""Safetensors files that are planned from shapes alone and filled in any order."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.checkpoint.files import DTYPES, INDEX, SINGLE, STAGE_BYTES
from fewbit.checkpoint.layout import Stored
from fewbit.errors import CheckpointError

SHARD_BYTES = 5 * 10**9
_HEADER_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class PlannedFiles:
    """Safetensors files whose headers are written before their tensors.

    Args:
        folder: where.
        groups: what goes into each file.
        metadata: strings for the header of each.
        called: the name under which a tensor stands in its file; all names here are different.

    Raises:
        CheckpointError: they would not fit on the disk.
    """

    def __init__(
        self,
        folder: Path,
        groups: Mapping[str, Mapping[str, Stored]],
        metadata: Mapping[str, str],
        called: Callable[[str], str] = lambda name: name,
    ) -> None:
        self.missing = {tensor for group in groups.values() for tensor in group}
        self._places: dict[str, tuple[int, int, Stored]] = {}  # file descriptor, offset
        self._files: list[int] = []
        self._parts: dict[str, dict[int, int]] = {}  # of each tensor: where parts begin, and their bytes
        _check_room(folder, groups)
        for name, group in groups.items():
            header: dict[str, Any] = {"__metadata__": dict(metadata)}
            offset = 0
            offsets = {}
            for tensor, stored in group.items():
                header[called(tensor)] = {
                    "dtype": _HEADER_NAMES[stored.dtype],
                    "shape": list(stored.shape),
                    "data_offsets": [offset, offset + stored.nbytes],
                }
                offsets[tensor] = offset
                offset += stored.nbytes
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 8)  # data starts aligned
            file = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644)
            self._files.append(file)
            _put(file, struct.pack("<Q", len(text)) + text, 0)
            os.truncate(file, 8 + len(text) + offset)
            for tensor, start in offsets.items():
                self._places[tensor] = file, 8 + len(text) + start, group[tensor]

    @property
    def written(self) -> set[str]:
        """Names of the tensors that are in their places."""
        return self._places.keys() - self.missing

    def sync(self) -> None:
        """Wait until everything is on the disk."""
        for file in self._files:
            os.fsync(file)

    def write(self, name: str, tensor: Tensor, at: int = 0, parts: int = 1) -> None:
        """Put one tensor in its place, or as number `at` of its `parts` along the first axis."""
        stored = self._places[name][2]
        if parts > 1:
            stored = Stored(stored.dtype, stored.shape[1:])
        if tensor.dtype != stored.dtype or tuple(tensor.shape) != stored.shape:
            raise AssertionError(f"{name}: planned {stored}, given {tensor.dtype} {tuple(tensor.shape)}")
        self.write_part(name, tensor, at * stored.nbytes)

    def write_part(self, name: str, part: Tensor, start: int) -> None:
        """Put a part of a tensor at a byte of its place; the tensor is there when as many bytes as it has were put."""
        file, offset, stored = self._places[name]
        if part.dtype != stored.dtype or start + part.nbytes > stored.nbytes:
            raise AssertionError(f"{name}: planned {stored}, given {part.dtype} {tuple(part.shape)} at byte {start}")
        offset += start
        raw = part.detach().contiguous().reshape(-1).view(torch.uint8)
        for piece in raw.split(STAGE_BYTES):
            if piece.device.type != "cpu":
                piece = torch.empty_like(piece, device="cpu", pin_memory=True).copy_(piece)
            _put(file, piece.numpy(), offset)
            offset += piece.nbytes
        put = self._parts.setdefault(name, {})
        put[start] = part.nbytes
        if sum(put.values()) == stored.nbytes:
            self.missing.discard(name)

    def finish(self) -> None:
        """Check that nothing is missing."""
        if self.missing:
            raise CheckpointError(f"tensor '{min(self.missing)}' was never written")

    def close(self) -> None:
        """Let go of the files."""
        for file in self._files:
            with contextlib.suppress(OSError):
                os.close(file)
        self._files = []


def _put(file: int, data: Any, offset: int) -> None:
    """Write all bytes of a buffer: a disk that is nearly full takes a part of them, and refuses only the rest."""
    rest = memoryview(data)
    while rest:
        done = os.pwrite(file, rest, offset)
        rest, offset = rest[done:], offset + done


def _check_room(folder: Path, groups: Mapping[str, Mapping[str, Stored]]) -> None:
    """Raise if the tensors, less what an earlier run has written of them, exceed what is free on the disk.

    The files are made with holes, which take nothing: without this the disk would be found too small at the end.
    """
    wanted = sum(stored.nbytes for group in groups.values() for stored in group.values())
    there = sum((folder / name).stat().st_blocks * 512 for name in groups if (folder / name).exists())
    disk = shutil.disk_usage(folder)
    if disk.total and wanted - there > disk.free:  # some file systems tell neither, and say 0
        raise CheckpointError(
            f"the disk of {folder.parent} is too full: the tensors take {wanted - there} bytes, {disk.free} are free; "
            "make room there, or choose another folder"
        )


class Shards(PlannedFiles):
    """The files of a Hugging Face directory: one, or several of at most `SHARD_BYTES` and an index of them."""

    def __init__(self, folder: Path, plan: Mapping[str, Stored], metadata: Mapping[str, str]) -> None:
        groups = _cut(plan)
        count = len(groups)
        names = [SINGLE] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
        super().__init__(folder, dict(zip(names, groups, strict=True)), metadata)
        if count > 1:
            weight_map = {tensor: name for name, group in zip(names, groups, strict=True) for tensor in group}
            size = sum(stored.nbytes for stored in plan.values())
            write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def _cut(plan: Mapping[str, Stored]) -> list[dict[str, Stored]]:
    """The plan in groups of at most `SHARD_BYTES`."""
    groups: list[dict[str, Stored]] = [{}]
    room = SHARD_BYTES
    for name, stored in plan.items():
        size = stored.nbytes
        if size > room and groups[-1]:
            groups.append({})
            room = SHARD_BYTES
        groups[-1][name] = stored
        room -= size
    return groups


def write_json(path: Path, value: Any) -> None:
    """A JSON file for people to read too."""
    path.write_text(json.dumps(value, indent=2) + "\n", "utf8")

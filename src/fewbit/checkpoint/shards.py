"""Safetensors files that are planned from shapes alone and filled in any order."""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.checkpoint.files import DTYPES, INDEX, SINGLE, STAGE_BYTES
from fewbit.checkpoint.layout import Stored
from fewbit.errors import CheckpointError

SHARD_BYTES = 5 * 10**9
_HEADER_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Shards:
    """Safetensors files whose headers are written before their tensors."""

    def __init__(self, folder: Path, plan: Mapping[str, Stored], metadata: Mapping[str, str]) -> None:
        self.missing = set(plan)
        self._places: dict[str, tuple[int, int, Stored]] = {}  # file descriptor, offset
        self._files: list[int] = []
        self._parts: dict[str, set[int]] = {}  # that were written of each tensor
        groups = _cut(plan)
        weight_map: dict[str, str] = {}
        for number, group in enumerate(groups, 1):
            name = SINGLE if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
            header: dict[str, Any] = {"__metadata__": dict(metadata)}
            offset = 0
            offsets = {}
            for tensor, stored in group.items():
                size = stored.nbytes
                header[tensor] = {
                    "dtype": _HEADER_NAMES[stored.dtype],
                    "shape": list(stored.shape),
                    "data_offsets": [offset, offset + size],
                }
                offsets[tensor] = offset
                offset += size
                weight_map[tensor] = name
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 8)  # data starts aligned
            file = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644)
            self._files.append(file)
            os.write(file, struct.pack("<Q", len(text)) + text)
            os.truncate(file, 8 + len(text) + offset)
            for tensor, start in offsets.items():
                self._places[tensor] = file, 8 + len(text) + start, group[tensor]
        if len(groups) > 1:
            size = sum(stored.nbytes for stored in plan.values())
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            write_json(folder / INDEX, index)

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
        file, offset, stored = self._places[name]
        if parts > 1:
            stored = Stored(stored.dtype, stored.shape[1:])
            offset += at * stored.nbytes
        if tensor.dtype != stored.dtype or tuple(tensor.shape) != stored.shape:
            raise AssertionError(f"{name}: planned {stored}, given {tensor.dtype} {tuple(tensor.shape)}")
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        for part in raw.split(STAGE_BYTES):
            if part.device.type != "cpu":
                part = torch.empty_like(part, device="cpu", pin_memory=True).copy_(part)
            data: Any = memoryview(part.numpy())
            while data:
                done = os.pwrite(file, data, offset)
                data, offset = data[done:], offset + done
        self._parts.setdefault(name, set()).add(at)
        if len(self._parts[name]) == parts:
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

"""A model on disk as a Hugging Face directory: what every source shows itself as, and the directory itself.

Large tensors are mapped, each by itself, small ones read; either is gone when its last user lets go, so walking through
a model costs the memory of what is held, not of the whole file (docs/adr/0009).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Protocol

import safetensors
import torch
from torch import Tensor

from fewbit.checkpoint.layout import Stored
from fewbit.errors import CheckpointError

CPU = torch.device("cpu")
STAGE_BYTES = 32 << 20
"""What goes between a file and a device at a time."""
MAPPED_BYTES = 1 << 20
"""From this size on a tensor is mapped: a map takes whole pages, and a process may have some ten thousand of them."""
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}
"""Names in a safetensors header to torch dtypes."""


class Files(Protocol):
    """A model on disk that presents itself as if it were a Hugging Face directory.

    Families, names and formats know nothing of the source: one of another kind says its config in the words of
    ``config.json``, and its tensors by the names and shapes that its architecture has there.
    """

    @property
    def path(self) -> Path:
        """What the user gave: a directory or a file."""
        ...

    @property
    def folder(self) -> Traversable:
        """Tokenizer, generation config, chat template: a directory, or what looks like one."""
        ...

    @property
    def sources(self) -> tuple[Path, ...]:
        """The files on disk that hold the weights."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json."""
        ...

    @property
    def entries(self) -> Mapping[str, Stored]:
        """The tensors by name, known without reading one."""
        ...

    def read(self, name: str, device: torch.device = ...) -> Tensor:
        """One tensor as its entry says, on a device; what is written into it goes nowhere else.

        Raises:
            CheckpointError: it cannot be read.
        """
        ...


@dataclass(frozen=True)
class Place:
    """Where one tensor lies: from byte `start` of `file`."""

    file: Path
    start: int


class View:
    """A source that shows the tensors of another in another way; its own `entries` and `read` say how."""

    def __init__(self, files: Files) -> None:
        self.path: Path = files.path
        self.folder: Traversable = files.folder
        self.sources: tuple[Path, ...] = files.sources
        self.config = files.config
        self._files = files


class ModelFiles:
    """A model directory's config.json and the table of its tensors. Opening reads headers only.

    Raises:
        CheckpointError: the directory, its config.json, its index or a shard is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path: Path = path
        self.folder: Traversable = path
        if not path.is_dir():
            raise CheckpointError(f"{path} is not a directory; expected a Hugging Face model directory")
        self.config = read_json(path / "config.json")
        self.entries: dict[str, Stored] = {}
        self.places: dict[str, Place] = {}
        shards = self._shards()
        self.sources: tuple[Path, ...] = tuple(shards)
        for file, promised in shards.items():
            found, places = read_header(file)
            if missing := sorted(promised - found.keys()):
                raise CheckpointError(f"{file.name} lacks tensor '{missing[0]}' that {INDEX} promises")
            if twice := sorted(found.keys() & self.entries.keys()):
                raise CheckpointError(f"tensor '{twice[0]}' is in {file.name} and in {self.places[twice[0]].file.name}")
            self.entries |= found
            self.places |= places

    def _shards(self) -> dict[Path, set[str]]:
        """Every safetensors file of the model, with the tensors that the index promises in it."""
        if (self.path / INDEX).exists():
            weight_map = read_json(self.path / INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f"{self.path / INDEX}: expected an object 'weight_map'")
            shards: dict[Path, set[str]] = {}
            for tensor, name in weight_map.items():
                # a name with a folder in it could point anywhere on this machine
                if not isinstance(name, str) or Path(name).name != name or "\\" in name or name[:1] in ("", "."):
                    raise CheckpointError(f"{INDEX} places '{tensor}' in {name!r}, outside of the model directory")
                shards.setdefault(self.path / name, set()).add(tensor)
            for file in shards:
                if not file.is_file():
                    raise CheckpointError(f"{file.name} is missing from {self.path}, though {INDEX} names it")
            return shards
        if (self.path / SINGLE).is_file():
            return {self.path / SINGLE: set()}
        loose = sorted(self.path.glob("*.safetensors"))
        if len(loose) == 1:
            return {loose[0]: set()}
        if loose:
            raise CheckpointError(f"{self.path} holds {len(loose)} safetensors files but no {INDEX} that orders them")
        pickles = sorted(p.name for p in self.path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if pickles:
            raise CheckpointError(
                f"{self.path} holds its weights as pickle ({pickles[0]}), which can run code when opened; convert it "
                "once with transformers: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT)"
            )
        raise CheckpointError(f"{self.path} holds no weights; expected {SINGLE} or {INDEX}")

    def read(self, name: str, device: torch.device = CPU) -> Tensor:
        """See `read_tensor`.

        Raises:
            CheckpointError: the file ends early.
        """
        place, stored = self.places[name], self.entries[name]
        return read_tensor(place.file, place.start, stored, name, device)

    def read_rows(self, name: str, start: int, stop: int, device: torch.device = CPU) -> Tensor:
        """Of one tensor, entries `start` to `stop` of its first axis."""
        place, stored = self.places[name], self.entries[name]
        rows = Stored(stored.dtype, (stop - start, *stored.shape[1:]))
        return read_tensor(place.file, place.start + start * stored.nbytes // stored.shape[0], rows, name, device)


def read_rows(files: Files, name: str, start: int, stop: int, device: torch.device = CPU) -> Tensor:
    """Entries `start` to `stop` of the first axis of a tensor; where they can be read alone nothing else is."""
    if isinstance(files, ModelFiles):
        return files.read_rows(name, start, stop, device)
    return files.read(name, device)[start:stop].clone()


def read_tensor(path: Path, start: int, stored: Stored, name: str, device: torch.device = CPU) -> Tensor:
    """The tensor that lies from byte `start` of a file, on a device.

    On a CPU a large one is mapped: its pages are the system's, shared with other processes until somebody writes into
    them, which the file does not see.

    Raises:
        CheckpointError: the file ends early.
    """
    end = start + stored.nbytes
    if path.stat().st_size < end:  # beyond the end a map has no pages: touching them would end the process
        raise CheckpointError(f"{path.name} ends inside tensor '{name}': the file is truncated")
    if device.type == "cpu" and stored.nbytes >= MAPPED_BYTES and not start % stored.dtype.itemsize:
        with suppress(RuntimeError):  # a file system that cannot map, or no room for one more: then it is read
            whole = torch.from_file(str(path), shared=False, size=end, dtype=torch.uint8)
            return whole[start:].view(stored.dtype).view(stored.shape)
    made = torch.empty(stored.nbytes, dtype=torch.uint8, device=device)
    with path.open("rb") as file:
        file.seek(start)
        for part in made.split(STAGE_BYTES):
            # to a GPU through pinned memory: several times as fast
            here = part if device.type == "cpu" else torch.empty_like(part, device="cpu", pin_memory=True)
            raw: Any = here.numpy()
            if file.readinto(raw) != len(part):
                raise CheckpointError(f"{path.name} ends inside tensor '{name}': the file is truncated")
            if here is not part:
                part.copy_(here)
    return made.view(stored.dtype).view(stored.shape)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: no such file, or no JSON object in it.
    """
    try:
        value = json.loads(path.read_text("utf8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}; expected a Hugging Face model directory") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, expected a JSON object")
    return value


def read_header(file: Path) -> tuple[dict[str, Stored], dict[str, Place]]:
    """The tensors of a safetensors file and where they lie. The library checks that offsets fit each other.

    Raises:
        CheckpointError: the file is damaged, or holds a dtype that is not known.
    """
    try:
        with safetensors.safe_open(file, framework="pt"):
            pass
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header: Mapping[str, Any] = json.loads(stream.read(length))
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{file.name} is damaged or truncated ({error}); copy or download it again") from None
    entries, places = {}, {}
    for name, facts in header.items():
        if name == "__metadata__":
            continue
        if facts["dtype"] not in DTYPES:
            raise CheckpointError(
                f"{file.name}: tensor '{name}' has dtype {facts['dtype']}, which fewbit does not read"
            )
        entries[name] = Stored(DTYPES[facts["dtype"]], tuple(facts["shape"]))
        places[name] = Place(file, 8 + length + facts["data_offsets"][0])
    return entries, places

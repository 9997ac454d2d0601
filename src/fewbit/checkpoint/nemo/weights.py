"""Tensors in torch's own files, found without executing what their pickles say.

A file of ``torch.save`` is looked at with fake tensors, which tell where in the file their bytes lie. A distributed
checkpoint of ``torch.distributed.checkpoint`` has a pickled table of contents: it is read by an unpickler that knows
the few records of such tables and refuses everything else.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from fewbit.checkpoint.files import read_tensor
from fewbit.checkpoint.layout import Stored
from fewbit.checkpoint.nemo.archive import Member
from fewbit.errors import CheckpointError, UnsupportedError


class Weights(Protocol):
    """Tensors by name."""

    entries: dict[str, Stored]

    def read(self, name: str, at: int | None = None) -> Tensor:
        """One of them, or number `at` along its first axis, on the CPU.

        Raises:
            CheckpointError: it cannot be read.
        """
        ...


class TorchFile:
    """A file of ``torch.save`` that holds a dict of tensors; what else is in it is left alone.

    Raises:
        CheckpointError: damaged, too old, or it would need code to be run.
    """

    def __init__(self, member: Member, name: str) -> None:
        self._member = member
        self.entries: dict[str, Stored] = {}
        self._starts: dict[str, int] = {}
        for key, tensor in _fake_tensors(member, name).items():
            start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
            if start is None or not tensor.is_contiguous():
                raise CheckpointError(f"{name}: tensor '{key}' does not lie in one piece")
            self.entries[key] = Stored(tensor.dtype, tuple(tensor.shape))
            self._starts[key] = start + tensor.storage_offset() * tensor.itemsize

    def read(self, name: str, at: int | None = None) -> Tensor:
        """See `Weights`."""
        start, stored = self._member.start + self._starts[name], self.entries[name]
        if at is not None:
            stored = Stored(stored.dtype, stored.shape[1:])
            start += at * stored.nbytes
        return read_tensor(self._member.file, start, stored, name)


def _fake_tensors(member: Member, name: str) -> dict[str, Tensor]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with member.file.open("rb") as file:
        window: Any = _Window(file, member)
        if not zipfile.is_zipfile(window):
            raise CheckpointError(f"{name} is no file of torch.save, or of a torch before 1.6; save it again")
        window.seek(0)
        try:
            with FakeTensorMode(), torch.serialization.safe_globals([io.BytesIO]):
                found = torch.load(window, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, ValueError, KeyError, EOFError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"{name} is damaged or would need code to be run: {first}") from None
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{name} holds {type(found).__name__}, expected a dict of tensors")
    return {key: value for key, value in found.items() if isinstance(key, str) and isinstance(value, Tensor)}


class _Window(io.RawIOBase):
    """A member of an archive as a file."""

    def __init__(self, file: Any, member: Member) -> None:
        self._file, self._member, self._at = file, member, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._member.size}[whence] + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self._member.size - self._at))
        self._file.seek(self._member.start + self._at)
        data = self._file.read(size)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


_KNOWN = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "StorageMeta"},
    "torch.distributed.checkpoint._fsspec_filesystem": {"StorageMeta"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath"},
    "builtins": {"set"},
}  # fmt: skip
"""The records of a table of contents: modules and the names in them that may be called for."""


class _TableUnpickler(pickle.Unpickler):
    """Makes the records of a table of contents and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _KNOWN.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        raise CheckpointError(f".metadata asks for {module}.{name}, which a table of contents has no use for")


@dataclass(frozen=True)
class _Chunk:
    """A piece of a tensor: where it begins in the tensor, and where its bytes lie."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    member: Member
    start: int
    size: int


class Distributed:
    """A distributed checkpoint of torch's own kind (``torch_dist``).

    Args:
        found: all members by name.
        folder: the folder of the checkpoint among them, with a slash at its end.

    Raises:
        CheckpointError: the table of contents is missing, damaged, or asks for code; or a file is missing.
        UnsupportedError: another kind of distributed checkpoint.
    """

    def __init__(self, found: Mapping[str, Member], folder: str) -> None:
        if f"{folder}.metadata" not in found:
            kind = "zarr" if any(name.endswith(".zarray") for name in found) else "unknown"
            raise UnsupportedError(
                f"the weights in {folder} are a distributed checkpoint of the {kind} kind; only torch_dist is read: "
                "save the model again with dist_ckpt_format=torch_dist"
            )
        try:
            table: Any = _TableUnpickler(io.BytesIO(found[f"{folder}.metadata"].read())).load()
            contents = dict(table.state_dict_metadata)
            places = dict(table.storage_data)
        except (pickle.UnpicklingError, AttributeError, EOFError, IndexError, TypeError, ValueError) as error:
            raise CheckpointError(f"{folder}.metadata is damaged: {type(error).__name__}: {error}") from None
        self.entries: dict[str, Stored] = {}
        self._chunks: dict[str, list[_Chunk]] = {}
        sizes: dict[tuple[str, tuple[int, ...]], tuple[int, ...]] = {}
        for name, words in contents.items():
            if hasattr(words, "chunks"):
                self.entries[name] = Stored(words.properties.dtype, tuple(words.size))
                sizes |= {(name, tuple(c.offsets)): tuple(c.sizes) for c in words.chunks}
        for index, place in places.items():
            if index.fqn in self.entries:
                file = f"{folder}{place.relative_path}"
                if file not in found:
                    raise CheckpointError(f"'{file}' is missing, though {folder}.metadata names it")
                begin = tuple(index.offset or ())
                chunk = _Chunk(begin, sizes.get((index.fqn, begin), ()), found[file], place.offset, place.length)
                self._chunks.setdefault(index.fqn, []).append(chunk)

    def read(self, name: str, at: int | None = None) -> Tensor:
        """See `Weights`."""
        stored = self.entries[name]
        first, shape = (0, stored.shape) if at is None else (at, (1, *stored.shape[1:]))
        whole, filled = torch.empty(shape, dtype=stored.dtype), 0
        for chunk in self._chunks.get(name, []):
            if at is not None and not chunk.offsets[0] <= at < chunk.offsets[0] + chunk.sizes[0]:
                continue
            piece, offsets = self._load(name, chunk, stored), chunk.offsets
            if at is not None:
                piece, offsets = piece.narrow(0, at - chunk.offsets[0], 1), (first, *chunk.offsets[1:])
            target = whole
            for axis, (start, size) in enumerate(zip(offsets, piece.shape, strict=True)):
                target = target.narrow(axis, start - first if axis == 0 else start, size)
            target.copy_(piece)
            filled += piece.numel()
        if filled != whole.numel():
            raise CheckpointError(f"'{name}' lacks pieces: {filled} of {whole.numel()} numbers are there")
        return whole if at is None else whole[0]

    @staticmethod
    def _load(name: str, chunk: _Chunk, stored: Stored) -> Tensor:
        """One piece of a tensor."""
        raw = io.BytesIO(chunk.member.read(chunk.start, chunk.size))
        try:
            piece = torch.load(raw, weights_only=True, map_location="cpu")
        except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
            raise CheckpointError(f"'{name}' is damaged: {str(error).splitlines()[0]}") from None
        if not isinstance(piece, Tensor) or piece.dtype != stored.dtype or tuple(piece.shape) != chunk.sizes:
            raise CheckpointError(f"'{name}' is not what .metadata says: {stored.dtype} {list(chunk.sizes)}")
        ends = [start + size for start, size in zip(chunk.offsets, chunk.sizes, strict=True)]
        if any(end > size for end, size in zip(ends, stored.shape, strict=True)):
            raise CheckpointError(f"'{name}' has a piece that reaches beyond its shape {list(stored.shape)}")
        return piece


def weights_of(found: Mapping[str, Member], where: str) -> Weights:
    """The weights of an archive, of whichever kind they are.

    Raises:
        CheckpointError, UnsupportedError: none, or of a kind that is not read.
    """
    single = [name for name in found if name.rsplit("/", 1)[-1] in ("model_weights.ckpt", "model_weights.pt")]
    if len(single) > 1:
        raise UnsupportedError(
            f"{where} is split over {len(single)} ranks ({single[0]}, ...); merge it with NeMo first"
        )
    if single:
        return cast("Weights", TorchFile(found[single[0]], single[0]))
    folders = {
        name[: name.index("model_weights/") + len("model_weights/")] for name in found if "model_weights/" in name
    }
    if folders:
        return cast("Weights", Distributed(found, min(folders)))
    raise CheckpointError(f"{where} holds no weights; expected model_weights.ckpt or a folder model_weights")

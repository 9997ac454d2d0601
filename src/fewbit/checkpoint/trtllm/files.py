"""A TensorRT-LLM checkpoint shown as a Hugging Face directory: ranks merged, fused linears apart.

Tensors get the names of Model Optimizer's Hugging Face layout. A tensor is read piece by piece from where it lies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.checkpoint.files import CPU, Place, read_header, read_json, read_tensor
from fewbit.checkpoint.formats import hf
from fewbit.checkpoint.layout import Shape, Stored
from fewbit.checkpoint.names import Names
from fewbit.checkpoint.trtllm.config import QUANT_CFG, hf_config, parallel_of, quantization_of
from fewbit.checkpoint.trtllm.modules import LEAVES, PER_CHANNEL, ROWS, Module, axes, modules
from fewbit.errors import CheckpointError
from fewbit.spec.families import family_of
from fewbit.spec.hfconfig import HFConfig

INNER = "trtllm_ckpt"
"""Where the checkpoint lies in a folder for NIM, beside the original config.json and the tokenizer."""


def is_checkpoint(path: Path) -> bool:
    """Whether a TensorRT-LLM checkpoint lies there, by itself or in a folder for NIM."""
    return (path / "rank0.safetensors").is_file() or (path / INNER / "rank0.safetensors").is_file()


@dataclass(frozen=True)
class _Spot:
    """Where a member's tensor lies in its module's."""

    key: str  # the tensor's name in the files
    module: Module
    leaf: str
    member: int
    stored: Stored  # of the member, merged


class TrtFiles:
    """See `fewbit.checkpoint.files.Files`. Opening reads headers only.

    Raises:
        CheckpointError: config.json or a rank is missing, damaged, or contradicts another.
        UnsupportedError: an architecture or a way to split it that is not known.
    """

    def __init__(self, path: Path) -> None:
        self.path: Path = path
        self.folder: Traversable = path
        inner = (path / INNER).is_dir()
        root = path / INNER if inner else path
        config = read_json(root / "config.json")
        beside = read_json(path / "config.json") if inner and (path / "config.json").is_file() else None
        self._parallel = parallel_of(config)
        world = self._parallel.tp * self._parallel.pp
        self.sources: tuple[Path, ...] = tuple(root / f"rank{rank}.safetensors" for rank in range(world))
        for file in self.sources:
            if not file.is_file():
                raise CheckpointError(f"{file.name} is missing from {root}, of which config.json promises {world}")
        self._ranks: list[tuple[dict[str, Stored], dict[str, Place]]] = [read_header(f) for f in self.sources]
        first = self._ranks[0][0]
        biases = {n: f"transformer.layers.0.{m}.bias" in first for n, m in (("qkv", "attention.qkv"), ("fc", "mlp.fc"))}
        self.config: dict[str, Any] = hf_config(config, beside, biases)
        family = family_of(self.config)
        spec = family.read(HFConfig(self.config))
        mixed = read_json(root / QUANT_CFG) if (root / QUANT_CFG).is_file() else None
        said = quantization_of(config, mixed, spec)
        self.config["quantization_config"] = said
        self._words: dict[str, dict[str, Any]] = said["linears"]
        self._vocab = spec.vocab
        self._names = Names(family, spec)
        self.entries: dict[str, Stored] = {}
        self._spots: dict[str, _Spot] = {}
        self._caches: dict[str, tuple[int, str]] = {}
        self._used: set[tuple[int, str]] = set()
        for module in modules(spec, self._parallel):
            self._find(module)
        for layer in range(len(spec.layers)):
            self._find_caches(layer, len(spec.layers))
        for rank, (entries, _) in enumerate(self._ranks):
            for key in sorted(entries.keys() - {key for r, key in self._used if r == rank}):
                self.entries[f"{self.sources[rank].name}: {key}"] = entries[key]  # which nothing will ask for

    def _stage(self, stage: int) -> range:
        """The ranks of a pipeline stage."""
        return range(stage * self._parallel.tp, (stage + 1) * self._parallel.tp)

    def _find(self, module: Module) -> None:
        """Make an entry for every tensor of every member."""
        for leaf, theirs in LEAVES.items():
            keys = [f"{module.name}.{name}" for name in (theirs, *([PER_CHANNEL] if leaf == "weight_scale" else []))]
            ranks = self._stage(module.stage)
            key = next((key for key in keys if any(key in self._ranks[rank][0] for rank in ranks)), None)
            if key is None:
                continue
            for rank in ranks:
                if key not in self._ranks[rank][0]:
                    raise CheckpointError(f"{self.sources[rank].name} lacks tensor '{key}', which other ranks have")
                self._used.add((rank, key))
            for index, member in enumerate(module.members):
                stored = self._merged(module, leaf, key, index)
                if leaf == "weight" and str(self._words.get(member, {}).get("quant_algo")).startswith("W4"):
                    stored = Stored(torch.uint8, stored.shape) if stored.dtype == torch.int8 else stored
                name = f"{self._names.module(member)}.{leaf}"
                self.entries[name] = stored
                self._spots[name] = _Spot(key, module, leaf, index, stored)

    def _piece(self, module: Module, leaf: str, key: str, member: int, rank: int) -> tuple[int, Stored]:
        """Where a member's part of one rank's tensor begins, in bytes, and what it is."""
        whole = self._ranks[rank][0][key]
        shape, start = whole.shape, 0
        if module.expert is not None and leaf != "input_scale":
            if not shape or shape[0] != module.experts:
                raise CheckpointError(
                    f"tensor '{key}' has shape {list(shape)}, expected {module.experts} experts first"
                )
            start, shape = module.expert * math.prod(shape[1:]) * whole.dtype.itemsize, shape[1:]
        if leaf in ("input_scale", "weight_scale_2") or (leaf == "weight_scale" and math.prod(shape) == 1):
            if math.prod(shape) != 1:
                raise CheckpointError(f"tensor '{key}' has shape {list(whole.shape)}, expected one number")
            return start, Stored(whole.dtype, ())
        if ROWS in axes(leaf, len(shape)) and len(module.members) > 1:
            total, rows = sum(module.rows), shape[0]
            before = sum(module.rows[:member])
            if rows * before % total or rows * module.rows[member] % total:
                raise CheckpointError(
                    f"tensor '{key}' has {rows} rows, which {len(module.members)} linears cannot share"
                )
            start += rows * before // total * math.prod(shape[1:]) * whole.dtype.itemsize
            shape = (rows * module.rows[member] // total, *shape[1:])
        return start, Stored(whole.dtype, shape)

    def _merged(self, module: Module, leaf: str, key: str, member: int) -> Stored:
        """A member's tensor with the parts of all ranks."""
        parts = [self._piece(module, leaf, key, member, rank)[1] for rank in self._stage(module.stage)]
        if any(part != parts[0] for part in parts):
            raise CheckpointError(f"tensor '{key}' differs in shape or dtype from rank to rank")
        shape, axis = parts[0].shape, self._split(module, leaf, parts[0].shape)
        if axis is None:
            return parts[0]
        size = shape[axis] * len(parts)
        if module.members[0] in ("embed", "lm_head") and axis == 0 and self._vocab < size < self._vocab + len(parts):
            size = self._vocab  # filled up to divide over the ranks
        return Stored(parts[0].dtype, (*shape[:axis], size, *shape[axis + 1 :]))

    @staticmethod
    def _split(module: Module, leaf: str, shape: Shape) -> int | None:
        """The axis that ranks cut, if they do."""
        kinds = axes(leaf, len(shape))
        return kinds.index(module.split) if module.split in kinds else None

    def _find_caches(self, layer: int, layers: int) -> None:
        """The scales of K and V: of each, or in older files one for both."""
        stage = self._parallel.stage(layer, layers)
        prefix = f"transformer.layers.{layer - stage * (layers // self._parallel.pp)}.attention"
        rank = self._stage(stage)[0]
        found = self._ranks[rank][0]
        for which, name in zip("kv", hf.kv_scale_names(layer, self._names), strict=True):
            own, both = f"{prefix}.{which}_cache_scaling_factor", f"{prefix}.kv_cache_scaling_factor"
            key = own if own in found else both
            if key not in found:
                continue
            if math.prod(found[key].shape) != 1:
                raise CheckpointError(f"tensor '{key}' has shape {list(found[key].shape)}, expected one number")
            self._used |= {(r, k) for r in self._stage(stage) for k in (own, both)}
            self.entries[name] = Stored(found[key].dtype, ())
            self._caches[name] = rank, key

    def read(self, name: str, device: torch.device = CPU) -> Tensor:
        """One tensor, merged from all ranks; see `fewbit.checkpoint.files.Files`.

        Raises:
            CheckpointError: a file ends early, or ranks disagree about what they all hold.
        """
        if name in self._caches:
            rank, key = self._caches[name]
            return self._read(rank, key, 0, self.entries[name], device)
        spot = self._spots[name]
        parts = []
        for rank in self._stage(spot.module.stage):
            start, stored = self._piece(spot.module, spot.leaf, spot.key, spot.member, rank)
            parts.append(self._read(rank, spot.key, start, stored, device))
        axis = self._split(spot.module, spot.leaf, parts[0].shape)
        if axis is None:
            whole = parts[0]
            if any(not torch.equal(_bits(part), _bits(whole)) for part in parts[1:]):
                raise CheckpointError(f"tensor '{spot.key}' should be the same on every rank, but is not")
        else:
            whole = parts[0] if len(parts) == 1 else _bits_cat(parts, axis)
            whole = whole.narrow(axis, 0, spot.stored.shape[axis])
        return whole.view(spot.stored.dtype)

    def _read(self, rank: int, key: str, start: int, stored: Stored, device: torch.device) -> Tensor:
        place = self._ranks[rank][1][key]
        return read_tensor(place.file, place.start + start, stored, key, device)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _bits_cat(parts: list[Tensor], axis: int) -> Tensor:
    """Join along an axis; floats of 8 bits as bytes, which torch can join everywhere."""
    dtype = parts[0].dtype
    if dtype.itemsize > 1:
        return torch.cat(parts, axis)
    return torch.cat([part.view(torch.uint8) for part in parts], axis).view(dtype)

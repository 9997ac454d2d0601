"""Writing a TensorRT-LLM checkpoint: every tensor goes straight to its rows in the files of the ranks that hold it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.checkpoint.checkpoint import Checkpoint, stored_linear
from fewbit.checkpoint.files import INDEX
from fewbit.checkpoint.formats import trtllm
from fewbit.checkpoint.layout import Quantization, Stored
from fewbit.checkpoint.shards import PlannedFiles, write_json
from fewbit.checkpoint.trtllm.config import QUANT_CFG, config_of, known
from fewbit.checkpoint.trtllm.files import INNER
from fewbit.checkpoint.trtllm.modules import (
    LEAVES,
    PER_CHANNEL,
    ROWS,
    Module,
    Parallel,
    axes,
    modules,
    rank_shape,
    why_not_split,
)
from fewbit.checkpoint.writer import CheckpointWriter
from fewbit.errors import UnsupportedError
from fewbit.numerics.qtensor import QTensor


@dataclass(frozen=True)
class Target:
    """How a TensorRT-LLM checkpoint is to be laid out.

    Attributes:
        parallel: over how many ranks.
        nim: with the original config.json and the tokenizer above it, as NIM wants a folder.
    """

    parallel: Parallel = field(default_factory=Parallel)
    nim: bool = False


def check(source: Checkpoint, quantization: Quantization, target: Target) -> None:
    """Raise unless a model can be said and split so.

    Raises:
        UnsupportedError: it cannot.
    """
    known(source.config["architectures"][0])
    weights = {name: q.weight for name, q in quantization.quant.items() if q.weight is not None}
    if reason := why_not_split(source.spec, weights, target.parallel):
        raise UnsupportedError(reason)


class TrtWriter(CheckpointWriter):
    """See `CheckpointWriter`.

    Args:
        layout: how to lay it out.
        dtype: of what is not quantized.
        above: folder of the original, for what NIM wants of it.
        whatever: as of `CheckpointWriter`.
    """

    def __init__(self, layout: Target, dtype: torch.dtype, above: Path, *whatever: Any, **named: Any) -> None:
        self.layout, self.dtype, self.above = layout, dtype, above
        self._largest: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._seen: dict[str, Tensor] = {}
        super().__init__(*whatever, **named)

    @property
    def inner(self) -> Path:
        """Where config.json and the ranks go."""
        return self.folder / INNER if self.layout.nim else self.folder

    # --- what will be written -----------------------------------------------------------------------------------------

    def _open_shards(self, metadata: Mapping[str, str]) -> PlannedFiles:
        self.inner.mkdir(exist_ok=True)
        parallel = self.layout.parallel
        self._modules = list(modules(self.spec, parallel))
        self._places = {member: (m, i) for m in self._modules for i, member in enumerate(m.members)}
        self._leaves = {name: self._leaves_of(name) for name in self._places}
        plans: list[dict[str, Stored]] = [{} for _ in range(parallel.tp * parallel.pp)]
        for module in self._modules:
            for leaf, parts in self._parts(module).items():
                stored = rank_shape(module, leaf, parts, parallel.tp, self._scalar(module))
                for rank in self._ranks(module.stage):
                    plans[rank][self._key(module, leaf)] = stored
        for layer in self.quantization.kv:
            for which in ("k", "v", "kv"):
                stage, key = self._cache(layer, which)
                for rank in self._ranks(stage):
                    plans[rank][key] = Stored(torch.float32, (1,))
        prefix = f"{INNER}/" if self.layout.nim else ""
        groups = {
            f"{prefix}rank{rank}.safetensors": {f"{rank} {name}": stored for name, stored in plan.items()}
            for rank, plan in enumerate(plans)
        }
        return PlannedFiles(self.folder, groups, metadata, lambda name: name.split(" ", 1)[1])

    def _ranks(self, stage: int) -> range:
        tp = self.layout.parallel.tp
        return range(stage * tp, (stage + 1) * tp)

    def _leaves_of(self, member: str) -> dict[str, Stored]:
        """The tensors of one member, whole, in Model Optimizer's Hugging Face words."""
        quant, linear = self.quantization.quant.get(member), self._linears.get(member)
        found: dict[str, Stored] = {}
        shapes = self.spec.tensors()
        source = "embed.weight" if member == "lm_head" and self.spec.tied else f"{member}.weight"
        if quant is None or linear is None:
            found["weight"] = Stored(self.dense_dtypes[source], shapes[source])
        else:
            found |= stored_linear(trtllm.packing(quant), linear, quant)
            if self._is_int4(member):
                found["weight"] = Stored(torch.int8, found["weight"].shape)
            if quant.calibrated:
                found["input_scale"] = Stored(torch.float32, ())
            if quant.prescale or trtllm.prescale(linear, quant):
                found["pre_quant_scale"] = Stored(self.dense_dtypes["embed.weight"], (linear.in_features,))
        if f"{member}.bias" in shapes:
            found["bias"] = Stored(self.dense_dtypes[f"{member}.bias"], shapes[f"{member}.bias"])
        return found

    def _parts(self, module: Module) -> dict[str, list[Stored]]:
        """For every tensor of a module what its members bring."""
        leaves = [self._leaves[member] for member in module.members]
        return {leaf: [own[leaf] for own in leaves] for leaf in leaves[0]}

    def _key(self, module: Module, leaf: str) -> str:
        """The name of a tensor in the files."""
        quant = self.quantization.quant.get(module.members[0])
        by_row = quant is not None and trtllm.algorithm(quant) == "FP8_PER_CHANNEL_PER_TOKEN"
        return f"{module.name}.{PER_CHANNEL if leaf == 'weight_scale' and by_row else LEAVES[leaf]}"

    def _scalar(self, module: Module) -> tuple[int, ...]:
        """The shape of a single number: none in NVFP4, else [1]."""
        quant = self.quantization.quant.get(module.members[0])
        return () if quant and quant.weight and quant.weight.outer else (1,)

    def _cache(self, layer: int, which: str) -> tuple[int, str]:
        stage = self.layout.parallel.stage(layer, len(self.spec.layers))
        local = layer - stage * (len(self.spec.layers) // self.layout.parallel.pp)
        return stage, f"transformer.layers.{local}.attention.{which}_cache_scaling_factor"

    def _write_files(self) -> None:
        for folder in {self.folder, self.inner}:
            for name, path in self.files.items():
                (folder / name).write_bytes(path.read_bytes())
        quantization, parallel = self.quantization, self.layout.parallel
        config, mixed = config_of(self.spec, self.config, self.dtype, quantization, parallel)
        write_json(self.inner / "config.json", config)
        if mixed is not None:
            write_json(self.inner / QUANT_CFG, mixed)
        if self.layout.nim:
            write_json(self.folder / "config.json", config["fewbit"]["hf_config"])
            if (self.above / INDEX).is_file():
                shutil.copyfile(self.above / INDEX, self.folder / INDEX)

    # --- writing ------------------------------------------------------------------------------------------------------

    def add(self, name: str, tensor: Tensor | QTensor) -> None:
        """See `CheckpointWriter.add`."""
        owner, _, leaf = name.rpartition(".")
        if leaf in ("k_scale", "v_scale"):
            assert isinstance(tensor, Tensor)
            return self._add_cache(int(owner.split(".")[1]), leaf[0], tensor.float().reshape(1))
        if isinstance(tensor, QTensor):
            quant = self.quantization.quant[owner]
            for suffix, part in trtllm.packing(quant).pack(tensor).items():
                self._put(owner, suffix, part)
            if "pre_quant_scale" in self._leaves[owner] and not quant.prescale:
                want = self._leaves[owner]["pre_quant_scale"]
                self._put(owner, "pre_quant_scale", torch.ones(want.shape, dtype=want.dtype))
            return None
        if leaf in ("input_scale", "prescale"):
            suffix = {"prescale": "pre_quant_scale"}.get(leaf, leaf)
            return self._put(owner, suffix, tensor.to(self._leaves[owner][suffix].dtype))
        self._put(owner, leaf, tensor)
        if name == "embed.weight" and self.spec.tied:
            self._put("lm_head", "weight", tensor)
        return None

    def _add_cache(self, layer: int, which: str, scale: Tensor) -> None:
        stage, key = self._cache(layer, which)
        _, both = self._cache(layer, "kv")
        before = self._largest.pop(f"{stage} {both}", None)
        for rank in self._ranks(stage):
            self._shards.write(f"{rank} {key}", scale)
            if before is not None:  # K and V have come
                self._shards.write(f"{rank} {both}", torch.maximum(before, scale))
        if before is None:
            self._largest[f"{stage} {both}"] = scale

    def _put(self, owner: str, leaf: str, part: Tensor) -> None:
        """Put one member's tensor into those of the ranks."""
        module, index = self._places[owner]
        key = self._key(module, leaf)
        kinds = axes(leaf, part.ndim)
        if ROWS not in kinds and len(self._sharers(module, leaf)) > 1:
            found = self._one_for_all(module, leaf, key, part)
            if found is None:
                return
            part = found
        if leaf == "weight" and self._is_int4(owner):
            part = part.view(torch.int8)
        for place, rank in enumerate(self._ranks(module.stage)):
            piece = self._cut(module, kinds, part, place)
            self._shards.write_part(f"{rank} {key}", piece, self._start(module, index, leaf, piece))

    def _is_int4(self, owner: str) -> bool:
        quant = self.quantization.quant.get(owner)
        return quant is not None and quant.weight is not None and quant.weight.element.name == "int4"

    def _cut(self, module: Module, kinds: tuple[str, ...], part: Tensor, place: int) -> Tensor:
        """What one of the ranks of a stage gets of a member's tensor; what does not divide is filled up with zeros."""
        if module.split not in kinds:
            return part
        axis, tp = kinds.index(module.split), self.layout.parallel.tp
        each = -(-part.shape[axis] // tp)
        start = min(place * each, part.shape[axis])
        piece = part.narrow(axis, start, min(each, part.shape[axis] - start))
        if piece.shape[axis] == each:
            return piece
        return torch.cat([piece, piece.new_zeros((each - piece.shape[axis], *piece.shape[1:]))], axis)

    def _start(self, module: Module, index: int, leaf: str, piece: Tensor) -> int:
        """The byte at which a member's piece begins in the rank's tensor."""
        before = 0
        if ROWS in axes(leaf, piece.ndim):
            of = module.rows[index]
            before = sum(piece.shape[0] * rows // of for rows in module.rows[:index]) if index else 0
            before *= math.prod(piece.shape[1:])
        if module.expert is not None and leaf != "input_scale":
            total = sum(module.rows) if ROWS in axes(leaf, piece.ndim) else module.rows[index]
            before += module.expert * piece.numel() * total // module.rows[index]
        return before * piece.dtype.itemsize

    def _sharers(self, module: Module, leaf: str) -> tuple[str, ...]:
        """Who has one tensor of this kind together."""
        if leaf != "input_scale" or module.expert is None:
            return module.members
        return tuple(member for m in self._modules if m.name == module.name and m.stage == module.stage
                     for member in m.members)  # fmt: skip

    def _one_for_all(self, module: Module, leaf: str, key: str, part: Tensor) -> Tensor | None:
        """The tensor that several members share, once; None for those that repeat it.

        Of the second scales of W4A8, which are no part of the weight, it is the largest, when the last has come.
        """
        note = f"{module.stage} {key} {module.expert if leaf != 'input_scale' else ''}"
        if leaf == "weight_scale_2" and self._scalar(module) != ():
            left = self._counts.get(note, len(module.members)) - 1
            self._counts[note] = left
            self._largest[note] = torch.maximum(self._largest.get(note, part), part)
            return self._largest.pop(note) if left == 0 else None
        if note not in self._seen:
            self._seen[note] = part
            return part
        if not torch.equal(self._seen[note], part):
            raise UnsupportedError(
                f"{', '.join(self._sharers(module, leaf)[:6])} share one {LEAVES[leaf]} in a TensorRT-LLM checkpoint, "
                "but have several; --requantize gives them one"
            )
        return None

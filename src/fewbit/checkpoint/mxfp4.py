"""Experts in MXFP4 as gpt-oss stores them, all of a layer in one tensor: read as if each linear lay alone.

In a layer's ``mlp.experts`` lie, for E experts of width I over h channels,

    gate_up_proj_blocks  uint8 [E, 2 I, h / 32, 16], two codes a byte, the even column low; rows of gate and up in turns
    gate_up_proj_scales  uint8 [E, 2 I, h / 32], powers of two (E8M0)
    gate_up_proj_bias    [E, 2 I]

and ``down_proj_*`` likewise. They show themselves as ``{e}.gate_proj.weight_packed``, ``.weight_scale`` and ``.bias``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.checkpoint.files import CPU, Files, View, read_rows
from fewbit.checkpoint.layout import Stored
from fewbit.errors import CheckpointError

METHOD = "mxfp4"
LINEARS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""A stacked module to the linears whose rows take turns in it."""
PARTS = {"_blocks": "weight_packed", "_scales": "weight_scale", "_bias": "bias"}


def without_stacks(files: Files) -> Files:
    """The same model with an entry for each expert, if it is one of these.

    Raises:
        CheckpointError: a stacked tensor has another shape or dtype than it must.
    """
    quantization = files.config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return Unstacked(files) if method == METHOD else files


@dataclass(frozen=True)
class _Slice:
    """Every `step`-th row from `start` of one expert of a stacked tensor."""

    source: str
    expert: int
    start: int
    step: int


class Unstacked(View):
    """A directory whose stacked experts show themselves one by one. See `Files`."""

    def __init__(self, files: Files) -> None:
        super().__init__(files)
        self._slices: dict[str, _Slice] = {}
        self.entries: dict[str, Stored] = {}
        packed = {n.removesuffix("_blocks") for n in files.entries if n.endswith(".down_proj_blocks")}
        packed |= {n.removesuffix("_blocks") for n in files.entries if n.endswith(".gate_up_proj_blocks")}
        for name, stored in files.entries.items():
            module, suffix = _split(name)
            if module in packed:
                self._add(name, module, suffix, stored)
            else:
                self.entries[name] = stored

    def _add(self, name: str, module: str, suffix: str, stored: Stored) -> None:
        """The entries of one stacked tensor."""
        prefix, _, leaf = module.rpartition(".")
        linears = LINEARS[leaf]
        axes = {"_blocks": 4, "_scales": 3, "_bias": 2}[suffix]
        fits = suffix == "_bias" or stored.dtype == torch.uint8
        if len(stored.shape) != axes or stored.shape[1] % len(linears) or (axes == 4 and stored.shape[3] != 16):
            fits = False
        if not fits:
            raise CheckpointError(f"tensor '{name}' is {stored.dtype} {list(stored.shape)}, which no MXFP4 expert has")
        experts, rows, *tail = stored.shape
        shape = (rows // len(linears), *([tail[0] * 16] if axes == 4 else tail))
        for expert in range(experts):
            for start, linear in enumerate(linears):
                shown = f"{prefix}.{expert}.{linear}.{PARTS[suffix]}"
                self.entries[shown] = Stored(stored.dtype, shape)
                self._slices[shown] = _Slice(name, expert, start, len(linears))

    def read(self, name: str, device: torch.device = CPU) -> Tensor:
        """See `Files.read`; of a stacked tensor only one expert is read."""
        at = self._slices.get(name)
        if at is None:
            return self._files.read(name, device)
        rows = read_rows(self._files, at.source, at.expert, at.expert + 1, device)[0][at.start :: at.step]
        return rows.reshape(self.entries[name].shape).contiguous()


def _split(name: str) -> tuple[str, str]:
    """``x.down_proj_blocks`` to ``x.down_proj`` and ``_blocks``; a name without such an end comes back whole."""
    for suffix in PARTS:
        if name.endswith(suffix):
            return name.removesuffix(suffix), suffix
    return name, ""

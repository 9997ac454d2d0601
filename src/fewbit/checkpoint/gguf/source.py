"""A GGUF file as a model directory: its metadata as config.json, its tensors under the names of the architecture.

Tensors of linears lie as their blocks, bytes [out, bytes of a row], for `formats/gguf.py` to take apart. What must be
plain (embeddings, norms, routers), and blocks that fewbit's formats cannot say, are decoded on reading.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.checkpoint.files import CPU, read_tensor
from fewbit.checkpoint.gguf.blocks import BLOCKS, decoded
from fewbit.checkpoint.gguf.config import config_of
from fewbit.checkpoint.gguf.container import Raw, read_header
from fewbit.checkpoint.gguf.tokenizer import texts_of, tokenizer_why_not
from fewbit.checkpoint.layout import Stored
from fewbit.checkpoint.memory import MemoryFolder
from fewbit.checkpoint.names import Names
from fewbit.errors import UnsupportedError
from fewbit.spec.families import family_of
from fewbit.spec.hfconfig import HFConfig

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {
    "embed": "token_embd",
    "final_norm": "output_norm",
    "lm_head": "output",
    **{f"layers.{{i}}.attn.{n}": f"blk.{{i}}.attn_{n}" for n in "qkv"},
    "layers.{i}.attn.o": "blk.{i}.attn_output",
    "layers.{i}.attn.q_norm": "blk.{i}.attn_q_norm",
    "layers.{i}.attn.k_norm": "blk.{i}.attn_k_norm",
    "layers.{i}.pre_attn": "blk.{i}.attn_norm",
    "layers.{i}.pre_mlp": "blk.{i}.ffn_norm",
    **{f"layers.{{i}}.mlp.{n}": f"blk.{{i}}.ffn_{n}" for n in ("gate", "up", "down")},
    "layers.{i}.mlp.router": "blk.{i}.ffn_gate_inp",
    **{f"layers.{{i}}.mlp.experts.{{e}}.{n}": f"blk.{{i}}.ffn_{n}_exps" for n in ("gate", "up", "down")},
}
"""Canonical module to GGUF's; the experts of a layer lie in one tensor."""
_LAYER, _EXPERT = re.compile(r"layers\.(\d+)\.(.+)"), re.compile(r"\.experts\.\d+\.")
DROPPED = ("rope_freqs.weight",)
"""Said in the config, where it was looked at."""


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that is meant by a path: itself, or the only one of a folder that holds no other weights."""
    if path.is_file() and path.suffix == ".gguf":
        return path
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return None
    found = sorted(path.glob("*.gguf"))
    if len(found) > 1:
        raise UnsupportedError(f"{path} holds {len(found)} GGUF files; give the one that is meant, such as {found[0]}")
    return found[0] if found else None


@dataclass(frozen=True)
class _Slice:
    """Where a tensor comes from: all of a raw one, or one expert of it.

    Attributes:
        raw: what lies in the file.
        shape: of the tensor, without the axis of experts.
        index: the expert.
        heads: rows are in the order of GGUF's rotary pairs, in so many heads; 0: in their own.
    """

    raw: Raw
    shape: tuple[int, ...]
    index: int = 0
    heads: int = 0


class GGUFFiles:
    """See `Files`. Opening reads the header alone.

    Attributes:
        kinds: of each tensor of a linear that lies in blocks, their name.
        decoded: the GGUF names of the tensors that are decoded on reading, with their types.
        dtype: what they are decoded to.
    """

    def __init__(self, path: Path) -> None:
        self.path: Path = path
        self.sources: tuple[Path, ...] = (path,)
        metadata, raws = read_header(path)
        freqs = raws.get("rope_freqs.weight")
        factors = None if freqs is None else self._raw(freqs, CPU).view(torch.float32).flatten().tolist()
        arch, config = config_of(path.name, metadata, {name: raw.shape for name, raw in raws.items()}, factors)
        self.dtype = _dtype(raws)
        config["dtype"] = str(self.dtype).removeprefix("torch.")
        self.config: dict[str, Any] = config
        self.folder: Traversable = MemoryFolder(str(path), texts_of(metadata, config))
        self.tokenizer_reason = tokenizer_why_not(metadata)
        self.entries: dict[str, Stored] = {}
        self.kinds: dict[str, str] = {}
        self.decoded: dict[str, str] = {}
        self._slices: dict[str, _Slice] = {}
        self._place(raws, permuted=arch == "llama")

    def _place(self, raws: Mapping[str, Raw], permuted: bool) -> None:
        """Every tensor that the model wants under its name; the others under their own, to be refused."""
        family = family_of(self.config)
        spec = family.read(HFConfig(self.config))
        names = Names(family, spec)
        linears = {f"{linear.name}.weight" for linear in spec.linears()}
        used = set(DROPPED)
        for canonical in spec.tensors():
            theirs = _gguf_name(canonical)
            raw = raws.get(theirs) if theirs else None
            if theirs is None or raw is None:
                continue  # missed, with all others, when tensors are looked for
            used.add(theirs)
            heads, index, shape = 0, 0, raw.shape
            if permuted and theirs.rpartition(".")[0].endswith(("attn_q", "attn_k")):
                attention = spec.layers[int(canonical.split(".")[1])].attention
                heads = attention.heads if ".attn.q." in canonical else attention.kv_heads
            if ".experts." in canonical:
                index, shape = int(canonical.split(".experts.")[1].split(".")[0]), raw.shape[1:]
            name = names.tensor(canonical)
            self._slices[name] = _Slice(raw, shape, index, heads)
            kind = raw.kind.name
            if canonical in linears and kind in BLOCKS:
                self.kinds[name] = kind
                self.entries[name] = Stored(torch.uint8, (*shape[:-1], raw.row_bytes))
            else:
                self.entries[name] = Stored(FLOATS.get(kind, self.dtype), shape)
                if kind not in FLOATS:
                    self.decoded[theirs] = kind
        self.entries |= {name: Stored(torch.uint8, raw.shape) for name, raw in raws.items() if name not in used}

    def _raw(self, raw: Raw, device: torch.device, index: int = 0) -> Tensor:
        """The bytes of a tensor (of one expert, where it holds several), uint8 [rows, bytes of a row]."""
        rows = math.prod(raw.shape[-2:-1])
        stored = Stored(torch.uint8, (rows, raw.row_bytes))
        return read_tensor(self.path, raw.start + index * stored.nbytes, stored, "GGUF", device)

    def read(self, name: str, device: torch.device = CPU) -> Tensor:
        """See `Files.read`."""
        at, entry = self._slices[name], self.entries[name]
        found = self._raw(at.raw, device, at.index)
        kind = at.raw.kind.name
        if kind in FLOATS:
            found = found.view(FLOATS[kind])
        elif name not in self.kinds:
            found = decoded(found, kind).to(self.dtype)
        if at.heads:
            found = found.view(-1, 1) if len(at.shape) == 1 else found
            # GGUF turns pairs of neighbours, Hugging Face pairs from the two halves of a head
            found = found.unflatten(0, (at.heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()
        return found.view(entry.shape)


def _gguf_name(canonical: str) -> str | None:
    """``layers.3.attn.q.weight`` to ``blk.3.attn_q.weight``; None: GGUF has no such tensor."""
    module, _, leaf = canonical.rpartition(".")
    index = None
    if in_layer := _LAYER.fullmatch(module):
        index, role = in_layer.groups()
        module = "layers.{i}." + _EXPERT.sub(".experts.{e}.", role)
    return f"{NAMES[module].format(i=index)}.{leaf}" if module in NAMES else None


def _dtype(raws: Mapping[str, Raw]) -> torch.dtype:
    """What plain matrices are stored in; float32 only where all are, BF16 where all are in blocks."""
    found = {FLOATS[raw.kind.name] for raw in raws.values() if raw.kind.name in FLOATS and len(raw.shape) > 1}
    blocks = any(raw.kind.name not in FLOATS for raw in raws.values())
    for dtype in (torch.bfloat16, torch.float16):
        if dtype in found:
            return dtype
    return torch.bfloat16 if blocks else torch.float32

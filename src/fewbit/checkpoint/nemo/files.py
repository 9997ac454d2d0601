"""A .nemo archive shown as a Hugging Face directory: Megatron's fused tensors taken apart."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fewbit.checkpoint.files import CPU
from fewbit.checkpoint.layout import Stored
from fewbit.checkpoint.names import Names
from fewbit.checkpoint.nemo.archive import CONFIG, Member, TokenizerFolder, members_of
from fewbit.checkpoint.nemo.config import hf_config, parse
from fewbit.checkpoint.nemo.weights import weights_of
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.spec.families import family_of
from fewbit.spec.hfconfig import HFConfig

_OUTER = {
    "embed.weight": "embedding.word_embeddings.weight",
    "final_norm.weight": "decoder.final_layernorm.weight",
    "final_norm.bias": "decoder.final_layernorm.bias",
    "lm_head.weight": "output_layer.weight",
}
_LAYER = {
    "pre_attn.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_attn.bias": "self_attention.linear_qkv.layer_norm_bias",
    "attn.q.weight": "self_attention.linear_qkv.weight",
    "attn.k.weight": "self_attention.linear_qkv.weight",
    "attn.v.weight": "self_attention.linear_qkv.weight",
    "attn.o.weight": "self_attention.linear_proj.weight",
    "pre_mlp.weight": "mlp.linear_fc1.layer_norm_weight",
    "pre_mlp.bias": "mlp.linear_fc1.layer_norm_bias",
    "mlp.gate.weight": "mlp.linear_fc1.weight",
    "mlp.up.weight": "mlp.linear_fc1.weight",
    "mlp.down.weight": "mlp.linear_fc2.weight",
}
_APART = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_bias": "input_layernorm.bias",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "mlp.linear_fc1.layer_norm_bias": "pre_mlp_layernorm.bias",
}
"""What norms are called where they are not fused with the linear behind them."""


@dataclass(frozen=True)
class _Spot:
    """Where one of our tensors lies: in a stored one, whole or cut; at `layer` of its first axis if that is layers."""

    key: str
    layer: int | None
    cut: Literal["", "q", "k", "v", "gate", "up"] = ""


class NemoFiles:
    """See `fewbit.checkpoint.files.Files`. Opening reads the tables of contents only.

    Raises:
        CheckpointError: damaged, or it points outside of itself, or its pickles ask for code.
        UnsupportedError: a model or a kind of weights that is not known.
    """

    def __init__(self, path: Path) -> None:
        self.path: Path = path
        found = members_of(path)
        config = next((name for name in found if name.rsplit("/", 1)[-1] == CONFIG), None)
        if config is None:
            raise CheckpointError(f"{path} holds no {CONFIG}; expected a NeMo archive of a language model")
        self.folder: Traversable = TokenizerFolder(path, tokenizer_files(found))
        self._weights = weights_of(found, str(path))
        self.sources: tuple[Path, ...] = (path,) if path.is_file() else tuple(m.file for m in found.values())
        stored = self._weights.entries
        self._prefix = next((name.split("embedding.word")[0] for name in stored if "embedding.word_emb" in name), "")
        key = f"{self._prefix}embedding.word_embeddings.weight"
        if key not in stored:
            older = " (these are the names from before Megatron core)" if "language_model" in " ".join(stored) else ""
            raise UnsupportedError(f"{path} has no tensor 'embedding.word_embeddings.weight'{older}")
        if "language_model" in self._prefix:
            raise UnsupportedError(f"{path} is from before Megatron core; convert it with NeMo first (mcore_gpt=True)")
        self.config: dict[str, Any] = hf_config(parse(found[config].read()), stored[key].shape[0])
        family = family_of(self.config)
        self._spec = family.read(HFConfig(self.config))
        names = Names(family, self._spec)
        self.entries: dict[str, Stored] = {}
        self._spots: dict[str, _Spot] = {}
        for name, shape in self._spec.tensors().items():
            spot = self._find(name)
            if spot is not None:
                self.entries[names.tensor(name)] = Stored(stored[spot.key].dtype, self._shape(name, spot, shape))
                self._spots[names.tensor(name)] = spot
        used = {spot.key for spot in self._spots.values()}
        for key in sorted(stored.keys() - used):
            if not key.endswith("_extra_state") and not (self._spec.tied and key.endswith("output_layer.weight")):
                self.entries[f"{path.name}: {key}"] = stored[key]  # which nothing will ask for

    def _find(self, name: str) -> _Spot | None:
        """Where a tensor lies: by the layer's number, or with all layers in one."""
        stored, owner = self._weights.entries, name.split(".", 2)
        if owner[0] != "layers":
            key = f"{self._prefix}{_OUTER[name]}"
            return _Spot(key, None) if key in stored else None
        theirs = _LAYER.get(owner[2])
        if theirs is None:
            raise UnsupportedError(f"{name} has no place in a NeMo archive")
        cut: Any = owner[2].split(".")[1] if "linear_qkv.weight" in theirs else ""
        if theirs == "mlp.linear_fc1.weight" and f"layers.{owner[1]}.mlp.gate.weight" in self._spec.tensors():
            cut = owner[2].split(".")[1]
        for leaf in (theirs, _APART.get(theirs, theirs)):
            for key, layer in (
                (f"{self._prefix}decoder.layers.{owner[1]}.{leaf}", None),
                (f"{self._prefix}decoder.layers.{leaf}", int(owner[1])),
            ):
                if key in stored:
                    return _Spot(key, layer, cut)
        return None

    def _shape(self, name: str, spot: _Spot, shape: tuple[int, ...]) -> tuple[int, ...]:
        """What the tensor will have as shape: ours, if the stored one has as many rows as go into it."""
        whole = self._weights.entries[spot.key].shape
        if spot.layer is not None:
            if not whole or whole[0] != len(self._spec.layers):
                raise CheckpointError(f"'{spot.key}' has shape {list(whole)}, expected {len(self._spec.layers)} layers")
            whole = whole[1:]
        if not spot.cut:
            return whole
        a = self._spec.layers[int(name.split(".")[1])].attention
        rows = (a.heads + 2 * a.kv_heads) * a.head_dim if spot.cut in ("q", "k", "v") else 2 * shape[0]
        if whole != (rows, *shape[1:]):
            raise CheckpointError(f"'{spot.key}' has shape {list(whole)}, expected {[rows, *shape[1:]]}")
        return shape

    def read(self, name: str, device: torch.device = CPU) -> Tensor:
        """See `fewbit.checkpoint.files.Files`."""
        spot = self._spots[name]
        whole = self._weights.read(spot.key, spot.layer)
        return self._cut(whole, spot).contiguous().to(device)

    def _cut(self, whole: Tensor, spot: _Spot) -> Tensor:
        """Of each K/V head the query heads that read it, its key, its value; of the MLP the gate, then the rest."""
        if spot.cut in ("gate", "up"):
            half = len(whole) // 2
            return whole[:half] if spot.cut == "gate" else whole[half:]
        if not spot.cut:
            return whole
        a = self._spec.layers[0].attention
        groups = whole.unflatten(0, (a.kv_heads, -1, a.head_dim))  # [kv_heads, q's and k and v, head_dim, in]
        queries = a.heads // a.kv_heads
        start, stop = {"q": (0, queries), "k": (queries, queries + 1), "v": (queries + 1, queries + 2)}[spot.cut]
        found: Tensor = groups[:, start:stop].flatten(0, 2)
        return found


def tokenizer_files(found: dict[str, Member]) -> dict[str, Member]:
    """Members that belong to the tokenizer, by their names."""
    endings = (
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "vocab.json",
        "merges.txt", "added_tokens.json", "chat_template.jinja", "generation_config.json", ".model",
    )  # fmt: skip
    return {name: member for name, member in found.items() if name.endswith(endings) and "model_weights" not in name}

"""Baichuan 1 and 2: Llama with q, k and v in one tensor; 13B with ALiBi; 2 with a head whose rows are unit vectors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fewbit.spec.decoder import Alibi, DecoderSpec, Rope
from fewbit.spec.families import llama
from fewbit.spec.hfconfig import HFConfig, common_fields
from fewbit.spec.part import QKV, joined

ARCHITECTURES = ("BaichuanForCausalLM", "BaiChuanForCausalLM")
NAMES = {**llama.NAMES, **joined("model.layers.{i}.self_attn.W_pack", QKV)}
DROPPED = llama.DROPPED
UNIT_VOCAB = 125696
"""The vocabulary of Baichuan 2, by which its config.json differs from that of Baichuan 1."""
TINY = {
    "architectures": ["BaichuanForCausalLM"],
    "model_type": "baichuan",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


def read(config: HFConfig) -> DecoderSpec:
    """config.json to spec: 7B names its positions ``max_position_embeddings``, 13B ``model_max_length`` alone."""
    turned = config.raw.get("max_position_embeddings") is not None
    c = config if turned else config.renamed(max_position_embeddings="model_max_length")
    positions = (c.rope() if turned else Alibi(),) * c.need("num_hidden_layers")
    spec = llama.llama_like(c, positions=positions)
    return replace(spec, unit_head=spec.vocab == UNIT_VOCAB or "z_loss_weight" in c.raw)


def write(spec: DecoderSpec) -> dict[str, Any]:
    """Spec to config.json."""
    common = common_fields(spec)
    dropped = ["num_key_value_heads", "head_dim", "rope_scaling"]
    if not isinstance(spec.layers[0].attention.position, Rope):
        common["model_max_length"] = spec.context
        dropped.append("max_position_embeddings")
    own = {"z_loss_weight": 0} if spec.unit_head else {}
    kept = {name: value for name, value in common.items() if name not in dropped}
    return {"architectures": ["BaichuanForCausalLM"], "model_type": "baichuan", **kept, **own}

"""Falcon: 7B (one K/V head, attention and MLP beside each other on one norm), 40B and later (two norms), RW (ALiBi)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fewbit.spec.decoder import MLP, Alibi, DecoderSpec, Layer, Norm
from fewbit.spec.families import llama
from fewbit.spec.hfconfig import HFConfig, common_fields, each_layer
from fewbit.spec.part import QKV, joined

ARCHITECTURES = ("FalconForCausalLM",)
_LAYER = "transformer.h.{i}"
NAMES = {
    "embed": "transformer.word_embeddings",
    **joined(f"{_LAYER}.self_attention.query_key_value", QKV, "kv_heads"),
    "layers.{i}.attn.o": f"{_LAYER}.self_attention.dense",
    "layers.{i}.mlp.up": f"{_LAYER}.mlp.dense_h_to_4h",
    "layers.{i}.mlp.down": f"{_LAYER}.mlp.dense_4h_to_h",
    "layers.{i}.attn": f"{_LAYER}.self_attention",
    "layers.{i}.pre_attn": f"{_LAYER}.input_layernorm",
    "layers.{i}.pre_mlp": f"{_LAYER}.post_attention_layernorm",
    "final_norm": "transformer.ln_f",
    "lm_head": "lm_head",
}
DROPPED = ("*.rotary_emb.inv_freq",)
TINY = {
    "architectures": ["FalconForCausalLM"],
    "model_type": "falcon",
    "vocab_size": 256,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "layer_norm_epsilon": 1e-5,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "alibi": False,
    "bias": False,
    "multi_query": True,
    "new_decoder_architecture": False,
    "parallel_attn": True,
    "tie_word_embeddings": True,
}
DEFAULTS = {
    "layer_norm_epsilon": 1e-5, "multi_query": True, "parallel_attn": True, "activation": "gelu",
    "tie_word_embeddings": True,
}  # fmt: skip
"""What transformers takes these to be where config.json does not name them."""


def names(spec: DecoderSpec) -> dict[str, str]:
    """Falcon 40B calls its two norms otherwise."""
    layer = spec.layers[0]
    two = layer.parallel and layer.pre_mlp
    return {"layers.{i}.pre_attn": f"{_LAYER}.ln_attn", "layers.{i}.pre_mlp": f"{_LAYER}.ln_mlp"} if two else {}


def read(config: HFConfig) -> DecoderSpec:
    """config.json to spec."""
    c = config.over(DEFAULTS).renamed(hidden_act="activation")
    heads, count, new = c.need("num_attention_heads"), c.need("num_hidden_layers"), c.flag("new_decoder_architecture")
    kv_heads = (c.optional("num_kv_heads") or heads) if new else 1 if c.flag("multi_query") else heads
    two = new and (c.optional("num_ln_in_parallel_attn") or 2) == 2
    parallel = new or c.flag("parallel_attn")
    norm, bias = Norm(c.number("layer_norm_epsilon"), "layer", bias=True), c.flag("bias")
    mlp = MLP(c.optional("ffn_hidden_size") or 4 * c.need("hidden_size"), c.activation(), bias, gated=False)
    positions = (Alibi(scaled=True) if c.flag("alibi") else c.rope(),) * count
    c = HFConfig({**c.raw, "num_key_value_heads": kv_heads, "head_dim": None})
    spec = llama.llama_like(c, norm=norm, mlp=mlp, positions=positions, qkv_bias=bias, o_bias=bias)

    def change(layer: Layer) -> Layer:
        return replace(layer, parallel=parallel, pre_mlp=norm if two or not parallel else None)

    return each_layer(spec, change)


def write(spec: DecoderSpec) -> dict[str, Any]:
    """Spec to config.json."""
    first = spec.layers[0]
    a, two = first.attention, first.parallel and first.pre_mlp is not None
    new = two or a.kv_heads not in (1, a.heads)
    common = common_fields(spec, "layer_norm_epsilon")
    own = {
        "alibi": isinstance(a.position, Alibi),
        "bias": a.qkv_bias,
        "multi_query": a.kv_heads == 1,
        "new_decoder_architecture": new,
        "num_ln_in_parallel_attn": (2 if two else 1) if new else None,
        "num_kv_heads": common.pop("num_key_value_heads"),
        "parallel_attn": first.parallel,
        "ffn_hidden_size": common.pop("intermediate_size"),
        "activation": common.pop("hidden_act"),
    }
    common.pop("head_dim")
    return {"architectures": ["FalconForCausalLM"], "model_type": "falcon", **common, **own}

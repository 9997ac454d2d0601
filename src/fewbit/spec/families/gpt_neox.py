"""GPT-NeoX and Pythia: layer norms, attention and MLP beside each other, rotary positions on a part of each head."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fewbit.spec.decoder import MLP, DecoderSpec, Norm
from fewbit.spec.families import llama
from fewbit.spec.hfconfig import HFConfig, common_fields, each_layer
from fewbit.spec.part import QKV, joined

ARCHITECTURES = ("GPTNeoXForCausalLM",)
_LAYER = "gpt_neox.layers.{i}"
NAMES = {
    "embed": "gpt_neox.embed_in",
    **joined(f"{_LAYER}.attention.query_key_value", QKV, "kv_heads"),
    "layers.{i}.attn.o": f"{_LAYER}.attention.dense",
    "layers.{i}.mlp.up": f"{_LAYER}.mlp.dense_h_to_4h",
    "layers.{i}.mlp.down": f"{_LAYER}.mlp.dense_4h_to_h",
    "layers.{i}.attn": f"{_LAYER}.attention",
    "layers.{i}.pre_attn": f"{_LAYER}.input_layernorm",
    "layers.{i}.pre_mlp": f"{_LAYER}.post_attention_layernorm",
    "final_norm": "gpt_neox.final_layer_norm",
    "lm_head": "embed_out",
}
DROPPED = ("*.attention.bias", "*.attention.masked_bias", "*.rotary_emb.inv_freq")
TINY = {
    "architectures": ["GPTNeoXForCausalLM"],
    "model_type": "gpt_neox",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "rotary_pct": 0.25,
    "rotary_emb_base": 10000,
    "use_parallel_residual": True,
    "tie_word_embeddings": False,
}
DEFAULTS = {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "use_parallel_residual": True, "attention_bias": True}
"""What transformers takes these to be where config.json does not name them."""


def read(config: HFConfig) -> DecoderSpec:
    """config.json to spec."""
    c = config.over(DEFAULTS).renamed(rope_theta="rotary_emb_base", partial_rotary_factor="rotary_pct")
    norm = Norm(c.number("layer_norm_eps"), "layer", bias=True)
    mlp = MLP(c.need("intermediate_size"), c.activation(), bias=True, gated=False)
    bias, count = c.flag("attention_bias"), c.need("num_hidden_layers")
    spec = llama.llama_like(
        c, norm=norm, mlp=mlp, positions=(c.rope(partial=0.25),) * count, qkv_bias=bias, o_bias=bias
    )
    return each_layer(spec, lambda y: replace(y, parallel=c.flag("use_parallel_residual")))


def write(spec: DecoderSpec) -> dict[str, Any]:
    """Spec to config.json."""
    first = spec.layers[0]
    own = {
        "use_parallel_residual": first.parallel,
        "attention_bias": first.attention.qkv_bias,
        "partial_rotary_factor": first.attention.rope.fraction,
    }
    common = common_fields(spec, "layer_norm_eps")
    return {"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", **common, **own}

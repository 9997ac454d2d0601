"""OLMo 2: Llama with norms after attention and MLP in place of those before, and q and k normalized whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fewbit.spec.decoder import DecoderSpec, Layer
from fewbit.spec.families import llama
from fewbit.spec.hfconfig import HFConfig, common_fields, each_layer

ARCHITECTURES = ("Olmo2ForCausalLM",)
NAMES = {k: v for k, v in llama.NAMES.items() if not k.startswith("layers.{i}.pre_")} | {
    "layers.{i}.post_attn": "model.layers.{i}.post_attention_layernorm",
    "layers.{i}.post_mlp": "model.layers.{i}.post_feedforward_layernorm",
}
DROPPED = llama.DROPPED
TINY = {k: v for k, v in llama.TINY.items() if k not in ("rope_scaling", "mlp_bias", "head_dim")} | {
    "architectures": ["Olmo2ForCausalLM"],
    "model_type": "olmo2",
    "pad_token_id": 0,
}
DEFAULTS = {"rms_norm_eps": 1e-5}
"""What transformers takes these to be where config.json does not name them."""


def read(config: HFConfig) -> DecoderSpec:
    """config.json to spec."""
    c = config.over(DEFAULTS)
    bias = c.flag("attention_bias")
    spec = llama.llama_like(c, qk_norm=True, qkv_bias=bias, o_bias=bias)

    def change(layer: Layer) -> Layer:
        attention = replace(layer.attention, qk_norm_all=True)
        return replace(
            layer, attention=attention, pre_attn=None, pre_mlp=None, post_attn=layer.pre_attn, post_mlp=layer.pre_mlp
        )

    return each_layer(spec, change)


def write(spec: DecoderSpec) -> dict[str, Any]:
    """Spec to config.json."""
    own = {"attention_bias": spec.layers[0].attention.qkv_bias}
    return {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", **common_fields(spec), **own}

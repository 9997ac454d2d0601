"""Gemma: Llama with norms stored as w - 1, tanh GELU and an embedding scaled by the root of its width."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fewbit.spec.decoder import MLP, DecoderSpec, Norm
from fewbit.spec.families import llama
from fewbit.spec.hfconfig import HFConfig, common_fields

ARCHITECTURES = ("GemmaForCausalLM",)
NAMES = llama.NAMES
DROPPED = llama.DROPPED
TINY = {k: v for k, v in llama.TINY.items() if k not in ("rope_scaling", "rope_theta", "mlp_bias")} | {
    "architectures": ["GemmaForCausalLM"],
    "model_type": "gemma",
    "hidden_act": "gelu_pytorch_tanh",
    "head_dim": 64,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}
DEFAULTS = {"num_key_value_heads": 16, "head_dim": 256, "tie_word_embeddings": True, "max_position_embeddings": 8192}
"""What transformers takes these to be where config.json does not name them."""


def read(config: HFConfig) -> DecoderSpec:
    """config.json to spec. The activation is the tanh GELU even where an old config.json says ``gelu``."""
    c = config.over(DEFAULTS)
    c.refuse(use_bidirectional_attention=False)
    norm, bias = Norm(c.number("rms_norm_eps", 1e-6), plus_one=True), c.flag("attention_bias")
    mlp = MLP(c.need("intermediate_size"), "gelu_tanh")
    spec = llama.llama_like(c, norm=norm, mlp=mlp, qkv_bias=bias, o_bias=bias)
    return replace(spec, embed_scale=spec.hidden**0.5)


def write(spec: DecoderSpec) -> dict[str, Any]:
    """Spec to config.json."""
    own = {"attention_bias": spec.layers[0].attention.qkv_bias}
    return {"architectures": ["GemmaForCausalLM"], "model_type": "gemma", **common_fields(spec), **own}

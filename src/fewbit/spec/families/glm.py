"""GLM-4 (9B) as transformers lays it out: Llama with biases on q, k and v, half of each head turned in pairs."""

from __future__ import annotations

from typing import Any

from fewbit.spec.decoder import DecoderSpec
from fewbit.spec.families import llama
from fewbit.spec.hfconfig import HFConfig, common_fields
from fewbit.spec.part import GATE_UP, joined

ARCHITECTURES = ("GlmForCausalLM",)
NAMES = {**llama.NAMES, **joined("model.layers.{i}.mlp.gate_up_proj", GATE_UP)}
DROPPED = llama.DROPPED
TINY = {k: v for k, v in llama.TINY.items() if k not in ("rope_scaling", "mlp_bias")} | {
    "architectures": ["GlmForCausalLM"],
    "model_type": "glm",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "attention_bias": True,
    "pad_token_id": 0,
}
DEFAULTS = {
    "num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1.5625e-7, "max_position_embeddings": 131072,
    "attention_bias": True,
}  # fmt: skip
"""What transformers takes these to be where config.json does not name them."""


def read(config: HFConfig) -> DecoderSpec:
    """config.json to spec."""
    c = config.over(DEFAULTS)
    positions = (c.rope(partial=0.5, interleaved=True),) * c.need("num_hidden_layers")
    return llama.llama_like(c, positions=positions, qkv_bias=c.flag("attention_bias"))


def fields(spec: DecoderSpec) -> dict[str, Any]:
    """What a config.json of GLM-4 says, but for its name."""
    a = spec.layers[0].attention
    return {**common_fields(spec), "attention_bias": a.qkv_bias, "partial_rotary_factor": a.rope.fraction}


def write(spec: DecoderSpec) -> dict[str, Any]:
    """Spec to config.json."""
    return {"architectures": ["GlmForCausalLM"], "model_type": "glm", **fields(spec)}

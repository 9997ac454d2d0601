"""Nemotron (Minitron, Nemotron-4): layer norms stored as w - 1, squared ReLU and no gate, half of each head turned."""

from __future__ import annotations

from typing import Any

from fewbit.spec.decoder import MLP, DecoderSpec, Norm
from fewbit.spec.families import llama
from fewbit.spec.hfconfig import HFConfig, common_fields

ARCHITECTURES = ("NemotronForCausalLM",)
NAMES = {k: v for k, v in llama.NAMES.items() if k != "layers.{i}.mlp.gate"}
DROPPED = llama.DROPPED
TINY = {
    "architectures": ["NemotronForCausalLM"],
    "model_type": "nemotron",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "relu2",
    "norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
DEFAULTS = {"hidden_act": "relu2", "norm_eps": 1e-5, "max_position_embeddings": 4096}
"""What transformers takes these to be where config.json does not name them."""


def read(config: HFConfig) -> DecoderSpec:
    """config.json to spec."""
    c = config.over(DEFAULTS)
    bias, count = c.flag("attention_bias"), c.need("num_hidden_layers")
    norm = Norm(c.number("norm_eps"), "layer", bias=True, plus_one=True)
    mlp = MLP(c.need("intermediate_size"), c.activation(), c.flag("mlp_bias"), gated=False)
    positions = (c.rope(partial=0.5),) * count
    return llama.llama_like(c, norm=norm, mlp=mlp, positions=positions, qkv_bias=bias, o_bias=bias)


def write(spec: DecoderSpec) -> dict[str, Any]:
    """Spec to config.json."""
    first = spec.layers[0]
    own = {
        "attention_bias": first.attention.qkv_bias,
        "mlp_bias": next(iter(first.mlps(0).values())).bias,
        "partial_rotary_factor": first.attention.rope.fraction,
    }
    return {
        "architectures": ["NemotronForCausalLM"],
        "model_type": "nemotron",
        **common_fields(spec, "norm_eps"),
        **own,
    }

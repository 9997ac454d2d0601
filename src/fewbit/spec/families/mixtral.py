"""Mixtral: Mistral with eight experts in every layer, two for each token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fewbit.errors import UnsupportedError
from fewbit.spec.decoder import MLP, DecoderSpec, MoE
from fewbit.spec.families import llama, mistral
from fewbit.spec.hfconfig import HFConfig, common_fields

ARCHITECTURES = ("MixtralForCausalLM",)
_EXPERT = "model.layers.{i}.block_sparse_moe.experts.{e}"
NAMES = {name: theirs for name, theirs in llama.NAMES.items() if ".mlp." not in name} | {
    "layers.{i}.mlp.router": "model.layers.{i}.block_sparse_moe.gate",
    "layers.{i}.mlp.experts.{e}.gate": f"{_EXPERT}.w1",
    "layers.{i}.mlp.experts.{e}.up": f"{_EXPERT}.w3",
    "layers.{i}.mlp.experts.{e}.down": f"{_EXPERT}.w2",
}
DROPPED = llama.DROPPED
TINY = mistral.TINY | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "sliding_window": None,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
DEFAULTS = {
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
"""What transformers takes these to be where config.json does not name them."""


def read(config: HFConfig) -> DecoderSpec:
    """config.json to spec."""
    c = config.over(DEFAULTS)
    expert = MLP(c.need("intermediate_size"), c.activation())
    mixture = llama.mixture_of(c.need("num_local_experts"), c.need("num_experts_per_tok"), expert)
    windows = (c.optional("sliding_window"),) * c.need("num_hidden_layers")
    return llama.llama_like(c, windows=windows, mlp=mixture)


def write(spec: DecoderSpec) -> dict[str, Any]:
    """Spec to config.json."""
    first = spec.layers[0]
    if not isinstance(first.mlp, MoE) or not first.mlp.renormalize:
        raise UnsupportedError("a Mixtral has experts whose chosen scores add up to one")
    plain = replace(spec, layers=tuple(replace(x, mlp=first.mlp.expert) if x == first else x for x in spec.layers))
    own = {
        "sliding_window": first.attention.window,
        "num_local_experts": first.mlp.experts,
        "num_experts_per_tok": first.mlp.top_k,
    }
    return {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", **common_fields(plain), **own}

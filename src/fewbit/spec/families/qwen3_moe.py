"""Qwen3-MoE: Qwen3 with many small experts, and a plain MLP in layers that are named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.spec.decoder import MLP, DecoderSpec, MoE
from fewbit.spec.families import llama, qwen3
from fewbit.spec.hfconfig import HFConfig, common_fields

ARCHITECTURES = ("Qwen3MoeForCausalLM",)
NAMES = llama.NAMES | {
    "layers.{i}.mlp.router": "model.layers.{i}.mlp.gate",
    **{
        f"layers.{{i}}.mlp.experts.{{e}}.{n}": f"model.layers.{{i}}.mlp.experts.{{e}}.{n}_proj"
        for n in ("gate", "up", "down")
    },
}
DROPPED = llama.DROPPED
TINY = qwen3.TINY | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
DEFAULTS = {
    "max_position_embeddings": 32768, "num_key_value_heads": 4, "sliding_window": 4096, "num_experts": 128,
    "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": False, "decoder_sparse_step": 1,
}  # fmt: skip
"""What transformers takes these to be where config.json does not name them."""


def mixture(c: HFConfig) -> MoE:
    """The mixture of a layer that has one."""
    expert = MLP(c.need("moe_intermediate_size"), c.activation())
    experts = c.optional("num_local_experts") or c.need("num_experts")  # transformers 5 writes the first
    return llama.mixture_of(experts, c.need("num_experts_per_tok"), expert, c.flag("norm_topk_prob"))


def sparse(c: HFConfig, plain: DecoderSpec, mixture: MoE) -> DecoderSpec:
    """The spec with a mixture in the layers that config.json says."""
    dense, step = c.raw.get("mlp_only_layers") or [], c.need("decoder_sparse_step")
    if not isinstance(dense, list) or not all(isinstance(i, int) for i in dense):
        raise CheckpointError(f"config.json: 'mlp_only_layers' is {dense!r}, expected a list of layers")
    layers = tuple(
        layer if i in dense or (i + 1) % step else replace(layer, mlp=mixture) for i, layer in enumerate(plain.layers)
    )
    return replace(plain, layers=layers)


def sparse_fields(spec: DecoderSpec) -> tuple[DecoderSpec, dict[str, Any]]:
    """The spec without mixtures, and the config.json fields that say them."""
    found = next((layer.mlp for layer in spec.layers if isinstance(layer.mlp, MoE)), None)
    dense = next((layer.mlp for layer in spec.layers if isinstance(layer.mlp, MLP)), None)
    if found is None:
        raise UnsupportedError("a model of this family has a layer with experts")
    alike = replace(spec, layers=tuple(replace(layer, mlp=dense or found.expert) for layer in spec.layers))
    return alike, {
        "num_experts": found.experts,
        "num_experts_per_tok": found.top_k,
        "moe_intermediate_size": found.width,
        "norm_topk_prob": found.renormalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, layer in enumerate(spec.layers) if isinstance(layer.mlp, MLP)],
    }


def read(config: HFConfig) -> DecoderSpec:
    """config.json to spec."""
    c = config.over(DEFAULTS)
    bias, count = c.flag("attention_bias"), c.need("num_hidden_layers")
    window = c.optional("sliding_window") if c.flag("use_sliding_window") else None
    plain = llama.llama_like(c, windows=(window,) * count, qk_norm=True, qkv_bias=bias, o_bias=bias)
    return sparse(c, plain, mixture(c))


def write(spec: DecoderSpec) -> dict[str, Any]:
    """Spec to config.json."""
    first = spec.layers[0]
    alike, own = sparse_fields(spec)
    own |= {
        "attention_bias": first.attention.qkv_bias,
        "use_sliding_window": first.attention.window is not None,
        "sliding_window": first.attention.window,
    }
    return {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", **common_fields(alike), **own}

"""Llama 2, 3 and 3.x, and what is laid out like them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fewbit.errors import CheckpointError
from fewbit.spec.decoder import MLP, Alibi, Attention, DecoderSpec, Layer, LongScaling, MoE, Norm, Rope
from fewbit.spec.hfconfig import HFConfig, common_fields

ARCHITECTURES = ("LlamaForCausalLM",)

NAMES = {
    "embed": "model.embed_tokens",
    **{f"layers.{{i}}.attn.{n}": f"model.layers.{{i}}.self_attn.{n}_proj" for n in "qkvo"},
    **{f"layers.{{i}}.mlp.{n}": f"model.layers.{{i}}.mlp.{n}_proj" for n in ("gate", "up", "down")},
    "layers.{i}.attn": "model.layers.{i}.self_attn",
    "layers.{i}.attn.q_norm": "model.layers.{i}.self_attn.q_norm",
    "layers.{i}.attn.k_norm": "model.layers.{i}.self_attn.k_norm",
    "layers.{i}.pre_attn": "model.layers.{i}.input_layernorm",
    "layers.{i}.pre_mlp": "model.layers.{i}.post_attention_layernorm",
    "final_norm": "model.norm",
    "lm_head": "lm_head",
}
DROPPED = ("*.rotary_emb.inv_freq",)
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}


def mixture_of(experts: int, top_k: int, expert: MLP, renormalize: bool = True) -> MoE:
    """A mixture that can be: no token goes to more experts than there are."""
    if top_k > experts:
        raise CheckpointError(f"config.json: {top_k} experts a token, but there are {experts}")
    return MoE(experts, top_k, expert, renormalize)


def llama_like(
    c: HFConfig,
    *,
    windows: tuple[int | None, ...] = (),
    qk_norm: bool = False,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    mlp: MLP | MoE | None = None,
    norm: Norm | None = None,
    positions: tuple[Rope | Alibi | None, ...] = (),
) -> DecoderSpec:
    """A decoder of pre-normed layers with grouped-query attention and a gated MLP.

    `windows` gives the attention window of each layer; empty: none has one. `mlp`, `norm`, `positions`: others than
    Llama's, the last for each layer.
    """
    heads, hidden, count = c.need("num_attention_heads"), c.need("hidden_size"), c.need("num_hidden_layers")
    kv_heads = c.optional("num_key_value_heads") or heads
    if heads % kv_heads:
        raise CheckpointError(f"config.json: {heads} attention heads are no multiple of {kv_heads} key/value heads")
    head_dim = c.optional("head_dim") or hidden // heads
    positions = positions or (c.rope(),) * count
    if any(isinstance(p, Rope) and (p.width(head_dim) % 2 or not p.width(head_dim)) for p in positions):
        raise CheckpointError(f"config.json: head_dim {head_dim} is odd or 0; rotary positions turn pairs")
    for p in positions:
        if (
            isinstance(p, Rope)
            and isinstance(p.scaling, LongScaling)
            and len(p.scaling.factors) * 2 != p.width(head_dim)
        ):
            raise CheckpointError(
                f"config.json: longrope has {len(p.scaling.factors)} factors, expected one for each of the "
                f"{p.width(head_dim) // 2} pairs of a head that are turned"
            )
    norm = norm or Norm(c.number("rms_norm_eps", 1e-6))
    attention = Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        position=None,
        qk_norm=norm if qk_norm else None,
        qkv_bias=qkv_bias,
        o_bias=o_bias,
    )
    mlp = mlp or MLP(c.need("intermediate_size"), c.activation(), mlp_bias)
    layers = tuple(
        Layer(replace(attention, window=window, position=position), mlp, norm, norm)
        for window, position in zip(windows or (None,) * count, positions, strict=True)
    )
    context = c.optional("max_position_embeddings") or 2048
    return DecoderSpec(c.need("vocab_size"), hidden, layers, norm, c.flag("tie_word_embeddings"), context)


def read(config: HFConfig) -> DecoderSpec:
    """config.json to spec."""
    bias = config.flag("attention_bias")
    return llama_like(config, qkv_bias=bias, o_bias=bias, mlp_bias=config.flag("mlp_bias"))


def write(spec: DecoderSpec) -> dict[str, Any]:
    """Spec to config.json."""
    first = spec.layers[0]
    own = {"attention_bias": first.attention.qkv_bias, "mlp_bias": isinstance(first.mlp, MLP) and first.mlp.bias}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **common_fields(spec), **own}

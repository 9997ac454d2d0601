"""Gemma 2: Gemma with norms after attention and MLP too, windows in every other layer, capped scores and logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fewbit.spec.decoder import DecoderSpec, Layer, Norm
from fewbit.spec.families import gemma, llama
from fewbit.spec.hfconfig import HFConfig, common_fields, each_layer

ARCHITECTURES = ("Gemma2ForCausalLM",)
NAMES = llama.NAMES | {
    "layers.{i}.post_attn": "model.layers.{i}.post_attention_layernorm",
    "layers.{i}.pre_mlp": "model.layers.{i}.pre_feedforward_layernorm",
    "layers.{i}.post_mlp": "model.layers.{i}.post_feedforward_layernorm",
}
DROPPED = llama.DROPPED
TINY = {k: v for k, v in gemma.TINY.items() if k != "hidden_act"} | {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "hidden_activation": "gelu_pytorch_tanh",
    "num_key_value_heads": 2,
    "query_pre_attn_scalar": 48,
    "sliding_window": 7,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 20.0,
}
DEFAULTS = {
    "max_position_embeddings": 8192,
    "num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True, "query_pre_attn_scalar": 256,
    "sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
}  # fmt: skip
"""What transformers takes these to be where config.json does not name them."""


def optional_number(c: HFConfig, name: str) -> float | None:
    """A number, or None where the field is absent or null."""
    return None if c.raw.get(name) is None else c.number(name)


def normed(c: HFConfig, spec: DecoderSpec) -> DecoderSpec:
    """A Gemma with norms after attention and MLP, and scores and logits capped as config.json says."""
    norm = Norm(spec.final_norm.eps, plus_one=True)
    softcap, multiplier = optional_number(c, "attn_logit_softcapping"), c.number("query_pre_attn_scalar") ** -0.5

    def change(layer: Layer) -> Layer:
        attention = replace(layer.attention, softcap=softcap, multiplier=multiplier)
        return replace(layer, attention=attention, post_attn=norm, post_mlp=norm)

    return replace(each_layer(spec, change), logit_softcap=optional_number(c, "final_logit_softcapping"))


def read(config: HFConfig) -> DecoderSpec:
    """config.json to spec."""
    c = config.over(DEFAULTS)
    windows = c.windows(lambda index: index % 2 == 0)
    spec = normed(c, gemma.read(c))
    layers = (replace(y, attention=replace(y.attention, window=w)) for y, w in zip(spec.layers, windows, strict=True))
    return replace(spec, layers=tuple(layers))


def fields(spec: DecoderSpec) -> dict[str, Any]:
    """What the config.json of Gemma 2 and 3 say besides what all do."""
    attentions = [layer.attention for layer in spec.layers]
    first, found = attentions[0], [a.window for a in attentions]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": first.qkv_bias,
        "query_pre_attn_scalar": round(first.scale**-2),
        "attn_logit_softcapping": first.softcap,
        "final_logit_softcapping": spec.logit_softcap,
        "sliding_window": next((w for w in found if w), None),
        "layer_types": ["sliding_attention" if w else "full_attention" for w in found],
    }


def write(spec: DecoderSpec) -> dict[str, Any]:
    """Spec to config.json."""
    first = spec.layers[0].attention
    plain = each_layer(spec, lambda y: replace(y, attention=replace(y.attention, window=first.window)))
    return {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", **common_fields(plain), **fields(spec)}

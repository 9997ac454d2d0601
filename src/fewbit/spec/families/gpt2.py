"""GPT-2: layer norms, learned positions, and linears that are stored transposed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fewbit.spec.decoder import MLP, DecoderSpec, Layer, Norm
from fewbit.spec.families import llama
from fewbit.spec.hfconfig import ACTIVATIONS, HFConfig
from fewbit.spec.part import QKV, Part

ARCHITECTURES = ("GPT2LMHeadModel",)
_LAYER = "transformer.h.{i}"


def turned(module: str, *linears: str) -> dict[str, Part]:
    """Entries for linears that lie in one module, their weights [in, out]."""
    return {f"layers.{{i}}.{name}": Part(f"{_LAYER}.{module}", linears, transposed=True) for name in linears}


NAMES = {
    "embed": "transformer.wte",
    "positions": "transformer.wpe",
    **turned("attn.c_attn", *QKV),
    **turned("attn.c_proj", "attn.o"),
    **turned("mlp.c_fc", "mlp.up"),
    **turned("mlp.c_proj", "mlp.down"),
    "layers.{i}.attn": f"{_LAYER}.attn",
    "layers.{i}.pre_attn": f"{_LAYER}.ln_1",
    "layers.{i}.pre_mlp": f"{_LAYER}.ln_2",
    "final_norm": "transformer.ln_f",
    "lm_head": "lm_head",
}
PREFIX = "transformer."
"""Which the files of the first GPT-2s leave out."""
DROPPED = ("*.attn.bias", "*.attn.masked_bias")
TINY = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": 256,
    "n_embd": 128,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}
DEFAULTS = {
    "n_positions": 1024, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
    "scale_attn_weights": True,
}  # fmt: skip
"""What transformers takes these to be where config.json does not name them."""


def read(config: HFConfig) -> DecoderSpec:
    """config.json to spec."""
    c = config.over(DEFAULTS).renamed(
        hidden_size="n_embd", num_hidden_layers="n_layer", num_attention_heads="n_head",
        max_position_embeddings="n_positions", hidden_act="activation_function",
    )  # fmt: skip
    c.refuse(add_cross_attention=False)
    norm = Norm(c.number("layer_norm_epsilon"), "layer", bias=True)
    mlp = MLP(c.optional("n_inner") or 4 * c.need("hidden_size"), c.activation(), bias=True, gated=False)
    none = (None,) * c.need("num_hidden_layers")
    spec = llama.llama_like(c, norm=norm, mlp=mlp, positions=none, qkv_bias=True, o_bias=True)
    layers = tuple(_scaled(c, index, layer) for index, layer in enumerate(spec.layers))
    return replace(spec, layers=layers, learned_positions=spec.context)


def _scaled(c: HFConfig, index: int, layer: Layer) -> Layer:
    """The layer with scores scaled as config.json says."""
    scale = layer.attention.head_dim**-0.5 if c.flag("scale_attn_weights") else 1.0
    scale /= index + 1 if c.flag("scale_attn_by_inverse_layer_idx") else 1
    usual = scale == layer.attention.head_dim**-0.5
    return replace(layer, attention=replace(layer.attention, multiplier=None if usual else scale))


def write(spec: DecoderSpec) -> dict[str, Any]:
    """Spec to config.json."""
    scales = [layer.attention.multiplier for layer in spec.layers]
    first, last = spec.layers[0], spec.layers[-1]
    mlp = next(iter(first.mlps(0).values()))
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": spec.vocab,
        "n_embd": spec.hidden,
        "n_layer": len(spec.layers),
        "n_head": first.attention.heads,
        "n_inner": mlp.width,
        "n_positions": spec.context,
        "activation_function": next(name for name, ours in ACTIVATIONS.items() if ours == mlp.act),
        "layer_norm_epsilon": spec.final_norm.eps,
        "tie_word_embeddings": spec.tied,
        "scale_attn_weights": scales[0] is None,
        "scale_attn_by_inverse_layer_idx": first.attention.scale != last.attention.scale,
    }

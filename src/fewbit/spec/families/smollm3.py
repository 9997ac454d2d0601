"""SmolLM3: Llama in which every fourth layer knows no positions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fewbit.errors import CheckpointError
from fewbit.spec.decoder import DecoderSpec
from fewbit.spec.families import llama
from fewbit.spec.hfconfig import HFConfig, common_fields, each_layer

ARCHITECTURES = ("SmolLM3ForCausalLM",)
NAMES = llama.NAMES
DROPPED = llama.DROPPED
TINY = {k: v for k, v in llama.TINY.items() if k not in ("rope_scaling", "head_dim")} | {
    "architectures": ["SmolLM3ForCausalLM"],
    "model_type": "smollm3",
    "no_rope_layer_interval": 2,
    "pad_token_id": 0,
}
DEFAULTS = {
    "num_key_value_heads": 4, "tie_word_embeddings": True, "max_position_embeddings": 32768,
    "no_rope_layer_interval": 4,
}  # fmt: skip
"""What transformers takes these to be where config.json does not name them."""


def read(config: HFConfig) -> DecoderSpec:
    """config.json to spec."""
    c = config.over(DEFAULTS)
    count, every = c.need("num_hidden_layers"), c.need("no_rope_layer_interval")
    turned = c.raw.get("no_rope_layers")  # in spite of its name 1 means rotary positions
    if turned is None:
        turned = [int((i + 1) % every != 0) for i in range(count)]
    if not isinstance(turned, list) or len(turned) != count:
        raise CheckpointError(f"config.json: 'no_rope_layers' is {turned!r}, expected {count} of 0 or 1")
    rope = c.rope(default_theta=2e6)
    slides = c.flag("use_sliding_window")
    windows = c.windows(lambda index: slides and not turned[index])
    bias = c.flag("attention_bias")
    return llama.llama_like(
        c,
        windows=windows,
        positions=tuple(rope if there else None for there in turned),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=c.flag("mlp_bias"),
    )


def write(spec: DecoderSpec) -> dict[str, Any]:
    """Spec to config.json."""
    attentions = [layer.attention for layer in spec.layers]
    first = next((a for a in attentions if a.position), attentions[0])
    window = next((a.window for a in attentions if a.window), None)
    plain = each_layer(spec, lambda y: replace(y, attention=first))
    own = {
        "no_rope_layers": [int(a.position is not None) for a in attentions],
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "layer_types": ["sliding_attention" if a.window else "full_attention" for a in attentions],
        "attention_bias": first.qkv_bias,
        "mlp_bias": next(iter(spec.layers[0].mlps(0).values())).bias,
    }
    return {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", **common_fields(plain), **own}

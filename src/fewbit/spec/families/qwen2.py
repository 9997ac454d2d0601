"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, and a window in the upper layers of some checkpoints."""

from __future__ import annotations

from typing import Any

from fewbit.spec.decoder import DecoderSpec
from fewbit.spec.families import llama
from fewbit.spec.hfconfig import HFConfig, common_fields, without_windows

ARCHITECTURES = ("Qwen2ForCausalLM",)
NAMES = llama.NAMES
DROPPED = llama.DROPPED
TINY = {k: v for k, v in llama.TINY.items() if k not in ("rope_scaling", "attention_bias", "mlp_bias")} | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "use_sliding_window": True,
    "sliding_window": 6,
    "max_window_layers": 1,
    "tie_word_embeddings": True,
}
DEFAULTS = {
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "max_position_embeddings": 32768,
}
"""What transformers takes these to be where config.json does not name them."""


def windows(config: HFConfig) -> tuple[int | None, ...]:
    """The window of each layer: from `layer_types`, else layers from `max_window_layers` on."""
    count = config.need("num_hidden_layers")
    if not config.flag("use_sliding_window"):
        return (None,) * count
    full = config.raw.get("max_window_layers", count)
    return config.windows(lambda index: bool(index >= full))


def window_fields(spec: DecoderSpec) -> tuple[DecoderSpec, dict[str, Any]]:
    """The spec without its windows, and the config.json fields that say them."""
    found = [layer.attention.window for layer in spec.layers]
    widest = next((w for w in found if w), None)
    return without_windows(spec), {
        "use_sliding_window": widest is not None,
        "sliding_window": widest,
        "layer_types": ["sliding_attention" if w else "full_attention" for w in found],
    }


def read(config: HFConfig) -> DecoderSpec:
    """config.json to spec."""
    config = config.over(DEFAULTS)
    return llama.llama_like(config, windows=windows(config), qkv_bias=True)


def write(spec: DecoderSpec) -> dict[str, Any]:
    """Spec to config.json."""
    plain, own = window_fields(spec)
    return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **common_fields(plain), **own}

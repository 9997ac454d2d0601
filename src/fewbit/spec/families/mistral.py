"""Mistral: Llama with a sliding window in every layer."""

from __future__ import annotations

from typing import Any

from fewbit.spec.decoder import DecoderSpec
from fewbit.spec.families import llama
from fewbit.spec.hfconfig import HFConfig, common_fields

ARCHITECTURES = ("MistralForCausalLM",)
NAMES = llama.NAMES
DROPPED = llama.DROPPED
TINY = {k: v for k, v in llama.TINY.items() if k not in ("rope_scaling", "attention_bias", "mlp_bias")} | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "sliding_window": 7,
}
DEFAULTS = {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072}
"""What transformers takes these to be where config.json does not name them."""


def read(config: HFConfig) -> DecoderSpec:
    """config.json to spec."""
    config = config.over(DEFAULTS)
    return llama.llama_like(config, windows=(config.optional("sliding_window"),) * config.need("num_hidden_layers"))


def write(spec: DecoderSpec) -> dict[str, Any]:
    """Spec to config.json."""
    own = {"sliding_window": spec.layers[0].attention.window}
    return {"architectures": ["MistralForCausalLM"], "model_type": "mistral", **common_fields(spec), **own}

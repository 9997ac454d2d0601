"""Qwen3: Llama with q and k normalized per head."""

from __future__ import annotations

from typing import Any

from fewbit.spec.decoder import DecoderSpec
from fewbit.spec.families import llama, qwen2
from fewbit.spec.hfconfig import HFConfig, common_fields

ARCHITECTURES = ("Qwen3ForCausalLM",)
NAMES = llama.NAMES
DROPPED = llama.DROPPED
TINY = {k: v for k, v in llama.TINY.items() if k not in ("rope_scaling", "mlp_bias")} | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 64,
    "use_sliding_window": False,
}
DEFAULTS = {**qwen2.DEFAULTS, "head_dim": 128}


def read(config: HFConfig) -> DecoderSpec:
    """config.json to spec."""
    config = config.over(DEFAULTS)
    bias = config.flag("attention_bias")
    return llama.llama_like(config, windows=qwen2.windows(config), qk_norm=True, qkv_bias=bias, o_bias=bias)


def write(spec: DecoderSpec) -> dict[str, Any]:
    """Spec to config.json."""
    plain, own = qwen2.window_fields(spec)
    own["attention_bias"] = spec.layers[0].attention.qkv_bias
    return {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **common_fields(plain), **own}

"""Phi-3, Phi-3.5 and Phi-4: Llama whose q, k and v lie in one tensor, gate and up in another; LongRoPE."""

from __future__ import annotations

from typing import Any

from fewbit.spec.decoder import DecoderSpec
from fewbit.spec.families import llama
from fewbit.spec.hfconfig import HFConfig, common_fields, without_windows
from fewbit.spec.part import GATE_UP, QKV, joined

ARCHITECTURES = ("Phi3ForCausalLM",)
NAMES = {
    **llama.NAMES,
    **joined("model.layers.{i}.self_attn.qkv_proj", QKV),
    **joined("model.layers.{i}.mlp.gate_up_proj", GATE_UP),
}
DROPPED = llama.DROPPED
TINY = {k: v for k, v in llama.TINY.items() if k not in ("head_dim", "attention_bias", "mlp_bias")} | {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 16,
    "rope_scaling": {
        "rope_type": "longrope",
        "short_factor": [1.0 + i / 16 for i in range(16)],
        "long_factor": [1.0 + i / 4 for i in range(16)],
    },
    "sliding_window": 23,
    "pad_token_id": 0,
}
DEFAULTS = {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096, "max_position_embeddings": 4096}
"""What transformers takes these to be where config.json does not name them."""


def read(config: HFConfig) -> DecoderSpec:
    """config.json to spec."""
    c = config.over(DEFAULTS)
    c.refuse(attention_bias=False)
    windows = (c.optional("sliding_window"),) * c.need("num_hidden_layers")
    return llama.llama_like(c, windows=windows, positions=(c.rope(partial=1.0),) * len(windows))


def write(spec: DecoderSpec) -> dict[str, Any]:
    """Spec to config.json."""
    common = common_fields(without_windows(spec))
    own: dict[str, Any] = {"sliding_window": spec.layers[0].attention.window, "pad_token_id": None}
    if common["rope_scaling"]:
        own["original_max_position_embeddings"] = spec.context - 1  # the long factors hold
    return {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", **common, **own}

"""Qwen2-MoE (Qwen1.5-MoE): Qwen2 with many small experts, and one more, behind a gate, for every token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fewbit.spec.decoder import MLP, DecoderSpec, MoE
from fewbit.spec.families import llama, qwen2, qwen3_moe
from fewbit.spec.hfconfig import HFConfig, common_fields

ARCHITECTURES = ("Qwen2MoeForCausalLM",)
NAMES = qwen3_moe.NAMES | {
    "layers.{i}.mlp.shared_gate": "model.layers.{i}.mlp.shared_expert_gate",
    **{
        f"layers.{{i}}.mlp.shared.{n}": f"model.layers.{{i}}.mlp.shared_expert.{n}_proj" for n in ("gate", "up", "down")
    },
}
DROPPED = llama.DROPPED
TINY = {k: v for k, v in qwen3_moe.TINY.items() if k not in ("head_dim", "attention_bias")} | {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "norm_topk_prob": False,
    "shared_expert_intermediate_size": 256,
}
DEFAULTS = {
    "max_position_embeddings": 32768, "num_key_value_heads": 16, "sliding_window": 4096, "max_window_layers": 28,
    "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "norm_topk_prob": False,
    "shared_expert_intermediate_size": 5632, "decoder_sparse_step": 1, "qkv_bias": True,
}  # fmt: skip
"""What transformers takes these to be where config.json does not name them."""


def read(config: HFConfig) -> DecoderSpec:
    """config.json to spec."""
    c = config.over(DEFAULTS)
    windows: tuple[int | None, ...] = (None,) * c.need("num_hidden_layers")
    if c.flag("use_sliding_window"):
        last = c.number("max_window_layers")
        windows = c.windows(lambda index: index % 2 == 0 and index < last)
    shared = MLP(c.need("shared_expert_intermediate_size"), c.activation())
    mixture = replace(qwen3_moe.mixture(c), shared=shared, shared_gate=True)
    return qwen3_moe.sparse(c, llama.llama_like(c, windows=windows, qkv_bias=c.flag("qkv_bias")), mixture)


def write(spec: DecoderSpec) -> dict[str, Any]:
    """Spec to config.json."""
    plain, windows = qwen2.window_fields(spec)
    alike, own = qwen3_moe.sparse_fields(plain)
    shared = next(y.mlp.shared for y in spec.layers if isinstance(y.mlp, MoE))
    own |= {
        **windows,
        "qkv_bias": spec.layers[0].attention.qkv_bias,
        "shared_expert_intermediate_size": shared.width if shared else 0,
    }
    return {"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", **common_fields(alike), **own}

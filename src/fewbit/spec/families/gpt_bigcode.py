"""StarCoder and SantaCoder (GPT-BigCode): GPT-2 with one K/V head for all query heads."""

from __future__ import annotations

from typing import Any

from fewbit.spec.decoder import DecoderSpec
from fewbit.spec.families import gpt2
from fewbit.spec.hfconfig import HFConfig
from fewbit.spec.part import QKV, Part, joined

ARCHITECTURES = ("GPTBigCodeForCausalLM",)
_LAYER = "transformer.h.{i}"
NAMES = {k: v for k, v in gpt2.NAMES.items() if not isinstance(v, Part)} | {
    **joined(f"{_LAYER}.attn.c_attn", QKV, "kv_heads"),
    "layers.{i}.attn.o": f"{_LAYER}.attn.c_proj",
    "layers.{i}.mlp.up": f"{_LAYER}.mlp.c_fc",
    "layers.{i}.mlp.down": f"{_LAYER}.mlp.c_proj",
}
DROPPED = gpt2.DROPPED
TINY = gpt2.TINY | {
    "architectures": ["GPTBigCodeForCausalLM"],
    "model_type": "gpt_bigcode",
    "n_head": 2,
    "activation_function": "gelu_pytorch_tanh",
    "multi_query": True,
}


def read(config: HFConfig) -> DecoderSpec:
    """config.json to spec."""
    c = config.over({"multi_query": True, "activation_function": "gelu_pytorch_tanh"})
    kv_heads = 1 if c.flag("multi_query") else c.need("n_head")
    return gpt2.read(c.over({"num_key_value_heads": kv_heads}))


def write(spec: DecoderSpec) -> dict[str, Any]:
    """Spec to config.json."""
    own = {"architectures": ["GPTBigCodeForCausalLM"], "model_type": "gpt_bigcode"}
    config = {k: v for k, v in gpt2.write(spec).items() if k != "scale_attn_by_inverse_layer_idx"}
    return {**config, **own, "multi_query": spec.layers[0].attention.kv_heads == 1}

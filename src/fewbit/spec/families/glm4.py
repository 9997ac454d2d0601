"""GLM-4-0414 (9B, 32B): GLM-4 with norms after attention and MLP too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fewbit.spec.decoder import DecoderSpec
from fewbit.spec.families import glm
from fewbit.spec.hfconfig import HFConfig, each_layer

ARCHITECTURES = ("Glm4ForCausalLM",)
NAMES = glm.NAMES | {
    "layers.{i}.post_attn": "model.layers.{i}.post_self_attn_layernorm",
    "layers.{i}.post_mlp": "model.layers.{i}.post_mlp_layernorm",
}
DROPPED = glm.DROPPED
TINY = glm.TINY | {"architectures": ["Glm4ForCausalLM"], "model_type": "glm4"}


def read(config: HFConfig) -> DecoderSpec:
    """config.json to spec."""
    return each_layer(glm.read(config), lambda y: replace(y, post_attn=y.pre_attn, post_mlp=y.pre_mlp))


def write(spec: DecoderSpec) -> dict[str, Any]:
    """Spec to config.json."""
    return {"architectures": ["Glm4ForCausalLM"], "model_type": "glm4", **glm.fields(spec)}

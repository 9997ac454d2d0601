"""StarCoder2: layer norms, an MLP without a gate, biases everywhere, and a sliding window."""

from __future__ import annotations

from typing import Any

from fewbit.spec.decoder import MLP, DecoderSpec, Norm
from fewbit.spec.families import llama
from fewbit.spec.hfconfig import HFConfig, common_fields, without_windows

ARCHITECTURES = ("Starcoder2ForCausalLM",)
NAMES = {k: v for k, v in llama.NAMES.items() if k != "layers.{i}.mlp.gate"} | {
    "layers.{i}.mlp.up": "model.layers.{i}.mlp.c_fc",
    "layers.{i}.mlp.down": "model.layers.{i}.mlp.c_proj",
}
DROPPED = llama.DROPPED
TINY = {
    "architectures": ["Starcoder2ForCausalLM"],
    "model_type": "starcoder2",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "gelu_pytorch_tanh",
    "norm_epsilon": 1e-5,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "sliding_window": 9,
    "use_bias": True,
    "tie_word_embeddings": True,
}
DEFAULTS = {
    "num_key_value_heads": 2, "hidden_act": "gelu_pytorch_tanh", "norm_epsilon": 1e-5, "use_bias": True,
    "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip
"""What transformers takes these to be where config.json does not name them."""


def read(config: HFConfig) -> DecoderSpec:
    """config.json to spec."""
    c = config.over(DEFAULTS)
    bias, count = c.flag("use_bias"), c.need("num_hidden_layers")
    norm = Norm(c.number("norm_epsilon"), "layer", bias=True)
    mlp = MLP(c.need("intermediate_size"), c.activation(), bias, gated=False)
    windows = (c.optional("sliding_window"),) * count
    return llama.llama_like(c, windows=windows, norm=norm, mlp=mlp, qkv_bias=bias, o_bias=bias)


def write(spec: DecoderSpec) -> dict[str, Any]:
    """Spec to config.json."""
    a = spec.layers[0].attention
    own = {"use_bias": a.qkv_bias, "sliding_window": a.window}
    common = common_fields(without_windows(spec), "norm_epsilon")
    return {"architectures": ["Starcoder2ForCausalLM"], "model_type": "starcoder2", **common, **own}

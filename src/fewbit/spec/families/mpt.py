"""MPT: layer norms without biases, ALiBi, and q, k and v in one tensor."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fewbit.errors import UnsupportedError
from fewbit.spec.decoder import MLP, Alibi, DecoderSpec, Norm
from fewbit.spec.families import llama
from fewbit.spec.hfconfig import HFConfig, each_layer
from fewbit.spec.part import QKV, joined

ARCHITECTURES = ("MptForCausalLM", "MPTForCausalLM")
_LAYER = "transformer.blocks.{i}"
NAMES = {
    "embed": "transformer.wte",
    **joined(f"{_LAYER}.attn.Wqkv", QKV),
    "layers.{i}.attn.o": f"{_LAYER}.attn.out_proj",
    "layers.{i}.mlp.up": f"{_LAYER}.ffn.up_proj",
    "layers.{i}.mlp.down": f"{_LAYER}.ffn.down_proj",
    "layers.{i}.attn": f"{_LAYER}.attn",
    "layers.{i}.pre_attn": f"{_LAYER}.norm_1",
    "layers.{i}.pre_mlp": f"{_LAYER}.norm_2",
    "final_norm": "transformer.norm_f",
    "lm_head": "lm_head",
}
DROPPED = ()
TINY = {
    "architectures": ["MptForCausalLM"],
    "model_type": "mpt",
    "vocab_size": 256,
    "d_model": 128,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": 256,
    "attn_config": {"alibi": True, "alibi_bias_max": 8},
    "tie_word_embeddings": True,
}
DEFAULTS = {"max_seq_len": 2048, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "hidden_act": "gelu"}
"""What transformers takes these to be where config.json does not name them."""


def read(config: HFConfig) -> DecoderSpec:
    """config.json to spec."""
    c = config.over(DEFAULTS).renamed(
        hidden_size="d_model", num_hidden_layers="n_layers", num_attention_heads="n_heads",
        max_position_embeddings="max_seq_len",
    )  # fmt: skip
    c.refuse(expansion_ratio=4, no_bias=True, logit_scale=None)
    a = HFConfig({"alibi": True, "alibi_bias_max": 8, **(c.raw.get("attn_config") or {})})
    a.refuse(clip_qkv=None, qk_ln=False, prefix_lm=False, attn_type="multihead_attention")
    if not a.flag("alibi"):
        raise UnsupportedError("config.json: an MPT without alibi is not supported")
    norm = Norm(c.number("layer_norm_epsilon"), "layer")
    mlp = MLP(4 * c.need("hidden_size"), "gelu", gated=False)
    positions = (Alibi(a.number("alibi_bias_max")),) * c.need("num_hidden_layers")
    spec = llama.llama_like(c, norm=norm, mlp=mlp, positions=positions)
    scale = None if a.raw.get("softmax_scale") is None else a.number("softmax_scale")
    return each_layer(spec, lambda y: replace(y, attention=replace(y.attention, multiplier=scale)))


def write(spec: DecoderSpec) -> dict[str, Any]:
    """Spec to config.json."""
    a = spec.layers[0].attention
    if not isinstance(a.position, Alibi) or a.position.scaled:
        raise UnsupportedError("an MPT has plain ALiBi")
    return {
        "architectures": ["MptForCausalLM"],
        "model_type": "mpt",
        "vocab_size": spec.vocab,
        "d_model": spec.hidden,
        "n_heads": a.heads,
        "n_layers": len(spec.layers),
        "max_seq_len": spec.context,
        "layer_norm_epsilon": spec.final_norm.eps,
        "attn_config": {
            "alibi": True,
            "alibi_bias_max": int(a.position.max_bias),
            "softmax_scale": a.multiplier,
        },
        "tie_word_embeddings": spec.tied,
    }

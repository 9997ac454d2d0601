"""ChatGLM2, ChatGLM3 and GLM-4 (9B) as their own code lays them out: GLM with q, k and v fused, gate and up too."""

from __future__ import annotations

from typing import Any

from fewbit.spec.decoder import MLP, DecoderSpec
from fewbit.spec.families import llama
from fewbit.spec.hfconfig import HFConfig, common_fields
from fewbit.spec.part import GATE_UP, QKV, joined

ARCHITECTURES = ("ChatGLMModel", "ChatGLMForConditionalGeneration")
_LAYER = "transformer.encoder.layers.{i}"
NAMES = {
    "embed": "transformer.embedding.word_embeddings",
    **joined(f"{_LAYER}.self_attention.query_key_value", QKV),
    **joined(f"{_LAYER}.mlp.dense_h_to_4h", GATE_UP),
    "layers.{i}.attn.o": f"{_LAYER}.self_attention.dense",
    "layers.{i}.mlp.down": f"{_LAYER}.mlp.dense_4h_to_h",
    "layers.{i}.attn": f"{_LAYER}.self_attention",
    "layers.{i}.pre_attn": f"{_LAYER}.input_layernorm",
    "layers.{i}.pre_mlp": f"{_LAYER}.post_attention_layernorm",
    "final_norm": "transformer.encoder.final_layernorm",
    "lm_head": "transformer.output_layer",
}
DROPPED = ("transformer.rotary_pos_emb.inv_freq",)
TINY = {
    "architectures": ["ChatGLMModel"],
    "model_type": "chatglm",
    "padded_vocab_size": 256,
    "hidden_size": 128,
    "ffn_hidden_size": 256,
    "num_layers": 2,
    "num_attention_heads": 4,
    "kv_channels": 32,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "add_qkv_bias": True,
    "add_bias_linear": False,
    "layernorm_epsilon": 1e-5,
    "rmsnorm": True,
    "seq_length": 256,
    "rope_ratio": 1,
    "tie_word_embeddings": False,
}


def read(config: HFConfig) -> DecoderSpec:
    """config.json to spec."""
    config.refuse(
        rmsnorm=True, post_layer_norm=True, apply_residual_connection_post_layernorm=False, original_rope=True,
        pre_seq_len=None,
    )  # fmt: skip
    theta = 10000.0 * config.number("rope_ratio", 1.0)
    c = config.over({"rope_theta": theta, "kv_channels": 128, "add_qkv_bias": False}).renamed(
        vocab_size="padded_vocab_size", num_hidden_layers="num_layers", head_dim="kv_channels",
        intermediate_size="ffn_hidden_size", max_position_embeddings="seq_length", rms_norm_eps="layernorm_epsilon",
    )  # fmt: skip
    heads, bias = c.need("num_attention_heads"), c.flag("add_bias_linear")
    kv_heads = c.need("multi_query_group_num") if c.flag("multi_query_attention") else heads
    positions = (c.rope(partial=0.5, interleaved=True),) * c.need("num_hidden_layers")
    return llama.llama_like(
        c.over({"num_key_value_heads": kv_heads}),
        positions=positions,
        mlp=MLP(c.need("intermediate_size"), "silu", bias),
        qkv_bias=bias or c.flag("add_qkv_bias"),
        o_bias=bias,
    )


def write(spec: DecoderSpec) -> dict[str, Any]:
    """Spec to config.json."""
    a, common = spec.layers[0].attention, common_fields(spec, "layernorm_epsilon")
    theirs = {
        "vocab_size": "padded_vocab_size", "num_hidden_layers": "num_layers", "head_dim": "kv_channels",
        "intermediate_size": "ffn_hidden_size", "max_position_embeddings": "seq_length",
        "num_key_value_heads": "multi_query_group_num",
    }  # fmt: skip
    dropped = ("hidden_act", "rope_theta", "rope_scaling", "partial_rotary_factor")
    return {
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        **{theirs.get(name, name): value for name, value in common.items() if name not in dropped},
        "multi_query_attention": a.kv_heads != a.heads,
        "add_qkv_bias": a.qkv_bias,
        "add_bias_linear": a.o_bias,
        "rmsnorm": True,
        "rope_ratio": a.rope.theta / 10000.0,
    }

"""gpt-oss: mixtures of clipped MLPs with biases, an attention sink for each head, a window in every other layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fewbit.errors import UnsupportedError
from fewbit.spec.decoder import MLP, DecoderSpec, MoE
from fewbit.spec.families import llama
from fewbit.spec.hfconfig import HFConfig, common_fields, each_layer
from fewbit.spec.part import Part

ARCHITECTURES = ("GptOssForCausalLM",)
_MLP = "model.layers.{i}.mlp"
_PAIR = ("mlp.experts.{e}.gate", "mlp.experts.{e}.up")


def stacked(name: str, of: tuple[str, ...]) -> dict[str, Part]:
    """Entries for linears of all experts in one tensor, the weights [experts, in, out], rows of several in turns."""
    found = {}
    for linear in of:
        at = f"layers.{{i}}.{linear}"
        found[f"{at}.weight"] = Part(f"{_MLP}.experts.{name}", of, "rows", transposed=True, stacked=True)
        found[f"{at}.bias"] = Part(f"{_MLP}.experts.{name}_bias", of, "rows", stacked=True)
    return found


NAMES = {k: v for k, v in llama.NAMES.items() if ".mlp." not in k} | {
    "layers.{i}.mlp.router": f"{_MLP}.router",
    **{f"layers.{{i}}.mlp.experts.{{e}}.{n}": f"{_MLP}.experts.{{e}}.{n}_proj" for n in ("gate", "up", "down")},
    **stacked("gate_up_proj", _PAIR),
    **stacked("down_proj", ("mlp.experts.{e}.down",)),
}
DROPPED = llama.DROPPED
TINY = {k: v for k, v in llama.TINY.items() if k not in ("rope_scaling", "mlp_bias")} | {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "attention_bias": True,
    "sliding_window": 7,
    "rope_theta": 150000.0,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 4.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 64,
    },
}
DEFAULTS = {
    "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 128, "num_experts_per_tok": 4,
    "sliding_window": 128, "attention_bias": True, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096,
    },
}  # fmt: skip
"""What transformers takes these to be where config.json does not name them."""
LIMIT = 7.0


def read(config: HFConfig) -> DecoderSpec:
    """config.json to spec."""
    c = config.over(DEFAULTS)
    c.refuse(swiglu_limit=LIMIT, hidden_act="silu")
    expert = MLP(c.need("intermediate_size"), "swish1702", bias=True, limit=LIMIT)
    mixture = llama.mixture_of(c.need("num_local_experts"), c.need("num_experts_per_tok"), expert)
    bias, count = c.flag("attention_bias"), c.need("num_hidden_layers")
    spec = llama.llama_like(
        c,
        windows=c.windows(lambda index: index % 2 == 0),
        mlp=replace(mixture, router_bias=True),
        positions=(c.rope(default_theta=150000.0),) * count,
        qkv_bias=bias,
        o_bias=bias,
    )
    return each_layer(spec, lambda y: replace(y, attention=replace(y.attention, sinks=True)))


def write(spec: DecoderSpec) -> dict[str, Any]:
    """Spec to config.json."""
    first, windows = spec.layers[0], [layer.attention.window for layer in spec.layers]
    if not isinstance(first.mlp, MoE):
        raise UnsupportedError("a gpt-oss has experts in every layer")
    plain = replace(first, mlp=MLP(first.mlp.width))
    own = {
        "num_local_experts": first.mlp.experts,
        "num_experts_per_tok": first.mlp.top_k,
        "attention_bias": first.attention.qkv_bias,
        "sliding_window": next((w for w in windows if w), None),
        "layer_types": ["sliding_attention" if w else "full_attention" for w in windows],
    }
    common = common_fields(each_layer(spec, lambda y: plain))
    return {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", **common, **own}

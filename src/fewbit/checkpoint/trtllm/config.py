"""config.json of a TensorRT-LLM checkpoint, from and to that of Hugging Face.

What TensorRT-LLM has no field for (windows, ids of special tokens) is carried in an object of our own, ``fewbit``.
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Mapping
from typing import Any

import torch

from fewbit.checkpoint.formats import trtllm
from fewbit.checkpoint.layout import Quantization
from fewbit.checkpoint.trtllm.modules import Parallel, modules
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.numerics.element import INT4
from fewbit.numerics.quantspec import QuantSpec
from fewbit.spec.decoder import DecoderSpec, MoE
from fewbit.spec.families import family_of
from fewbit.spec.hfconfig import rope_fields
from fewbit.version import __version__

OWN = "fewbit"
QUANT_CFG = "quant_cfg.json"
"""Beside config.json where linears differ in their numerics."""
DECODERS = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "MixtralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen",
    "Qwen3ForCausalLM": "qwen",
    "Qwen3MoeForCausalLM": "qwen",
}
"""Architectures whose layers have TensorRT-LLM's plain layout, and what it calls their decoder."""
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "max_position_embeddings": "max_position_embeddings",
    "hidden_act": "hidden_act",
    "head_size": "head_dim",
    "norm_epsilon": "rms_norm_eps",
}
"""Fields that both have, theirs to Hugging Face's."""
log = logging.getLogger(__name__)


def known(architecture: str) -> None:
    """Raise unless an architecture has the layout that is known here.

    Raises:
        UnsupportedError: it has not.
    """
    if architecture not in DECODERS:
        raise UnsupportedError(
            f"{architecture} has no known layout as a TensorRT-LLM checkpoint; known: {', '.join(DECODERS)}"
        )


# --- writing ----------------------------------------------------------------------------------------------------------


def config_of(
    spec: DecoderSpec, config: Mapping[str, Any], dtype: torch.dtype, quantization: Quantization, parallel: Parallel
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """config.json, and quant_cfg.json where there is need of one.

    Args:
        spec: the decoder.
        config: the Hugging Face config.json.
        dtype: of what is not quantized.
        quantization: what is quantized and how.
        parallel: how many ranks there will be.
    """
    first, name = spec.layers[0], str(dtype).removeprefix("torch.")
    a, mlp = first.attention, first.mlp
    architecture = config["architectures"][0]
    mapping = {"world_size": parallel.tp * parallel.pp, "tp_size": parallel.tp, "pp_size": parallel.pp}
    rope = rope_fields(a.rope)
    found: dict[str, Any] = {
        "producer": {"name": "fewbit", "version": __version__},
        "architecture": architecture,
        "dtype": name,
        "logits_dtype": "float16" if name == "bfloat16" else name,
        "num_hidden_layers": len(spec.layers),
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "hidden_size": spec.hidden,
        "norm_epsilon": spec.final_norm.eps,
        "vocab_size": spec.vocab,
        "max_position_embeddings": spec.context,
        "hidden_act": config.get("hidden_act", config.get("hidden_activation")),
        "use_parallel_embedding": True,
        "embedding_sharding_dim": 0,
        "head_size": a.head_dim,
        "intermediate_size": mlp.width,
        "position_embedding_type": "rope_gpt_neox",
        "share_embedding_table": False,
        "residual_mlp": False,
        "bias": a.o_bias,
        "rotary_pct": 1.0,
        "rank": mapping["world_size"] - 1,
        "decoder": DECODERS[architecture],
        "rmsnorm": True,
        "lm_head_bias": False,
        "rotary_base": rope["rope_theta"],
        "mapping": mapping,
    }
    if rope["rope_scaling"] is not None:
        found["rotary_scaling"] = rope["rope_scaling"] | {"type": rope["rope_scaling"]["rope_type"]}
    mixture = next((layer.mlp for layer in spec.layers if isinstance(layer.mlp, MoE)), None)
    if mixture is not None:
        mode = 1 if mixture.renormalize else 0
        found["moe"] = {"num_experts": mixture.experts, "top_k": mixture.top_k, "normalization_mode": mode}
        found["mapping"] |= {"moe_tp_size": parallel.tp, "moe_ep_size": 1}
    found["quantization"], mixed = _words(spec, quantization)
    plain = {k: v for k, v in config.items() if k != "quantization_config"} | {"tie_word_embeddings": spec.tied}
    found[OWN] = {"hf_config": plain}
    scales = {str(q.weight.scale) for q in quantization.quant.values() if q.weight and q.weight.element == INT4}
    if scales:
        found[OWN]["scale_dtype"] = min(scales)  # the files hold float32: this says how many of its bits count
    return found, mixed


def _words(spec: DecoderSpec, quantization: Quantization) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The object ``quantization``, and quant_cfg.json where linears differ."""
    quant = quantization.quant
    cache = next((word for word, kv in trtllm.CACHES.items() if kv in quantization.kv.values()), None)
    titles = {m.title: m.members for m in modules(spec, Parallel())}
    linears = {linear.name for linear in spec.linears()}
    said = {title: _word(quant[members[0]]) for title, members in titles.items() if members[0] in quant}
    dense = [title for title, members in titles.items() if members[0] in linears and members[0] not in quant]
    kinds = [dict(pairs) for pairs in {tuple(words.items()) for words in said.values()}]
    if len(kinds) > 1:
        algo = {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": cache}
        return algo, algo | {"quantized_layers": said}
    if not kinds:
        return {"quant_algo": None, "kv_cache_quant_algo": cache}, None
    algo = {"quant_algo": kinds[0]["quant_algo"], "kv_cache_quant_algo": cache}
    return algo | kinds[0] | {"exclude_modules": dense}, None


def _word(quant: QuantSpec) -> dict[str, Any]:
    assert quant.weight is not None
    algo = trtllm.algorithm(quant)
    found: dict[str, Any] = {"quant_algo": algo}
    if algo in trtllm.GROUPED:
        found["group_size"] = quant.weight.block[1]
    if algo in trtllm.PRESCALED:
        found |= {"has_zero_point": False, "pre_quant_scale": True}
    return found


# --- reading ----------------------------------------------------------------------------------------------------------


def parallel_of(config: Mapping[str, Any]) -> Parallel:
    """How a checkpoint is split.

    Raises:
        CheckpointError, UnsupportedError: not in a way that makes sense, or that is known.
    """
    mapping = config.get("mapping") or {}
    tp, pp = (mapping.get(name, 1) for name in ("tp_size", "pp_size"))
    world, layers = mapping.get("world_size", 1), config.get("num_hidden_layers")
    if not all(isinstance(n, int) and 0 < n <= 4096 for n in (tp, pp, world)) or tp * pp != world:
        raise CheckpointError(f"config.json: mapping {mapping} is not one of tp_size times pp_size ranks")
    if not isinstance(layers, int) or layers % pp:
        raise CheckpointError(f"config.json: {layers!r} layers do not divide into {pp} pipeline stages")
    if mapping.get("moe_ep_size", 1) != 1 or mapping.get("cp_size", 1) != 1:
        raise UnsupportedError(f"config.json: mapping {mapping}: expert and context parallelism are not supported")
    return Parallel(tp, pp)


def hf_config(
    config: Mapping[str, Any], beside: Mapping[str, Any] | None, biases: Mapping[str, bool]
) -> dict[str, Any]:
    """The Hugging Face config.json of a TensorRT-LLM checkpoint.

    Args:
        config: its config.json.
        beside: the original config.json where it lies in the folder above; None: it does not.
        biases: whether the first layer's ``qkv`` and ``fc`` have a bias.

    Raises:
        CheckpointError, UnsupportedError: fields are missing, contradict each other, or mean an unknown layout.
    """
    architecture = config.get("architecture")
    if not isinstance(architecture, str):
        raise CheckpointError(f"config.json: 'architecture' is {architecture!r}, expected a name")
    known(architecture)
    if config.get("position_embedding_type", "rope_gpt_neox") != "rope_gpt_neox" or config.get("rotary_pct", 1.0) != 1:
        raise UnsupportedError("config.json: only rotary positions over whole heads are supported in this format")
    missing = [name for name in _SIZES if name not in config]
    if missing:
        raise CheckpointError(f"config.json of a TensorRT-LLM checkpoint lacks '{missing[0]}'")
    sizes = {theirs: config[ours] for ours, theirs in _SIZES.items()}
    kept = beside if beside is not None else (config.get(OWN) or {}).get("hf_config")
    if kept is not None:
        for name, value in sizes.items():
            if kept.get(name) not in (None, value):
                raise CheckpointError(f"config.json: {name} is {kept[name]!r} by Hugging Face's words, here {value!r}")
        return {k: v for k, v in kept.items() if k != "quantization_config"}
    family = family_of({"architectures": [architecture]})
    base = config.get("rotary_base")
    if base is None:
        log.warning(
            "config.json names no rotary_base: 10000 is taken, as TensorRT-LLM does. Model Optimizer 0.47 leaves it "
            "out whatever the model has; if this one has another, add it"
        )
        base = 10000.0
    width = config.get("intermediate_size")
    found = {
        "architectures": [architecture],
        "model_type": family.TINY["model_type"],
        **sizes,
        "intermediate_size": width,
        "rope_theta": base,
        "rope_scaling": config.get("rotary_scaling"),
        "attention_bias": biases.get("qkv", False),
        "mlp_bias": biases.get("fc", False),
        "tie_word_embeddings": False,
        "dtype": config.get("dtype"),
        "use_sliding_window": False,
        "sliding_window": None,
    }
    if moe := config.get("moe"):
        found |= {"num_local_experts": moe["num_experts"], "num_experts": moe["num_experts"]}
        found |= {"num_experts_per_tok": moe["top_k"], "moe_intermediate_size": width}
        found["norm_topk_prob"] = moe.get("normalization_mode", 1) == 1
    return found


def quantization_of(config: Mapping[str, Any], mixed: Mapping[str, Any] | None, spec: DecoderSpec) -> dict[str, Any]:
    """What is quantized how, for `fewbit.checkpoint.formats.trtllm`: words by canonical linear.

    Args:
        config: TensorRT-LLM's config.json.
        mixed: quant_cfg.json, if it is there.
        spec: the decoder.
    """
    said = config.get("quantization") or {}
    algo, cache = said.get("quant_algo"), said.get("kv_cache_quant_algo")
    linears = {linear.name for linear in spec.linears()}
    titles = {m.title: m.members for m in modules(spec, Parallel()) if m.members[0] in linears}
    words: dict[str, Any] = {}
    if algo == "MIXED_PRECISION":
        if mixed is None:
            raise CheckpointError(f"config.json says MIXED_PRECISION, but there is no {QUANT_CFG} beside it")
        layers = mixed.get("quantized_layers") or {}
        if unknown := sorted(layers.keys() - titles.keys()):
            raise CheckpointError(f"{QUANT_CFG}: '{unknown[0]}' is no linear of this model")
        words = {title: dict(layers[title]) for title in titles if title in layers}
    elif algo is not None:
        excluded = said.get("exclude_modules")
        patterns = ["lm_head"] if excluded is None else excluded
        plain = {"quant_algo": algo, "group_size": said.get("group_size")}
        words = {t: dict(plain) for t in titles if not any(fnmatch.fnmatchcase(t, p) for p in patterns)}
    if dtype := (config.get(OWN) or {}).get("scale_dtype"):
        for entry in words.values():
            entry["scale_dtype"] = dtype
    by_linear = {member: entry for title, entry in words.items() for member in _members(spec, title)}
    return {"quant_method": trtllm.METHOD, "linears": by_linear, "kv_cache_quant_algo": cache}


def _members(spec: DecoderSpec, title: str) -> list[str]:
    return [member for m in modules(spec, Parallel()) if m.title == title for member in m.members]

"""GGUF metadata as a config.json: which architectures, and what their keys mean.

A key that we do not know is refused, not skipped: it could change the result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fewbit.errors import CheckpointError, UnsupportedError

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
}
"""``general.architecture`` to transformers' name; Mistral and Mixtral call themselves llama."""
FIELDS = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
"""Keys below the architecture's name to fields of config.json."""
KNOWN = (
    *FIELDS,
    *("vocab_size", "expert_count", "rope.dimension_count", "attention.value_length", "attention.sliding_window"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned"),
)


def config_of(
    name: str, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], factors: Sequence[float] | None
) -> tuple[str, dict[str, Any]]:
    """The architecture's name in GGUF, and the config.json of a file.

    Args:
        name: of the file, for errors.
        metadata: of the file.
        shapes: of its tensors.
        factors: what ``rope_freqs.weight`` divides each frequency by, where it is there.

    Raises:
        CheckpointError: something is missing.
        UnsupportedError: another architecture, or a key or a scaling that is not known.
    """
    arch = metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise UnsupportedError(
            f"{name}: GGUF architecture {arch!r} is not supported; known: {', '.join(ARCHITECTURES)}"
        )
    if metadata.get("split.count", 1) not in (0, 1):
        raise UnsupportedError(f"{name} is one of {metadata['split.count']} files; join them with gguf-split --merge")
    own = {key.removeprefix(f"{arch}."): value for key, value in metadata.items() if key.startswith(f"{arch}.")}
    if unknown := sorted(own.keys() - set(KNOWN)):
        raise UnsupportedError(f"{name}: metadata '{arch}.{unknown[0]}' is not supported")
    embedding = shapes.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"tensor 'token_embd.weight' is missing from {name}")
    config = {field: own[key] for key, field in FIELDS.items() if own.get(key) is not None}
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if not isinstance(heads, int) or not isinstance(hidden, int) or heads < 1:
        raise CheckpointError(f"{name}: {heads!r} heads over {hidden!r} channels, expected whole numbers")
    head_dim = config.setdefault("head_dim", hidden // heads)
    for key in ("rope.dimension_count", "attention.value_length"):
        if own.get(key, head_dim) != head_dim:
            raise UnsupportedError(f"{name}: {arch}.{key} is {own[key]}, and heads are {head_dim} wide: not supported")
    config |= {
        "architectures": [ARCHITECTURES[arch]],
        "model_type": arch,
        "vocab_size": embedding[0],
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in shapes,
        "quantization_config": {"quant_method": "gguf"},
        "rope_scaling": _scaling(name, own, config, factors),
    }
    config |= _architecture(name, arch, own, shapes)
    for role in ("bos", "eos"):
        if (token := metadata.get(f"tokenizer.ggml.{role}_token_id")) is not None:
            config[f"{role}_token_id"] = token
    return arch, config


def _architecture(
    name: str, arch: str, own: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """Fields of config.json that only some architectures have."""
    fields: dict[str, Any] = {}
    if arch == "llama":
        fields["attention_bias"] = "blk.0.attn_q.bias" in shapes
        fields["mlp_bias"] = "blk.0.ffn_gate.bias" in shapes
    if window := own.get("attention.sliding_window"):
        if arch != "llama":
            raise UnsupportedError(f"{name}: {arch} with a window of {window} tokens is not supported")
        fields |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
    if experts := own.get("expert_count"):
        fields |= {"num_local_experts": experts, "num_experts": experts, "norm_topk_prob": True}
        if arch == "llama":
            fields |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
            fields.setdefault("sliding_window", None)
    return fields


def _scaling(
    name: str, own: Mapping[str, Any], config: Mapping[str, Any], factors: Sequence[float] | None
) -> dict[str, Any] | None:
    """``rope_scaling``."""
    kind, factor = own.get("rope.scaling.type", "none"), own.get("rope.scaling.factor")
    if factors is not None:
        if kind != "none":
            raise UnsupportedError(f"{name}: both rope_freqs.weight and rope scaling {kind!r} are not supported")
        return _llama3(name, factors, float(config.get("rope_theta", 10000.0)))
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        original = own.get("rope.scaling.original_context_length")
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise UnsupportedError(f"{name}: rope scaling {kind!r} is not supported; known: none, linear, yarn, Llama 3's")


def _llama3(name: str, factors: Sequence[float], theta: float) -> dict[str, Any]:
    """The settings of Llama 3's scaling that give these factors: GGUF keeps only what comes of them.

    Every Llama has 1 and 4 as the factors of low and high frequencies; the original context is a power of two.
    """
    factor = max(factors)
    waves = [2 * math.pi * theta ** (pair / len(factors)) for pair in range(len(factors))]
    for original in (2**power for power in range(5, 21)):
        expected = []
        for wave in waves:
            ramp = min(max((original / wave - 1) / 3, 0.0), 1.0)
            expected.append(1 / ((1 - ramp) / factor + ramp))
        if all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(factors, expected, strict=True)):
            return {
                "rope_type": "llama3",
                "factor": round(factor, 4),
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": original,
            }
    raise UnsupportedError(f"{name}: rope_freqs.weight holds factors that are not those of Llama 3: not supported")

"""model_config.yaml of a NeMo GPT or Llama, as the config.json of the Hugging Face family that computes the same.

Megatron's gated decoders with RMS norms are Llamas; those with squared ReLU and norms stored as w - 1 are Nemotrons. A
setting that would change the result and has no place in either is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from fewbit.errors import CheckpointError, UnsupportedError

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "position_embedding_type": ("rope",),
    "num_moe_experts": (None,),
    "window_size": (None,),
    "qk_layernorm": (None, False),
    "apply_embedding_scaling": (None, False),
    "bias": (None, False),
    "query_key_scale": (None,),
    "megatron_amp_O2": (None, False, True),
    "transformer_block_type": (None, "pre_ln"),
    "rotary_interleaved": (None, False),
    "peft": (None,),
}
"""Settings that have to be one of these: everything else changes what the model computes."""


def parse(text: bytes) -> dict[str, Any]:
    """model_config.yaml as a dict; no tags, no objects.

    Raises:
        CheckpointError: it is no such file.
    """
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CheckpointError(f"model_config.yaml cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"model_config.yaml holds {type(found).__name__}, expected settings")
    return found


def hf_config(said: Mapping[str, Any], vocab: int) -> dict[str, Any]:
    """The config.json that says the same.

    Args:
        said: model_config.yaml.
        vocab: rows of the embedding as stored.

    Raises:
        CheckpointError, UnsupportedError: a setting is missing, or means something that no family here computes.
    """
    for name, neutral in _NEUTRAL.items():
        value = said.get(name, "rope" if name == "position_embedding_type" else None)
        if value not in neutral:
            raise UnsupportedError(f"model_config.yaml: {name}: {value!r} is not supported")
    kind = str(said.get("normalization", "layernorm")).lower(), str(said.get("activation", "gelu")).lower()
    gated = kind[1] in ("fast-swiglu", "swiglu")
    if kind[0] == "rmsnorm" and gated:
        own: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
        own |= {"rms_norm_eps": said.get("layernorm_epsilon", 1e-5)}
    elif kind == ("layernorm1p", "squared-relu"):
        own = {"architectures": ["NemotronForCausalLM"], "model_type": "nemotron", "hidden_act": "relu2"}
        own |= {
            "norm_eps": said.get("layernorm_epsilon", 1e-5),
            "partial_rotary_factor": said.get("rotary_percentage", 1),
        }
    else:
        raise UnsupportedError(
            f"model_config.yaml: normalization {kind[0]} with activation {kind[1]} is not supported; known: rmsnorm "
            "with swiglu (Llama), layernorm1p with squared-relu (Nemotron)"
        )
    if own["model_type"] == "llama" and said.get("rotary_percentage", 1) != 1:
        raise UnsupportedError("model_config.yaml: a Llama with a rotary_percentage other than 1 is not supported")
    missing = [n for n in ("hidden_size", "num_layers", "num_attention_heads", "ffn_hidden_size") if n not in said]
    if missing:
        raise CheckpointError(f"model_config.yaml lacks '{missing[0]}'")
    scaling: dict[str, Any] | None = None
    if said.get("scale_positional_embedding"):  # of Llama 3.1, whose numbers NeMo has in its code
        scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        scaling["original_max_position_embeddings"] = 8192
    if (factor := said.get("seq_len_interpolation_factor")) not in (None, 1):
        if scaling is not None:
            raise UnsupportedError("model_config.yaml: two ways at once to scale positions")
        scaling = {"rope_type": "linear", "factor": factor}
    return own | {
        "vocab_size": vocab,
        "hidden_size": said["hidden_size"],
        "intermediate_size": said["ffn_hidden_size"],
        "num_hidden_layers": said["num_layers"],
        "num_attention_heads": said["num_attention_heads"],
        "num_key_value_heads": said.get("num_query_groups") or said["num_attention_heads"],
        "head_dim": said.get("kv_channels") or said["hidden_size"] // said["num_attention_heads"],
        "max_position_embeddings": said.get("max_position_embeddings") or said.get("encoder_seq_length") or 2048,
        "rope_theta": float(said.get("rotary_base") or 10000.0),
        "rope_scaling": scaling,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": bool(said.get("share_embeddings_and_output_weights", True)),
    }

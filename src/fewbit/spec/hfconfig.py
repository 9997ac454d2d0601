"""Reading and writing what Hugging Face `config.json` files have in common.

A field we do not understand but that would change the result is refused, not skipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.spec.decoder import DecoderSpec, LinearScaling, Llama3Scaling, MoE, Rope, YarnScaling

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
"""Names in `config.json` to ours."""


class HFConfig:
    """A parsed `config.json` that knows how to complain."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw

    def over(self, defaults: Mapping[str, Any]) -> HFConfig:
        """The same with what its class takes absent fields to be; a field that is null stays null."""
        return HFConfig({**defaults, **self.raw})

    def need(self, name: str) -> int:
        """A field that must be a positive whole number."""
        value = self.raw.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise CheckpointError(f"config.json: '{name}' is {value!r}, expected a positive whole number")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A field that must be a number; `default` where it is absent or null."""
        value = self.raw.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise CheckpointError(f"config.json: '{name}' is {value!r}, expected a number")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """A field that must be true or false; `default` where it is absent or null."""
        value = self.raw.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise CheckpointError(f"config.json: '{name}' is {value!r}, expected true or false")
        return value

    def optional(self, name: str) -> int | None:
        """A positive whole number, or None where the field is absent or null."""
        return None if self.raw.get(name) is None else self.need(name)

    def activation(self) -> str:
        """The activation of the MLP."""
        given = self.raw.get("hidden_act", self.raw.get("hidden_activation"))
        if given not in ACTIVATIONS:
            raise UnsupportedError(
                f"config.json: hidden_act {given!r} is not supported; known: {', '.join(ACTIVATIONS)}"
            )
        return ACTIVATIONS[given]

    def rope(self) -> Rope:
        """Rotary positions, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
        new = self.raw.get("rope_parameters") or {}
        scaling = {k: v for k, v in (new or self.raw.get("rope_scaling") or {}).items() if v is not None}
        theta = HFConfig(new if "rope_theta" in new else self.raw).number("rope_theta", 10000.0)
        if HFConfig(scaling or self.raw).number("partial_rotary_factor", 1.0) != 1.0:
            raise UnsupportedError("config.json: a partial_rotary_factor other than 1 is not supported by this family")
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind == "default":
            return Rope(theta)
        s = HFConfig(scaling)
        factor = s.number("factor")
        context = int(scaling.get("original_max_position_embeddings") or self.need("max_position_embeddings"))
        if kind == "linear":
            return Rope(theta, LinearScaling(factor))
        if kind == "llama3":
            low, high = s.number("low_freq_factor"), s.number("high_freq_factor")
            return Rope(theta, Llama3Scaling(factor, low, high, context))
        if kind == "yarn" and not {"mscale", "mscale_all_dim", "truncate"} & scaling.keys():
            attention = s.number("attention_factor") if "attention_factor" in scaling else None
            fast, slow = s.number("beta_fast", 32.0), s.number("beta_slow", 1.0)
            return Rope(theta, YarnScaling(factor, context, fast, slow, attention))
        raise UnsupportedError(
            f"config.json: rope scaling {dict(scaling)} is not supported; known: linear, llama3, yarn"
        )


def rope_fields(rope: Rope) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of a config.json: what every reader, old or new, understands."""
    s = rope.scaling
    scaling: dict[str, Any] | None = None
    if isinstance(s, LinearScaling):
        scaling = {"rope_type": "linear", "factor": s.factor}
    elif isinstance(s, Llama3Scaling):
        scaling = {
            "rope_type": "llama3",
            "factor": s.factor,
            "low_freq_factor": s.low_freq_factor,
            "high_freq_factor": s.high_freq_factor,
            "original_max_position_embeddings": s.original_context,
        }
    elif isinstance(s, YarnScaling):
        scaling = {
            "rope_type": "yarn",
            "factor": s.factor,
            "beta_fast": s.beta_fast,
            "beta_slow": s.beta_slow,
            "original_max_position_embeddings": s.original_context,
        }
        if s.attention_factor is not None:
            scaling["attention_factor"] = s.attention_factor
    return {"rope_theta": rope.theta, "rope_scaling": scaling}


def common_fields(spec: DecoderSpec) -> dict[str, Any]:
    """The fields that every Llama-like config.json has, for a model whose layers are alike.

    Raises:
        UnsupportedError: layers differ, which these families' config.json cannot say.
    """
    first = spec.layers[0]
    if any(layer != first for layer in spec.layers):
        raise UnsupportedError("layers that differ cannot be written to a config.json of this family")
    a, m = first.attention, first.mlp
    if isinstance(m, MoE):
        raise UnsupportedError("a mixture of experts cannot be written to a config.json of this family")
    act = next(name for name, ours in ACTIVATIONS.items() if ours == m.act)
    return {
        "vocab_size": spec.vocab,
        "hidden_size": spec.hidden,
        "num_hidden_layers": len(spec.layers),
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "head_dim": a.head_dim,
        "intermediate_size": m.width,
        "hidden_act": act,
        "rms_norm_eps": spec.final_norm.eps,
        "max_position_embeddings": spec.context,
        "tie_word_embeddings": spec.tied,
        **rope_fields(a.position),
    }

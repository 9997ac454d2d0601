"""Reading and writing what Hugging Face `config.json` files have in common.

A field we do not understand but that would change the result is refused, not skipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.spec.decoder import (
    DecoderSpec,
    Layer,
    LinearScaling,
    Llama3Scaling,
    LongScaling,
    MoE,
    Rope,
    YarnScaling,
)

ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "relu": "relu", "relu2": "relu2",
}  # fmt: skip
"""Names in `config.json` to ours."""


MOST, MOST_PARTS = 2**31 - 1, 10_000
"""Of what a config.json may count, and of layers and experts, each of which becomes an object."""


class HFConfig:
    """A parsed `config.json` that knows how to complain."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw

    def over(self, defaults: Mapping[str, Any]) -> HFConfig:
        """The same with what its class takes absent fields to be; a field that is null stays null."""
        return HFConfig({**defaults, **self.raw})

    def renamed(self, **names: str) -> HFConfig:
        """The same with fields under our names, of a family that calls them otherwise: ``hidden_size="n_embd"``."""
        return HFConfig(
            {**self.raw, **{ours: self.raw[theirs] for ours, theirs in names.items() if theirs in self.raw}}
        )

    def need(self, name: str) -> int:
        """A field that must be a positive whole number."""
        value = self.raw.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise CheckpointError(f"config.json: '{name}' is {value!r}, expected a positive whole number")
        if value > (most := MOST_PARTS if "layer" in name or "expert" in name else MOST):
            raise CheckpointError(f"config.json: '{name}' is {value}, expected at most {most}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A field that must be a number; `default` where it is absent or null."""
        value = self.raw.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < math.inf:
            raise CheckpointError(f"config.json: '{name}' is {value!r}, expected a number")
        return float(value)

    def positive(self, name: str, default: float | None = None) -> float:
        """A field that must be a number above 0; `default` where it is absent or null."""
        value = self.number(name, default)
        if value <= 0:
            raise CheckpointError(f"config.json: '{name}' is {value}, expected a number above 0")
        return value

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

    def activation(self, name: str = "hidden_act") -> str:
        """The activation of the MLP."""
        given = self.raw.get(name)
        if given not in ACTIVATIONS:
            raise UnsupportedError(f"config.json: {name} {given!r} is not supported; known: {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[given]

    def refuse(self, **wanted: Any) -> None:
        """Raise if a field has a value that would change the result and that nothing here understands.

        Raises:
            UnsupportedError: the field, and the only value that is supported (which an absent field counts as).
        """
        for name, value in wanted.items():
            if (given := self.raw.get(name)) is not None and given != value:
                raise UnsupportedError(f"config.json: '{name}' is {given!r}; only {value!r} is supported")

    def each(self, name: str, kinds: Collection[str]) -> list[str] | None:
        """A field that says for each layer which of some kinds it is; None where it is absent.

        Raises:
            CheckpointError: it is something else.
        """
        given, count = self.raw.get(name), self.need("num_hidden_layers")
        if given is None:
            return None
        if not isinstance(given, list) or len(given) != count or not set(given) <= set(kinds):
            words = " or ".join(kind.removesuffix("_attention") for kind in kinds) + "_attention"
            raise CheckpointError(f"config.json: '{name}' is {given!r}, expected {count} of {words}")
        return given

    def windows(self, default: Callable[[int], bool] = lambda index: False) -> tuple[int | None, ...]:
        """The window of each layer by `layer_types`, or by whether `default` says that it has one."""
        window = self.optional("sliding_window")
        kinds = self.each("layer_types", ("full_attention", "sliding_attention"))
        if kinds is None:
            slides = [default(index) for index in range(self.need("num_hidden_layers"))]
        else:
            slides = [kind == "sliding_attention" for kind in kinds]
        return tuple(window if slide else None for slide in slides)

    def rope(self, partial: float | None = None, interleaved: bool = False, default_theta: float = 10000.0) -> Rope:
        """Rotary positions, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).

        Args:
            partial: how much of a head is turned where nothing else is said; None: all of it, always.
            interleaved: see `Rope`.
            default_theta: for a config.json that does not say it.
        """
        new = self.raw.get("rope_parameters") or {}
        scaling = {k: v for k, v in (new or self.raw.get("rope_scaling") or {}).items() if v is not None}
        theta = HFConfig(new if "rope_theta" in new else self.raw).positive("rope_theta", default_theta)
        said = HFConfig(scaling if "partial_rotary_factor" in scaling else self.raw)
        fraction = said.number("partial_rotary_factor", 1.0 if partial is None else partial)
        if partial is None and fraction != 1.0:
            raise UnsupportedError("config.json: a partial_rotary_factor other than 1 is not supported by this family")
        if not 0 < fraction <= 1:
            raise CheckpointError(f"config.json: 'partial_rotary_factor' is {fraction}, expected up to 1")
        return Rope(theta, self._scaling(scaling), fraction, interleaved)

    def _scaling(self, scaling: dict[str, Any]) -> Llama3Scaling | LinearScaling | YarnScaling | LongScaling | None:
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind == "default":
            return None
        if kind in ("longrope", "su"):
            return self._long(scaling)
        s = HFConfig(scaling)
        factor = s.positive("factor")
        context = s.optional("original_max_position_embeddings") or self.need("max_position_embeddings")
        if kind == "linear":
            return LinearScaling(factor)
        if kind == "llama3":
            low, high = s.positive("low_freq_factor"), s.positive("high_freq_factor")
            return Llama3Scaling(factor, low, high, context)
        if kind == "yarn" and not {"mscale", "mscale_all_dim"} & scaling.keys():
            attention = s.positive("attention_factor") if "attention_factor" in scaling else None
            fast, slow = s.positive("beta_fast", 32.0), s.positive("beta_slow", 1.0)
            return YarnScaling(factor, context, fast, slow, attention, s.flag("truncate", True))
        raise UnsupportedError(
            f"config.json: rope scaling {dict(scaling)} is not supported; known: linear, llama3, yarn, longrope"
        )

    def _long(self, scaling: dict[str, Any]) -> LongScaling:
        """LongRoPE: the long factors for a model whose context is longer than the original, else the short ones."""
        whole = self.need("max_position_embeddings")
        name = "original_max_position_embeddings"
        original = HFConfig(scaling).optional(name) or self.optional(name) or whole
        name = "long_factor" if whole > original else "short_factor"
        factors = scaling.get(name)
        if not isinstance(factors, list) or not all(isinstance(f, int | float) and f > 0 for f in factors):
            raise CheckpointError(f"config.json: '{name}' is {factors!r}, expected a list of numbers above 0")
        stretch = max(whole / original, 1.0)
        sharpen = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
        return LongScaling(tuple(map(float, factors)), HFConfig(scaling).positive("attention_factor", sharpen))


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
        if not s.truncate:
            scaling["truncate"] = False
    elif isinstance(s, LongScaling):
        scaling = {
            "rope_type": "longrope",
            "short_factor": list(s.factors),
            "long_factor": list(s.factors),
            "attention_factor": s.attention_factor,
        }
    own = {} if rope.fraction == 1.0 else {"partial_rotary_factor": rope.fraction}
    return {"rope_theta": rope.theta, "rope_scaling": scaling, **own}


def each_layer(spec: DecoderSpec, change: Callable[[Layer], Layer]) -> DecoderSpec:
    """The spec with every layer changed."""
    return replace(spec, layers=tuple(map(change, spec.layers)))


def without_windows(spec: DecoderSpec) -> DecoderSpec:
    """The spec with no window in any layer."""
    return each_layer(spec, lambda layer: replace(layer, attention=replace(layer.attention, window=None)))


def common_fields(spec: DecoderSpec, eps: str = "rms_norm_eps") -> dict[str, Any]:
    """The fields that every Llama-like config.json has, for a model whose layers are alike.

    `eps` is the name of the field that holds it.

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
        eps: spec.final_norm.eps,
        "max_position_embeddings": spec.context,
        "tie_word_embeddings": spec.tied,
        **(rope_fields(a.position) if isinstance(a.position, Rope) else {}),
    }

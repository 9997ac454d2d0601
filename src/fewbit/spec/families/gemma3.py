"""Gemma 3, its text part: Gemma 2 with q and k normalized, and rotary positions of another base in windowed layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fewbit.errors import UnsupportedError
from fewbit.spec.decoder import DecoderSpec, Layer, Norm
from fewbit.spec.families import gemma, gemma2
from fewbit.spec.hfconfig import HFConfig, common_fields, each_layer, rope_fields

ARCHITECTURES = ("Gemma3ForCausalLM",)
NAMES = gemma2.NAMES
DROPPED = gemma2.DROPPED
TINY = {k: v for k, v in gemma2.TINY.items() if not k.endswith("softcapping")} | {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "num_hidden_layers": 3,
    "sliding_window_pattern": 3,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}
DEFAULTS = {
    "max_position_embeddings": 131072,
    "num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True, "query_pre_attn_scalar": 256,
    "sliding_window": 4096, "sliding_window_pattern": 6, "rope_theta": 1e6, "rope_local_base_freq": 10000.0,
}  # fmt: skip
"""What transformers takes these to be where config.json does not name them."""


def read(config: HFConfig) -> DecoderSpec:
    """config.json to spec."""
    c = config.over(DEFAULTS)
    c.refuse(attn_logit_softcapping=None)
    pattern = c.need("sliding_window_pattern")
    windows = c.windows(lambda index: (index + 1) % pattern != 0)
    both = c.raw.get("rope_parameters") or {}
    if "full_attention" in both or "sliding_attention" in both:
        full, local = (both.get(f"{kind}_attention") or {} for kind in ("full", "sliding"))
        ropes = [HFConfig({**c.raw, "rope_parameters": {"rope_theta": theta, **given}}).rope()
                 for given, theta in ((full, 1e6), (local, 1e4))]  # fmt: skip
    else:
        ropes = [c.rope(), HFConfig({"rope_theta": c.number("rope_local_base_freq")}).rope()]
    spec = gemma2.normed(c, gemma.read(HFConfig({**c.raw, "rope_parameters": None, "rope_scaling": None})))
    norm = Norm(spec.final_norm.eps, plus_one=True)

    def change(layer: Layer, window: int | None) -> Layer:
        attention = replace(layer.attention, window=window, qk_norm=norm, position=ropes[window is not None])
        return replace(layer, attention=attention)

    return replace(spec, layers=tuple(change(y, w) for y, w in zip(spec.layers, windows, strict=True)))


def write(spec: DecoderSpec) -> dict[str, Any]:
    """Spec to config.json."""
    full, local = ({y.attention.rope for y in spec.layers if (y.attention.window is None) == f} for f in (True, False))
    if len(full) > 1 or len(local) > 1:
        raise UnsupportedError("a Gemma 3 has one kind of rotary positions with a window and one without")
    ropes = {
        f"{name}_attention": {k: v for k, v in rope_words(next(iter(kinds))).items() if v is not None}
        for name, kinds in (("full", full), ("sliding", local))
        if kinds
    }
    first = spec.layers[0].attention
    plain = each_layer(spec, lambda y: replace(y, attention=first))
    common = {k: v for k, v in common_fields(plain).items() if k not in ("rope_theta", "rope_scaling")}
    own = {"rope_parameters": ropes, **gemma2.fields(spec)}
    return {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", **common, **own}


def rope_words(rope: Any) -> dict[str, Any]:
    """Rotary positions as one object of transformers 5."""
    fields = rope_fields(rope)
    scaling = fields.pop("rope_scaling") or {"rope_type": "default"}
    return {**fields, **scaling}

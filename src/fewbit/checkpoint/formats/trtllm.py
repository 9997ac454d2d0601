"""TensorRT-LLM checkpoints: what their quantization means, and what they can say. See `fewbit.checkpoint.trtllm`.

The tensors are looked at by the names of Model Optimizer's Hugging Face layout, as `TrtFiles` shows them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fewbit.checkpoint.files import Files
from fewbit.checkpoint.formats import hf
from fewbit.checkpoint.layout import InputScale, Packing, Quantization, Shape, Stored
from fewbit.checkpoint.names import Names
from fewbit.checkpoint.packings.modelopt import INT4_ROWS
from fewbit.checkpoint.trtllm.modules import Parallel, modules
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.numerics.element import E4M3, INT4
from fewbit.numerics.format import FORMATS, Format
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.quantspec import KVSpec, QuantSpec
from fewbit.spec.decoder import DecoderSpec, LinearShape

NAME = "trtllm"
METHOD = "trtllm"
"""The ``quant_method`` under which `TrtFiles` shows the quantization of such a folder."""

_FP8, _FP8_ROW, _INT8_ROW, _INT8 = (FORMATS[name] for name in ("fp8", "fp8_row", "int8_row", "int8"))
_INT4, _NVFP4 = FORMATS["int4_g128"], FORMATS["nvfp4"]
ALGORITHMS = {
    "FP8": QuantSpec(_FP8, _FP8, "static"),
    "FP8_PER_CHANNEL_PER_TOKEN": QuantSpec(_FP8_ROW, _FP8_ROW, "dynamic"),
    "W8A8_SQ_PER_CHANNEL": QuantSpec(_INT8_ROW, _INT8, "static"),
    "W8A16": QuantSpec(_INT8_ROW),
    "W4A16": QuantSpec(FORMATS["int4_row"]),
    "W4A16_AWQ": QuantSpec(_INT4),
    "W4A8_AWQ": QuantSpec(_INT4, _FP8, "static"),
    "NVFP4": QuantSpec(_NVFP4, _NVFP4, "outer"),
    "NVFP4_AWQ": QuantSpec(_NVFP4, _NVFP4, "outer", prescale=True),
}
"""``quant_algo`` to what it means; INT4 also comes in other group sizes."""
GROUPED = ("W4A16_AWQ", "W4A8_AWQ", "NVFP4", "NVFP4_AWQ")
PRESCALED = ("W4A16_AWQ", "W4A8_AWQ", "NVFP4_AWQ")
"""Algorithms of which every linear has a ``prequant_scaling_factor``, ones if need be."""
CACHES = {"FP8": KVSpec(_FP8, _FP8), "INT8": KVSpec(_INT8, _INT8)}
"""``kv_cache_quant_algo`` to what it means."""


def detect(files: Files) -> bool:
    """By what `TrtFiles` says of it."""
    return (files.config.get("quantization_config") or {}).get("quant_method") == METHOD


def algorithm(quant: QuantSpec) -> str | None:
    """The one word TensorRT-LLM has for a QuantSpec, prescales aside."""
    weight = quant.weight
    if weight is None or quant.lowrank:
        return None
    plain = replace(quant, prescale=False)
    if weight.element == INT4 and weight.grouped and weight.zero is None and not weight.act_order:
        plain = replace(plain, weight=_INT4)
    word = next((word for word, meaning in ALGORITHMS.items() if meaning == plain), None)
    return "NVFP4_AWQ" if word == "NVFP4" and quant.prescale else word


def why_not(spec: DecoderSpec, quantization: Quantization) -> str | None:
    """See `FileFormat.why_not`."""
    rows = {linear.name: linear.out_features for linear in spec.linears()}
    for name, quant in quantization.quant.items():
        word = algorithm(quant)
        if word is None or (quant.prescale and word not in (*PRESCALED, "W8A8_SQ_PER_CHANNEL")):
            extra = " behind a prescale" if word else ""
            return f"{name}: a TensorRT-LLM checkpoint has no word for {quant}{extra}"
        assert quant.weight is not None
        if quant.weight.element == INT4 and rows[name] % 2:
            return f"{name}: INT4 is packed along the rows here and {rows[name]} is odd"
    for kv in quantization.kv.values():
        if kv not in CACHES.values():
            return f"a TensorRT-LLM checkpoint has no word for K and V in {kv}; known: {', '.join(CACHES)}"
    if quantization.kv and len(quantization.kv) != len(spec.layers):
        return "a TensorRT-LLM checkpoint says one K and V format for all layers"
    if len(quantization.quant) > 1:  # one alone is asked about by itself
        for module in modules(spec, Parallel()):
            kinds = {quantization.quant.get(member) for member in module.members}
            if len(kinds) > 1:
                return f"{', '.join(module.members)} lie in one tensor here, but their numerics differ"
    return None


def _w4a8_stored(fmt: Format, shape: Shape) -> dict[str, Stored]:
    return INT4_ROWS.stored(fmt, shape) | {"weight_scale_2": Stored(torch.float32, ())}


def _w4a8_pack(q: QTensor) -> dict[str, Tensor]:
    """The second scale is not part of the weight: TensorRT-LLM keeps the first divided by it, in float16."""
    return INT4_ROWS.pack(q) | {"weight_scale_2": q.dequantize().abs().amax() / E4M3.max}


W4A8 = Packing(_w4a8_stored, _w4a8_pack, INT4_ROWS.unpack)
"""INT4 weights for FP8 inputs."""


def packing(quant: QuantSpec) -> Packing:
    """See `FileFormat.packing`."""
    assert quant.weight is not None
    if quant.weight.element == INT4:
        if not quant.weight.grouped:
            return INT4_BY_ROW
        return W4A8 if quant.input is not None else INT4_ROWS
    return hf.packing(quant)


def _by_row_stored(fmt: Format, shape: Shape) -> dict[str, Stored]:
    return INT4_ROWS.stored(fmt, shape) | {"weight_scale": Stored(torch.float32, (shape[0],))}


def _by_row_pack(q: QTensor) -> dict[str, Tensor]:
    return INT4_ROWS.pack(q) | {"weight_scale": q.scale.float().reshape(-1)}


def _by_row_unpack(parts: Mapping[str, Tensor], fmt: Format, shape: Shape) -> QTensor:
    scale = parts["weight_scale"].reshape(-1, 1)
    return INT4_ROWS.unpack({**parts, "weight_scale": scale}, fmt, shape)


INT4_BY_ROW = Packing(_by_row_stored, _by_row_pack, _by_row_unpack)
"""INT4 weights with a scale a row."""


def input_scale(quant: QuantSpec) -> InputScale:
    """See `FileFormat.input_scale`."""
    return InputScale("input_scale", ())


def prescale(linear: LinearShape, quant: QuantSpec) -> bool:
    """See `FileFormat.prescale`."""
    return algorithm(quant) in PRESCALED


def kv_scale_names(layer: int, names: Names) -> tuple[str, str]:
    """See `FileFormat.kv_scale_names`."""
    return hf.kv_scale_names(layer, names)


def kv_scale_shape(kv: KVSpec, heads: int) -> tuple[int, ...]:
    """See `FileFormat.kv_scale_shape`."""
    return ()


def configs(spec: DecoderSpec, quantization: Quantization, names: Names) -> dict[str, Any]:
    """TensorRT-LLM's own config.json is written by `TrtWriter`."""
    return {}


def read(files: Files, spec: DecoderSpec, names: Names) -> Quantization:
    """See `FileFormat.read`."""
    said = files.config["quantization_config"]
    quant = {}
    for name, words in said["linears"].items():
        kind = _spec_of(words)
        entry = f"{names.module(name)}.pre_quant_scale"
        quant[name] = replace(kind, prescale=entry in files.entries)
        if kind.prescale and not quant[name].prescale:
            raise CheckpointError(f"{files.path}: {name} has no prequant_scaling_factor, though it is {words}")
    cache = said["kv_cache_quant_algo"]
    if cache not in (None, *CACHES):
        raise UnsupportedError(f"kv_cache_quant_algo {cache!r} is not supported; known: {', '.join(CACHES)}")
    return Quantization(quant, dict.fromkeys(range(len(spec.layers)), CACHES[cache]) if cache else {})


def _spec_of(words: Mapping[str, Any]) -> QuantSpec:
    """The QuantSpec of ``quant_algo`` with its group size and the dtype its scales count in."""
    algo, group = words.get("quant_algo"), words.get("group_size")
    if algo not in ALGORITHMS:
        raise UnsupportedError(f"quant_algo {algo!r} is not supported; known: {', '.join(ALGORITHMS)}")
    kind = ALGORITHMS[algo]
    assert kind.weight is not None
    if kind.weight.element == INT4:
        name = f"int4_g{group or 128}" if kind.weight.grouped else "int4_row"
        scale = {f"torch.{d}": getattr(torch, d) for d in ("float32", "float16", "bfloat16")}.get(
            words.get("scale_dtype", "torch.float32")
        )
        if name not in FORMATS or scale is None:
            raise UnsupportedError(f"{algo} in groups of {group} with {words.get('scale_dtype')} scales is unknown")
        return replace(kind, weight=replace(FORMATS[name], scale=scale))
    if group not in (None, kind.weight.block[1]) and kind.weight.grouped:
        raise UnsupportedError(f"{algo} in groups of {group} is not supported")
    return kind

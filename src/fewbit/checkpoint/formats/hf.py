"""Model Optimizer's unified Hugging Face layout; without quantization, an ordinary Hugging Face directory.

Layouts as Model Optimizer 0.47 writes them. Two files say the same: ``hf_quant_config.json`` (TensorRT-LLM trusts it)
and ``quantization_config`` in config.json (SGLang prefers it).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fewbit.checkpoint.files import DTYPES, Files, read_json
from fewbit.checkpoint.layout import InputScale, Packing, Quantization, Shape, Stored, scale_grid
from fewbit.checkpoint.names import Names
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.numerics.element import E2M1, E4M3, INT4, INT8
from fewbit.numerics.format import ALL, FORMATS, Format
from fewbit.numerics.pack import pack_nibbles, unpack_nibbles
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.quantspec import KVSpec, QuantSpec
from fewbit.spec.decoder import DecoderSpec, LinearShape
from fewbit.version import __version__

NAME = "hf"
CONFIG = "hf_quant_config.json"
CAST = {INT8: torch.int8, E4M3: torch.float8_e4m3fn}

_FP8, _FP8_ROW, _NVFP4 = FORMATS["fp8"], FORMATS["fp8_row"], FORMATS["nvfp4"]
ALGORITHMS = {
    "FP8": QuantSpec(_FP8, _FP8, "static"),
    "FP8_PER_CHANNEL_PER_TOKEN": QuantSpec(_FP8_ROW, _FP8_ROW, "dynamic"),
    "W8A16": QuantSpec(FORMATS["int8_row"]),
    "W4A16_AWQ": QuantSpec(FORMATS["int4_g128"]),
    "NVFP4": QuantSpec(_NVFP4, _NVFP4, "outer"),
    "W4A16_NVFP4": QuantSpec(_NVFP4),
}
"""``quant_algo`` to what it means. W4A16_AWQ also comes in other group sizes."""
GROUPED = {"W4A16_AWQ": "group_size", "NVFP4": "group_size", "W4A16_NVFP4": "group_size"}
PRESCALED = (".attn.o", ".mlp.down")
"""Linears of W4A16_AWQ whose ``pre_quant_scale`` TensorRT-LLM insists on finding, ones if need be."""


def detect(files: Files) -> bool:
    """Unquantized, or by either of the two files."""
    method = (files.config.get("quantization_config") or {}).get("quant_method")
    return method == "modelopt" or (method is None and not files.config.get("quantization_config"))


# --- packings ---------------------------------------------------------------------------------------------------------


def _plain_stored(fmt: Format, shape: Shape) -> dict[str, Stored]:
    scale: Shape = () if fmt.block == (ALL, ALL) else (shape[0],)
    return {"weight": Stored(CAST[fmt.element], shape), "weight_scale": Stored(torch.float32, scale)}


def _plain_pack(q: QTensor) -> dict[str, Tensor]:
    scale = q.scale.float().reshape(() if q.format.block == (ALL, ALL) else (q.shape[0],))
    return {"weight": q.codes.view(CAST[q.format.element]), "weight_scale": scale}


def _plain_unpack(parts: Mapping[str, Tensor], fmt: Format, shape: Shape) -> QTensor:
    assert isinstance(fmt.scale, torch.dtype)
    scale = parts["weight_scale"].reshape(scale_grid(fmt, shape)).to(fmt.scale)
    return QTensor(fmt, parts["weight"].view(torch.uint8), scale)


PLAIN = Packing(_plain_stored, _plain_pack, _plain_unpack)
"""One code a byte."""


def _int4_stored(fmt: Format, shape: Shape) -> dict[str, Stored]:
    return {
        "weight": Stored(torch.uint8, (shape[0] // 2, shape[1])),
        "weight_scale": Stored(torch.float32, scale_grid(fmt, shape)),
    }


def _int4_pack(q: QTensor) -> dict[str, Tensor]:
    return {"weight": pack_nibbles(q.codes, dim=0), "weight_scale": q.scale.float()}


def _int4_unpack(parts: Mapping[str, Tensor], fmt: Format, shape: Shape) -> QTensor:
    assert isinstance(fmt.scale, torch.dtype)
    return QTensor(fmt, unpack_nibbles(parts["weight"], dim=0), parts["weight_scale"].to(fmt.scale))


INT4_ROWS = Packing(_int4_stored, _int4_pack, _int4_unpack)
"""Two's complement nibbles packed along the *rows*: byte row r holds rows 2r (low) and 2r + 1."""


def _nvfp4_stored(fmt: Format, shape: Shape) -> dict[str, Stored]:
    return {
        "weight": Stored(torch.uint8, (shape[0], shape[1] // 2)),
        "weight_scale": Stored(torch.float8_e4m3fn, scale_grid(fmt, shape)),
        "weight_scale_2": Stored(torch.float32, ()),
    }


def _nvfp4_pack(q: QTensor) -> dict[str, Tensor]:
    assert q.outer is not None
    scale = q.scale.view(torch.float8_e4m3fn)
    return {"weight": pack_nibbles(q.codes), "weight_scale": scale, "weight_scale_2": q.outer.reshape(())}


def _nvfp4_unpack(parts: Mapping[str, Tensor], fmt: Format, shape: Shape) -> QTensor:
    outer = parts["weight_scale_2"].reshape(())
    return QTensor(fmt, unpack_nibbles(parts["weight"]), parts["weight_scale"].view(torch.uint8), outer)


NVFP4 = Packing(_nvfp4_stored, _nvfp4_pack, _nvfp4_unpack)
"""E2M1 nibbles along the columns, block scales, and the outer scale as a multiplier."""


def packing(quant: QuantSpec) -> Packing:
    """See `FileFormat.packing`."""
    assert quant.weight is not None
    return {INT4: INT4_ROWS, E2M1: NVFP4}.get(quant.weight.element, PLAIN)


def input_scale(quant: QuantSpec) -> InputScale:
    """See `FileFormat.input_scale`."""
    return InputScale("input_scale", ())


def prescale(linear: LinearShape, quant: QuantSpec) -> bool:
    """See `FileFormat.prescale`."""
    return quant.weight is not None and quant.weight.element == INT4 and linear.name.endswith(PRESCALED)


def kv_scale_names(layer: int, names: Names) -> tuple[str, str]:
    """See `FileFormat.kv_scale_names`."""
    return f"{names.module(f'layers.{layer}.attn.k')}.k_scale", f"{names.module(f'layers.{layer}.attn.v')}.v_scale"


def kv_scale_shape(kv: KVSpec, heads: int) -> tuple[int, ...]:
    """See `FileFormat.kv_scale_shape`."""
    return ()


# --- the two configs --------------------------------------------------------------------------------------------------


def _algorithm(quant: QuantSpec) -> str | None:
    """The one word this layout has for a QuantSpec."""
    weight = quant.weight
    if quant.lowrank:
        return None
    if weight is not None and weight.element == INT4 and weight.zero is None and quant.input is None:
        return "W4A16_AWQ"
    plain = replace(quant, prescale=False)
    return next((word for word, meaning in ALGORITHMS.items() if meaning == plain), None)


def why_not(spec: DecoderSpec, quantization: Quantization) -> str | None:
    """See `FileFormat.why_not`."""
    other = "use --export compressed-tensors, which can"
    kinds = set(quantization.quant.values())
    out = {linear.name: linear.out_features for linear in spec.linears()}
    for name, quant in quantization.quant.items():
        if _algorithm(quant) is None:
            return f"{name}: Model Optimizer's layout has no word for {quant}; {other}"
        if quant.weight is not None and quant.weight.element == INT4 and out[name] % 2:
            return f"{name}: this layout packs INT4 along the rows and {out[name]} is odd; {other}"
    if len({replace(kind, prescale=False) for kind in kinds}) > 1:
        return f"one format for all layers is written in this layout, not {len(kinds)}; {other}"
    for kv in quantization.kv.values():
        if kv != KVSpec(_FP8, _FP8):
            return f"Model Optimizer's layout has no word for K and V in {kv}; {other}"
    if quantization.kv and len(quantization.kv) != len(spec.layers):
        return f"one K and V format for all layers is written in this layout; {other}"
    return None


def _group_args(fmt: Format) -> dict[str, Any]:
    args: dict[str, Any] = {
        "dynamic": False,
        "num_bits": fmt.element.bits,
        "type": "int" if fmt.element.integer else "float",
    }
    if fmt.grouped:
        args["group_size"] = fmt.block[1]
    if fmt.element == INT4:
        args["scale_dtype"] = str(fmt.scale)  # the file holds float32: this says how many of its bits count
    return args


def configs(spec: DecoderSpec, quantization: Quantization, names: Names) -> dict[str, Any]:
    """See `FileFormat.configs`."""
    if not quantization.quant and not quantization.kv:
        return {}
    kind = next(iter(quantization.quant.values()), None)
    dense = [names.module(linear.name) for linear in spec.linears() if linear.name not in quantization.quant]
    dense += map(names.module, spec.routers())
    producer = {"name": "fewbit", "version": __version__}
    word = None if kind is None else _algorithm(kind)
    nested: dict[str, Any] = {"quant_algo": word, "kv_cache_quant_algo": "FP8" if quantization.kv else None}
    flat: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": word, "ignore": dense, "producer": producer}
    if word in GROUPED:
        assert kind is not None
        assert kind.weight is not None
        nested["group_size"] = kind.weight.block[1]
        if word == "W4A16_AWQ":
            nested |= {"has_zero_point": False, "pre_quant_scale": True}
    nested["exclude_modules"] = dense
    if word in ("FP8", "NVFP4", "W4A16_NVFP4", "W4A16_AWQ"):
        assert kind is not None
        assert kind.weight is not None
        group: dict[str, Any] = {"weights": _group_args(kind.weight), "targets": ["Linear"]}
        if kind.input is not None:
            group["input_activations"] = _group_args(kind.input)
        flat["config_groups"] = {"group_0": group}
    if quantization.kv:
        flat["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    return {"quantization_config": flat, CONFIG: {"producer": producer, "quantization": nested}}


def _excluded(module: str, patterns: list[str]) -> bool:
    """Whether an exclude pattern means a module: by name, by wildcard, or by the name of a parent."""
    return any(fnmatch.fnmatchcase(module, p) or module.startswith(f"{p}.") for p in patterns)


def _words(files: Files) -> dict[str, Any]:
    """The quantization as the nested file says it, from whichever of the two files is there."""
    flat = files.config.get("quantization_config") or {}
    if (files.path / CONFIG).exists():
        stored = read_json(files.path / CONFIG)
        nested = stored.get("quantization", stored)
        if flat and nested.get("quant_algo") != flat.get("quant_algo"):
            raise CheckpointError(
                f"{CONFIG} says quant_algo {nested.get('quant_algo')!r} and config.json {flat.get('quant_algo')!r}"
            )
    else:
        nested = flat
    if nested is not flat and "quantization" not in nested and "ignore" in nested:
        flat = flat or nested
    scheme = flat.get("kv_cache_scheme")  # for FP8 an object; anything else is a bare word
    weights = ((flat.get("config_groups") or {}).get("group_0") or {}).get("weights") or {}
    return {
        "algo": nested.get("quant_algo"),
        "kv": nested.get("kv_cache_quant_algo", "FP8" if isinstance(scheme, dict) else scheme),
        "exclude": nested.get("exclude_modules", nested.get("ignore", flat.get("ignore"))) or [],
        "group": nested.get("group_size", weights.get("group_size")),
        "scale": weights.get("scale_dtype", "torch.float32"),
    }


def read(files: Files, spec: DecoderSpec, names: Names) -> Quantization:
    """See `FileFormat.read`."""
    if not files.config.get("quantization_config") and not (files.path / CONFIG).exists():
        return Quantization({}, {})
    words = _words(files)
    quant: dict[str, QuantSpec] = {}
    if words["algo"] is not None:
        kind = _spec_of(words)
        for linear in spec.linears():
            if not _excluded(names.module(linear.name), words["exclude"]):
                quant[linear.name] = kind
    if spec.tied:
        quant.pop("lm_head", None)
    if words["kv"] not in (None, "FP8"):
        raise UnsupportedError(f"{CONFIG}: kv_cache_quant_algo {words['kv']!r} is not supported; known: FP8")
    kv = dict.fromkeys(range(len(spec.layers)), KVSpec(_FP8, _FP8)) if words["kv"] else {}
    for linear in spec.linears():
        # smoothing scales that nothing could absorb lie beside some linears: the files say which
        if linear.name in quant and f"{names.module(linear.name)}.pre_quant_scale" in files.entries:
            quant[linear.name] = replace(quant[linear.name], prescale=True)
    return Quantization(quant, kv)


def _spec_of(words: Mapping[str, Any]) -> QuantSpec:
    """The QuantSpec of ``quant_algo`` with its group size and scale dtype."""
    if words["algo"] not in ALGORITHMS:
        raise UnsupportedError(
            f"{CONFIG}: quant_algo {words['algo']!r} is not supported; known: {', '.join(ALGORITHMS)}"
        )
    kind = ALGORITHMS[words["algo"]]
    assert kind.weight is not None
    if kind.weight.element == INT4:
        name = f"int4_g{words['group'] or 128}"
        scale = next((d for d in DTYPES.values() if str(d) == words["scale"]), None)
        if name not in FORMATS or scale is None:
            raise UnsupportedError(
                f"{CONFIG}: INT4 groups of {words['group']} with {words['scale']} scales are not supported"
            )
        return QuantSpec(replace(FORMATS[name], scale=scale))
    if words["group"] not in (None, kind.weight.block[1]) and kind.weight.grouped:
        raise UnsupportedError(f"{CONFIG}: {words['algo']} with groups of {words['group']} is not supported")
    return kind

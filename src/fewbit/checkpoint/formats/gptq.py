"""GPTQ's layout, which AutoGPTQ made the custom and GPTQModel, vLLM, SGLang and transformers load.

A linear [out, in] lies transposed: ``qweight`` int32 words of codes along *in*, ``qzeros`` int32 words along *out*,
``scales`` [groups, out], and ``g_idx`` [in], the group of each column. W = (code - zero) * scale, all unsigned. The
first version of the layout stores zero - 1, the second (``checkpoint_format: gptq_v2``) the zero.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fewbit.checkpoint import weights_only
from fewbit.checkpoint.files import Files, read_json
from fewbit.checkpoint.layout import Packing, Quantization, Shape, Stored, scale_grid
from fewbit.checkpoint.names import Names, packed_linears
from fewbit.checkpoint.weights_only import OTHER
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.numerics.element import INT4, INT8
from fewbit.numerics.format import ALL, Format, integer_format
from fewbit.numerics.pack import pack_words, unpack_words
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.quantspec import QuantSpec
from fewbit.spec.decoder import DecoderSpec, LinearShape
from fewbit.version import __version__

NAME = "gptq"
OLD_CONFIG = "quantize_config.json"
"""Where AutoGPTQ says it, in older files alone."""
BITS = (2, 3, 4, 8)
VERSIONS = ("gptq", "gptq_v2")


def detect(files: Files) -> bool:
    """By config.json, or by the older file beside it."""
    method = files.config.get("quantization_config")
    if not method and (files.path / OLD_CONFIG).is_file():
        return bool(read_json(files.path / OLD_CONFIG).get("quant_method", NAME) == NAME)
    return (method or {}).get("quant_method") == NAME


# --- packing ----------------------------------------------------------------------------------------------------------


def _stored(fmt: Format, shape: Shape, g_idx: bool, bias: bool) -> dict[str, Stored]:
    assert isinstance(fmt.scale, torch.dtype)
    (out, columns), bits = shape, fmt.element.bits
    groups = scale_grid(fmt, shape)[1]
    stored = {
        "qweight": Stored(torch.int32, (columns * bits // 32, out)),
        "qzeros": Stored(torch.int32, (groups, out * bits // 32)),
        "scales": Stored(fmt.scale, (groups, out)),
    }
    if g_idx:
        stored["g_idx"] = Stored(torch.int32, (columns,))
    if bias:
        stored["bias"] = Stored(fmt.scale, (out,))
    return stored


def _in_order(fmt: Format, columns: int, device: torch.device) -> Tensor:
    """The group of each column where groups are runs of columns, int32 [in]."""
    width = columns if fmt.block[1] == ALL else fmt.block[1]
    return torch.arange(columns, dtype=torch.int32, device=device) // width


def _pack(q: QTensor, version: str) -> dict[str, Tensor]:
    bits = q.format.element.bits
    half = 1 << (bits - 1)  # two's complement to unsigned
    zero = torch.zeros_like(q.scale, dtype=torch.int8) if q.zero is None else q.zero
    unsigned = zero.int() + half - int(version == "gptq")
    group_of = _in_order(q.format, q.shape[1], q.codes.device) if q.group_of is None else q.group_of
    return {
        "qweight": pack_words((q.codes ^ half).t(), bits, dim=0),
        "qzeros": pack_words((unsigned & ((1 << bits) - 1)).to(torch.uint8).t(), bits),
        "scales": q.scale.t(),
        "g_idx": group_of.int(),
    }


def _unpack(parts: Mapping[str, Tensor], fmt: Format, shape: Shape, version: str) -> QTensor:
    bits = fmt.element.bits
    half = 1 << (bits - 1)
    codes = unpack_words(parts["qweight"], bits, shape[1], dim=0).t().contiguous() ^ half
    stored = unpack_words(parts["qzeros"], bits, shape[0]).t().int()
    # a zero of 0 has no number below it: the first version's writers let it wrap, and so does its reader
    zero = ((stored + int(version == "gptq")) & ((1 << bits) - 1)) - half
    if fmt.zero is None and zero.any():
        raise CheckpointError("its config says 'sym': true, but qzeros are not all in the middle; say 'sym': false")
    if "bias" in parts and parts["bias"].any():
        raise CheckpointError("has a bias that is not zero, where config.json says there is none")
    group_of = _group_of(parts.get("g_idx"), fmt, shape)
    scale = parts["scales"].t().contiguous()
    return QTensor(fmt, codes, scale, zero=zero.to(torch.int8) if fmt.zero else None, group_of=group_of)


def _group_of(g_idx: Tensor | None, fmt: Format, shape: Shape) -> Tensor | None:
    """The group of each column, of a act_order format; checked."""
    if g_idx is None:
        return None
    groups = scale_grid(fmt, shape)[1]
    if g_idx.min() < 0 or g_idx.max() >= groups:
        raise CheckpointError(f"g_idx names group {int(g_idx.max())}, expected 0 to {groups - 1}")
    if fmt.act_order:
        return g_idx
    if not torch.equal(g_idx, _in_order(fmt, shape[1], g_idx.device)):
        raise CheckpointError(
            "g_idx orders the columns, though 'desc_act' is false in its config; say 'desc_act': true"
        )
    return None


@functools.cache
def _packing(version: str, g_idx: bool = True, bias: bool = False) -> Packing:
    return Packing(
        functools.partial(_stored, g_idx=g_idx, bias=bias),
        functools.partial(_pack, version=version),
        functools.partial(_unpack, version=version),
    )


def _version(quant: QuantSpec) -> str:
    """As written: the first version, which most engines read, has no safe way to say a zero of 0."""
    assert quant.weight is not None
    return "gptq_v2" if quant.weight.zero else "gptq"


def packing(quant: QuantSpec) -> Packing:
    """See `Reader.packing`: as written."""
    return _packing(_version(quant))


input_scale, prescale = weights_only.input_scale, weights_only.prescale
kv_scale_names, kv_scale_shape = weights_only.kv_scale_names, weights_only.kv_scale_shape


# --- config -----------------------------------------------------------------------------------------------------------


def why_not(spec: DecoderSpec, quantization: Quantization) -> str | None:
    """See `FileFormat.why_not`."""
    if reason := weights_only.why_not("GPTQ's layout", quantization):
        return reason
    shapes = {linear.name: linear for linear in spec.linears()}
    for name, quant in quantization.quant.items():
        fmt, shape = quant.weight, shapes[name]
        assert fmt is not None
        if fmt.element not in (INT4, INT8):
            return f"{name}: GPTQ's layout is written with 4 or 8 bits, not {quant}; {OTHER}"
        per_word = 32 // fmt.element.bits
        if shape.in_features % per_word or shape.out_features % per_word:
            return f"{name}: {shape.out_features} x {shape.in_features} does not fill words of {per_word}; {OTHER}"
    kinds = {(q.weight.element, q.weight.block, q.weight.zero) for q in quantization.quant.values() if q.weight}
    if len(kinds) > 1:
        return f"GPTQ's layout says one format for all layers, not {len(kinds)}; {OTHER}"
    return None


def configs(spec: DecoderSpec, quantization: Quantization, names: Names) -> dict[str, Any]:
    """See `FileFormat.configs`."""
    kinds = list(quantization.quant.values())
    fmt = kinds[0].weight
    assert fmt is not None
    dense = [names.module(x.name) for x in spec.linears() if x.name not in quantization.quant and x.name != "lm_head"]
    dense += map(names.module, spec.routers())
    config: dict[str, Any] = {
        "quant_method": NAME,
        "checkpoint_format": _version(kinds[0]),
        "bits": fmt.element.bits,
        "group_size": fmt.block[1],  # ALL is their -1 too
        "desc_act": any(kind.weight is not None and kind.weight.act_order for kind in kinds),
        "sym": fmt.zero is None,
        "lm_head": "lm_head" in quantization.quant,
        "meta": {"quantizer": [f"fewbit:{__version__}"]},
    }
    if dense:
        config["dynamic"] = {f"-:^{re.escape(module)}$": {} for module in dense}
    return {"quantization_config": config, OLD_CONFIG: config}


def _config(files: Files) -> Mapping[str, Any]:
    """What config.json says, or the older file; both must agree."""
    said: Mapping[str, Any] = files.config.get("quantization_config") or {}
    if not (files.path / OLD_CONFIG).is_file():
        return said
    old = read_json(files.path / OLD_CONFIG)
    for field in ("bits", "group_size", "desc_act", "sym"):
        if field in said and field in old and said[field] != old[field]:
            raise CheckpointError(f"{OLD_CONFIG} says {field} {old[field]!r} and config.json {said[field]!r}")
    return said or old


def read(files: Files, spec: DecoderSpec, names: Names) -> Quantization:
    """See `Reader.read`."""
    config = _config(files)
    bits, group, version = config.get("bits"), config.get("group_size", -1), config.get("checkpoint_format", "gptq")
    if version not in VERSIONS:
        raise UnsupportedError(f"GPTQ: checkpoint_format {version!r} is not supported; known: {', '.join(VERSIONS)}")
    if bits not in BITS:
        raise UnsupportedError(f"GPTQ: {bits!r} bits are not supported; known: {', '.join(map(str, BITS))}")
    if not isinstance(group, int) or isinstance(group, bool) or group < -1 or group == 0:
        raise CheckpointError(f"GPTQ: group_size is {group!r}, expected a number of columns, or -1 for all")
    for field in ("desc_act", "sym"):
        if not isinstance(config.get(field, True), bool):
            raise CheckpointError(f"GPTQ: {field} is {config[field]!r}, expected true or false")
    if changed := [rule for rule in config.get("dynamic") or {} if not rule.startswith("-:")]:
        raise UnsupportedError(f"GPTQ: rules for some layers ('dynamic': {changed[0]!r}) are not supported")
    quant, packings = {}, {}
    for linear in packed_linears(files, spec, names, "qweight"):
        module = names.module(linear.name)
        fmt = _format(config, linear, files.entries.get(f"{module}.scales"))
        g_idx = fmt.act_order or f"{module}.g_idx" in files.entries
        bias = not linear.bias and f"{module}.bias" in files.entries  # older writers gave every linear one of zeros
        quant[linear.name], packings[linear.name] = QuantSpec(fmt), _packing(version, g_idx, bias)
    return Quantization(quant, {}, packings)


def _format(config: Mapping[str, Any], linear: LinearShape, scales: Stored | None) -> Format:
    """The numerics of one linear; its scales are what the file has."""
    bits, group, act_order = config["bits"], config.get("group_size", -1), bool(config.get("desc_act"))
    if group > linear.in_features:
        group = ALL
    if group != ALL and linear.in_features % group:
        raise CheckpointError(f"{linear.name}: {linear.in_features} columns do not divide into groups of {group}")
    if linear.in_features * bits % 32 or linear.out_features * bits % 32:
        raise CheckpointError(
            f"{linear.name}: {linear.out_features} x {linear.in_features} codes of {bits} bits do not fill 32-bit words"
        )
    asym, ordered = not config.get("sym", True), act_order and group != ALL
    fmt = integer_format(bits, (1, group), asym=asym, act_order=ordered)
    return replace(fmt, scale=scales.dtype if scales is not None and scales.dtype.is_floating_point else torch.float16)

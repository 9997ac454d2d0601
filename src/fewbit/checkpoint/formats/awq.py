"""AutoAWQ's layout for its "gemm" kernels, which vLLM, SGLang and transformers load.

A linear [out, in] lies transposed: ``qweight`` int32 [in, out / 8], ``qzeros`` int32 [in / group, out / 8] and
``scales`` [in / group, out]. A word holds the 4-bit codes of eight neighbouring outputs, not in their order.
W = (code - zero) * scale, all unsigned.
"""

from __future__ import annotations

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
from fewbit.numerics.element import INT4
from fewbit.numerics.format import ALL, Format, integer_format
from fewbit.numerics.pack import pack_words, unpack_words
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.quantspec import QuantSpec
from fewbit.spec.decoder import DecoderSpec

NAME = "awq"
OLD_CONFIG = "quant_config.json"
"""Where AutoAWQ said it before config.json could, in words of its own."""
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output, of eight neighbours, whose code is in each nibble of a word, the lowest first."""
_BACK = tuple(ORDER.index(place) for place in range(8))
_HALF = 8


def detect(files: Files) -> bool:
    """By config.json, or by the older file beside it."""
    method = files.config.get("quantization_config")
    return (method or {}).get("quant_method") == NAME or (not method and (files.path / OLD_CONFIG).is_file())


# --- packing ----------------------------------------------------------------------------------------------------------


def _words(codes: Tensor) -> Tensor:
    """Unsigned codes [rows, out] to int32 [rows, out / 8]."""
    return pack_words(codes.unflatten(1, (-1, 8))[..., ORDER].flatten(1), 4)


def _codes(words: Tensor, out: int) -> Tensor:
    """The inverse of `_words`."""
    codes: Tensor = unpack_words(words, 4, out).unflatten(1, (-1, 8))[..., _BACK]
    return codes.flatten(1)


def _stored(fmt: Format, shape: Shape) -> dict[str, Stored]:
    assert isinstance(fmt.scale, torch.dtype)
    (out, columns), groups = shape, scale_grid(fmt, shape)[1]
    return {
        "qweight": Stored(torch.int32, (columns, out // 8)),
        "qzeros": Stored(torch.int32, (groups, out // 8)),
        "scales": Stored(fmt.scale, (groups, out)),
    }


def _pack(q: QTensor) -> dict[str, Tensor]:
    zero = torch.zeros_like(q.scale, dtype=torch.int8) if q.zero is None else q.zero
    return {
        "qweight": _words((q.codes ^ _HALF).t()),  # two's complement to unsigned
        "qzeros": _words((zero.int() + _HALF).to(torch.uint8).t()),
        "scales": q.scale.t(),
    }


def _unpack(parts: Mapping[str, Tensor], fmt: Format, shape: Shape) -> QTensor:
    zero = (_codes(parts["qzeros"], shape[0]).t().int() - _HALF).to(torch.int8).contiguous()
    codes = _codes(parts["qweight"], shape[0]).t().contiguous() ^ _HALF
    return QTensor(fmt, codes, parts["scales"].t().contiguous(), zero=zero)


WORDS = Packing(_stored, _pack, _unpack)


def packing(quant: QuantSpec) -> Packing:
    """See `Reader.packing`."""
    return WORDS


input_scale, prescale = weights_only.input_scale, weights_only.prescale
kv_scale_names, kv_scale_shape = weights_only.kv_scale_names, weights_only.kv_scale_shape


# --- config -----------------------------------------------------------------------------------------------------------


def why_not(spec: DecoderSpec, quantization: Quantization) -> str | None:
    """See `FileFormat.why_not`."""
    if reason := weights_only.why_not("AutoAWQ's layout", quantization):
        return reason
    shapes = {linear.name: linear for linear in spec.linears()}
    for name, quant in quantization.quant.items():
        if quant.weight is None or quant.weight.element != INT4 or quant.weight.act_order:
            return f"{name}: AutoAWQ's layout has no word for {quant}; {OTHER}"
        if shapes[name].out_features % 8:
            return f"{name}: {shapes[name].out_features} outputs do not fill words of 8; {OTHER}"
    if "lm_head" in quantization.quant:
        return f"lm_head: AutoAWQ's layout leaves the head as it is; {OTHER}"
    if len({quant.weight.block for quant in quantization.quant.values() if quant.weight}) > 1:
        return f"AutoAWQ's layout says one group size for all layers; {OTHER}"
    return None


def configs(spec: DecoderSpec, quantization: Quantization, names: Names) -> dict[str, Any]:
    """See `FileFormat.configs`."""
    fmt = next(iter(quantization.quant.values())).weight
    assert fmt is not None
    dense = [names.module(linear.name) for linear in spec.linears() if linear.name not in quantization.quant]
    dense += map(names.module, spec.routers())
    config = {
        "quant_method": NAME,
        "bits": 4,
        "group_size": fmt.block[1],  # ALL is their -1 too
        "zero_point": True,  # symmetric weights are zeros of 8
        "version": "gemm",
        "modules_to_not_convert": dense,
    }
    return {"quantization_config": config}


def read(files: Files, spec: DecoderSpec, names: Names) -> Quantization:
    """See `Reader.read`."""
    config: Mapping[str, Any] = files.config.get("quantization_config") or {}
    if not config:
        old = read_json(files.path / OLD_CONFIG)
        config = {"bits": old.get("w_bit"), "group_size": old.get("q_group_size"), **old}
    bits, group, version = config.get("bits"), config.get("group_size"), str(config.get("version", "gemm")).lower()
    if bits != 4 or version != "gemm" or config.get("zero_point", True) is not True:
        raise UnsupportedError(
            f"AWQ: {bits!r} bits, version {version!r}, zero_point {config.get('zero_point')!r} are not supported; "
            "known: 4 bits, version 'gemm', with zero points"
        )
    if not isinstance(group, int) or isinstance(group, bool) or group < -1 or group == 0:
        raise CheckpointError(f"AWQ: group_size is {group!r}, expected a number of columns, or -1 for all")
    quant = {}
    for linear in packed_linears(files, spec, names, "qweight"):
        if (group != ALL and linear.in_features % group) or linear.out_features % 8:
            raise CheckpointError(
                f"{linear.name}: {linear.out_features} x {linear.in_features} does not divide into words of 8 outputs "
                f"and groups of {group} columns"
            )
        scales = files.entries.get(f"{names.module(linear.name)}.scales")
        scale = scales.dtype if scales is not None and scales.dtype.is_floating_point else torch.float16
        quant[linear.name] = QuantSpec(replace(integer_format(4, (1, group), asym=True), scale=scale))
    return Quantization(quant, {})

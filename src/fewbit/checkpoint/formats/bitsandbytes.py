"""bitsandbytes' NF4 and INT8, as transformers saves them. Only read.

NF4: ``weight`` uint8 [out * in / 2, 1], the first of two codes in the *high* nibble, and ``weight.absmax``, a scale
for each run of 64 (or so) numbers of the flattened weight. With double quantization these scales are bytes themselves:
an index into ``weight.nested_quant_map`` times a scale for each 256 of them, plus an offset that stands in the JSON
object ``weight.quant_state.bitsandbytes__nf4``. INT8: ``weight`` int8, ``SCB`` the largest magnitude of each row.

Only weights are read: that the library also rounds inputs of INT8, all but outliers, is its kernel's affair.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fewbit.checkpoint.files import Files
from fewbit.checkpoint.layout import Packing, Quantization, Shape, Stored
from fewbit.checkpoint.names import Names
from fewbit.checkpoint.places import Places
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.numerics.element import NF4
from fewbit.numerics.format import FORMATS, Format
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.quantspec import QuantSpec
from fewbit.spec.decoder import DecoderSpec

NAME = "bitsandbytes"
STATE = "weight.quant_state.bitsandbytes__nf4"
NESTED = 256
"""Scales that share a scale."""


def detect(files: Files) -> bool:
    """By config.json alone."""
    config = files.config.get("quantization_config") or {}
    return config.get("quant_method") == NAME or bool(config.get("load_in_4bit") or config.get("load_in_8bit"))


def _never(q: QTensor) -> dict[str, Tensor]:
    raise AssertionError("only read")


def _int8_stored(fmt: Format, shape: Shape, marked: bool) -> dict[str, Stored]:
    stored = {"weight": Stored(torch.int8, shape), "SCB": Stored(torch.float32, shape[:1])}
    return stored | ({"weight_format": Stored(torch.uint8, ())} if marked else {})


def _int8_unpack(parts: Mapping[str, Tensor], fmt: Format, shape: Shape) -> QTensor:
    if "weight_format" in parts and int(parts["weight_format"]) != 0:
        raise CheckpointError(f"weight_format {int(parts['weight_format'])} is not supported; known: 0, by rows")
    return QTensor(fmt, parts["weight"].view(torch.uint8), (parts["SCB"] / 127).reshape(-1, 1))


def _nf4_stored(fmt: Format, shape: Shape, state: int, nested: bool) -> dict[str, Stored]:
    blocks = math.prod(shape) // fmt.block[1]
    stored = {
        "weight": Stored(torch.uint8, (math.prod(shape) // 2, 1)),
        "weight.absmax": Stored(torch.uint8 if nested else torch.float32, (blocks,)),
        "weight.quant_map": Stored(torch.float32, (16,)),
        STATE: Stored(torch.uint8, (state,)),
    }
    if nested:
        stored["weight.nested_absmax"] = Stored(torch.float32, (-(-blocks // NESTED),))
        stored["weight.nested_quant_map"] = Stored(torch.float32, (256,))
    return stored


def _nf4_unpack(parts: Mapping[str, Tensor], fmt: Format, shape: Shape) -> QTensor:
    try:
        state = json.loads(bytes(parts[STATE].tolist()))
        block, said, nested = state["blocksize"], state["shape"], state.get("nested_blocksize", NESTED)
        offset = float(state.get("nested_offset", 0.0))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"its quant_state is not understood: {type(error).__name__}: {error}") from None
    if (block, said, nested) != (fmt.block[1], list(shape), NESTED):
        raise CheckpointError(
            f"its quant_state says {said} in blocks of {block} (and {nested}), the files {list(shape)} in blocks of "
            f"{fmt.block[1]} (and {NESTED})"
        )
    if not torch.equal(parts["weight.quant_map"].cpu(), torch.tensor(NF4.values)):
        raise CheckpointError("its quant_map is not that of NF4")
    absmax = parts["weight.absmax"]
    if "weight.nested_absmax" in parts:
        outer = parts["weight.nested_absmax"].repeat_interleave(NESTED)[: len(absmax)]
        absmax = parts["weight.nested_quant_map"][absmax.long()] * outer + offset
    packed = parts["weight"].flatten()
    codes = torch.stack((packed >> 4, packed & 15), -1).view(shape)
    return QTensor(fmt, codes, absmax.view(shape[0], -1))


@functools.cache
def _nf4(state: int, nested: bool) -> Packing:
    return Packing(functools.partial(_nf4_stored, state=state, nested=nested), _never, _nf4_unpack)


@functools.cache
def _int8(marked: bool) -> Packing:
    return Packing(functools.partial(_int8_stored, marked=marked), _never, _int8_unpack)


def packing(quant: QuantSpec) -> Packing:
    """Never asked: `read` says how each weight lies."""
    raise AssertionError(quant)


def read(files: Files, spec: DecoderSpec, names: Names) -> Quantization:
    """See `Reader.read`: a linear is quantized if its weight is stored so."""
    config: Mapping[str, Any] = files.config["quantization_config"]
    kind = config.get("bnb_4bit_quant_type", "fp4")
    if config.get("load_in_4bit") and (kind != "nf4" or config.get("bnb_4bit_quant_storage", "uint8") != "uint8"):
        raise UnsupportedError(
            f"bitsandbytes: {kind} in {config.get('bnb_4bit_quant_storage', 'uint8')} is not supported; "
            "known: nf4 in uint8, and INT8"
        )
    quant, packings, places = {}, {}, Places(names, spec, {})
    for linear in spec.linears():
        whole = places.whole(linear.name)  # of all linears that lie in its module
        module, shape = names.module(linear.name), (whole.out_features, whole.in_features)
        weight = files.entries.get(f"{module}.weight")
        if weight is None or weight.dtype.is_floating_point:
            continue
        if weight.dtype == torch.int8:
            quant[linear.name] = QuantSpec(FORMATS["int8_row"])
            packings[linear.name] = _int8(f"{module}.weight_format" in files.entries)
            continue
        state, absmax = files.entries.get(f"{module}.{STATE}"), files.entries.get(f"{module}.weight.absmax")
        # whatever is missing is reported with its name, when all tensors are looked for
        block = math.prod(shape) // max(math.prod(absmax.shape), 1) if absmax else 64
        if block < 1 or linear.in_features % block:
            raise UnsupportedError(f"{linear.name}: rows of {linear.in_features} do not divide into blocks of {block}")
        quant[linear.name] = QuantSpec(Format(f"nf4_g{block}", NF4, (1, block)))
        nested = absmax is not None and not absmax.dtype.is_floating_point
        packings[linear.name] = _nf4(math.prod(state.shape) if state else 0, nested)
    if not quant:
        raise CheckpointError("config.json says bitsandbytes, and no linear is stored so")
    return Quantization(quant, {}, packings)

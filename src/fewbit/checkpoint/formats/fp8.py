"""Fine-grained FP8 as DeepSeek-V3 made it the custom and transformers says it. Only read.

``weight`` E4M3 [out, in] and ``weight_scale_inv``, a scale for each block of ``weight_block_size``, which multiplies
in spite of its name; without a block size one scale for the tensor, and then a calibrated ``activation_scale``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fewbit.checkpoint.files import Files
from fewbit.checkpoint.layout import InputScale, Packing, Quantization, Shape, Stored, scale_grid
from fewbit.checkpoint.names import Names
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.numerics.format import ALL, FORMATS, Format
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.quantspec import QuantSpec
from fewbit.spec.decoder import DecoderSpec

NAME = "fp8"
E4M3, SCALE = torch.float8_e4m3fn, "weight_scale_inv"


def detect(files: Files) -> bool:
    """By config.json alone."""
    return (files.config.get("quantization_config") or {}).get("quant_method") == NAME


def _stored(fmt: Format, shape: Shape, scale: torch.dtype) -> dict[str, Stored]:
    grid: Shape = () if fmt.block == (ALL, ALL) else scale_grid(fmt, shape)
    return {"weight": Stored(E4M3, shape), SCALE: Stored(scale, grid)}


def _pack(q: QTensor) -> dict[str, Tensor]:
    raise AssertionError("only read")


def _unpack(parts: Mapping[str, Tensor], fmt: Format, shape: Shape) -> QTensor:
    # powers of two may be stored as such (E8M0): float32 says them exactly
    scale = parts[SCALE].float().reshape(scale_grid(fmt, shape))
    return QTensor(fmt, parts["weight"].view(torch.uint8), scale)


@functools.cache
def _packing(scale: torch.dtype) -> Packing:
    return Packing(functools.partial(_stored, scale=scale), _pack, _unpack)


def packing(quant: QuantSpec) -> Packing:
    """See `Reader.packing`."""
    return _packing(torch.float32)


def input_scale(quant: QuantSpec) -> InputScale:
    """See `FileFormat.input_scale`."""
    return InputScale("activation_scale", ())


def _kind(config: Mapping[str, object]) -> QuantSpec:
    """What the config says of every linear."""
    block, scheme = config.get("weight_block_size"), config.get("activation_scheme", "dynamic")
    if config.get("fmt", "e4m3") != "e4m3":
        raise UnsupportedError(f"fp8: fmt {config['fmt']!r} is not supported; known: e4m3")
    if block is None:
        if scheme not in ("dynamic", "static"):
            raise UnsupportedError(f"fp8: activation_scheme {scheme!r} is not supported; known: dynamic, static")
        inputs = FORMATS["fp8"] if scheme == "static" else FORMATS["fp8_row"]
        return QuantSpec(FORMATS["fp8"], inputs, "static" if scheme == "static" else "dynamic")
    if not isinstance(block, list) or len(block) != 2 or not all(isinstance(n, int) and n > 0 for n in block):
        raise CheckpointError(f"fp8: weight_block_size is {block!r}, expected rows and columns, such as [128, 128]")
    if scheme != "dynamic":
        raise UnsupportedError(f"fp8: blocks with activation_scheme {scheme!r} are not supported; known: dynamic")
    rows, columns = block
    weight = replace(FORMATS["fp8_block"], block=(rows, columns))
    inputs = replace(FORMATS["fp8_g128"], block=(1, columns))
    if block != [128, 128]:
        weight, inputs = replace(weight, name=f"fp8_{rows}x{columns}"), replace(inputs, name=f"fp8_g{columns}")
    return QuantSpec(weight, inputs, "dynamic")


def read(files: Files, spec: DecoderSpec, names: Names) -> Quantization:
    """See `Reader.read`: a linear is quantized if its weight is stored so."""
    kind = _kind(files.config["quantization_config"])
    quant, packings = {}, {}
    for linear in spec.linears():
        module = names.module(linear.name)
        weight, scale = files.entries.get(f"{module}.weight"), files.entries.get(f"{module}.{SCALE}")
        if weight is not None and weight.dtype == E4M3:
            quant[linear.name] = kind
            stored = scale.dtype if scale is not None and scale.dtype == torch.float8_e8m0fnu else torch.float32
            packings[linear.name] = _packing(stored)
    if not quant:
        raise CheckpointError("config.json calls the model fp8, and no linear is stored so")
    return Quantization(quant, {}, packings)

"""MXFP4 as gpt-oss has it: the experts alone, without scales but the blocks' own. Only read.

`fewbit.checkpoint.mxfp4` shows the stacked tensors of a file expert by expert.
"""

from __future__ import annotations

from fewbit.checkpoint.files import Files
from fewbit.checkpoint.layout import Packing, Quantization
from fewbit.checkpoint.mxfp4 import METHOD, Unstacked
from fewbit.checkpoint.names import Names
from fewbit.checkpoint.packings.compressed_tensors import MX
from fewbit.errors import CheckpointError
from fewbit.numerics.format import FORMATS
from fewbit.numerics.quantspec import QuantSpec
from fewbit.spec.decoder import DecoderSpec

NAME = METHOD


def detect(files: Files) -> bool:
    """By config.json alone."""
    return isinstance(files, Unstacked)


def packing(quant: QuantSpec) -> Packing:
    """See `Reader.packing`."""
    return MX


def read(files: Files, spec: DecoderSpec, names: Names) -> Quantization:
    """See `Reader.read`: a linear is quantized if its weight is stored so."""
    kind, quant = QuantSpec(FORMATS["mxfp4"]), {}
    for linear in spec.linears():
        module = names.module(linear.name)
        if f"{module}.weight_packed" in files.entries or f"{module}.weight_scale" in files.entries:
            quant[linear.name] = kind
    if not quant:
        raise CheckpointError("config.json calls the model mxfp4, and no expert is stored so")
    return Quantization(quant, {})

"""GGUF: what the blocks of linears mean. Only read; `fewbit.checkpoint.gguf` reads the files."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fewbit.checkpoint.files import Files
from fewbit.checkpoint.gguf.blocks import BLOCKS, unpacked
from fewbit.checkpoint.gguf.source import GGUFFiles
from fewbit.checkpoint.layout import Packing, Quantization, Shape, Stored
from fewbit.checkpoint.names import Names
from fewbit.numerics.format import Format
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.quantspec import QuantSpec
from fewbit.spec.decoder import DecoderSpec

NAME = "gguf"


def detect(files: Files) -> bool:
    """By what opened it."""
    return isinstance(files, GGUFFiles)


def _stored(fmt: Format, shape: Shape, kind: str) -> dict[str, Stored]:
    _, numbers, nbytes, _ = BLOCKS[kind]
    return {"weight": Stored(torch.uint8, (shape[0], shape[1] // numbers * nbytes))}


def _pack(q: QTensor) -> dict[str, Tensor]:
    raise AssertionError("only read")


@functools.cache
def _packing(kind: str) -> Packing:
    return Packing(
        functools.partial(_stored, kind=kind), _pack, lambda parts, fmt, shape: unpacked(parts["weight"], kind)
    )


def packing(quant: QuantSpec) -> Packing:
    """See `Reader.packing`."""
    assert quant.weight is not None
    return _packing(quant.weight.name.upper())


def read(files: Files, spec: DecoderSpec, names: Names) -> Quantization:
    """See `Reader.read`."""
    assert isinstance(files, GGUFFiles)
    quant = {}
    for linear in spec.linears():
        kind = files.kinds.get(names.tensor(f"{linear.name}.weight"))
        if kind is not None:
            quant[linear.name] = QuantSpec(BLOCKS[kind][0])
    return Quantization(quant, {}, remarks=_remarks(files))


def _remarks(files: GGUFFiles) -> tuple[str, ...]:
    """What a user should know of how it is read."""
    kinds: dict[str, list[str]] = {}
    for name, kind in files.decoded.items():
        kinds.setdefault(kind, []).append(name)
    dtype = str(files.dtype).removeprefix("torch.")
    found = []
    for kind, those in kinds.items():
        more = f" and {len(those) - 1} more" if len(those) > 1 else ""
        found.append(f"decoded on reading to {dtype}: {those[0]}{more} ({kind})")
    return (*found, *([files.tokenizer_reason] if files.tokenizer_reason else []))

"""File formats of checkpoints: one file each, found by looking into this folder.

Readers and writers meet in `Checkpoint`; a format says only its own words: which config it recognizes, what that config
means as QuantSpecs, how each numeric format is packed, and what it cannot say.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any, Protocol, cast

from fewbit.checkpoint.files import Files
from fewbit.checkpoint.layout import InputScale, Packing, Quantization
from fewbit.checkpoint.names import Names
from fewbit.errors import UnsupportedError, nearest_name
from fewbit.numerics.quantspec import KVSpec, QuantSpec
from fewbit.spec.decoder import DecoderSpec, LinearShape


class Reader(Protocol):
    """What every module of this folder offers."""

    NAME: str  # as ``--export`` and ``inspect`` write it

    def detect(self, files: Files) -> bool:
        """Whether this directory is in this format."""
        ...

    def read(self, files: Files, spec: DecoderSpec, names: Names) -> Quantization:
        """What the config says."""
        ...

    def packing(self, quant: QuantSpec) -> Packing:
        """How the weight of a linear is laid out."""
        ...


class FileFormat(Reader, Protocol):
    """What a module offers whose format is also written."""

    def why_not(self, spec: DecoderSpec, quantization: Quantization) -> str | None:
        """None: can say all of it; else what it cannot, with the layer's name, and who can."""
        ...

    def input_scale(self, quant: QuantSpec) -> InputScale:
        """How the calibrated scale of a linear's input is stored."""
        ...

    def prescale(self, linear: LinearShape, quant: QuantSpec) -> bool:
        """Whether a vector that multiplies the linear's input has to be in the file."""
        ...

    def kv_scale_names(self, layer: int, names: Names) -> tuple[str, str]:
        """The file's names of the scales of K and V of a layer."""
        ...

    def kv_scale_shape(self, kv: KVSpec, heads: int) -> tuple[int, ...]:
        """Their shape in a layer of so many K/V heads."""
        ...

    def configs(self, spec: DecoderSpec, quantization: Quantization, names: Names) -> dict[str, Any]:
        """``quantization_config`` for config.json, and further files by name."""
        ...


@functools.cache
def readers() -> dict[str, Reader]:
    """Every format by its name."""
    modules = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
    return {module.NAME: cast("Reader", module) for module in modules}


@functools.cache
def formats() -> dict[str, FileFormat]:
    """Every format that is also written, by its name."""
    return {name: cast("FileFormat", module) for name, module in readers().items() if hasattr(module, "configs")}


def format_named(name: str) -> FileFormat:
    """The format a user asks for.

    Raises:
        UnsupportedError: no such format.
    """
    if name in readers() and name not in formats():
        raise UnsupportedError(f"checkpoint format '{name}' is only read; known: {', '.join(formats())}")
    if name not in formats():
        raise UnsupportedError(f"unknown checkpoint format '{name}'; {nearest_name(name, formats())}")
    return formats()[name]


def format_of(files: Files) -> Reader:
    """The format a directory is in.

    Raises:
        UnsupportedError: none that we read.
    """
    for fmt in readers().values():
        if fmt.detect(files):
            return fmt
    method: Mapping[str, Any] = files.config.get("quantization_config") or {}
    raise UnsupportedError(
        f"{files.path} is quantized as '{method.get('quant_method')}', which fewbit does not read; "
        f"known: {', '.join(readers())}, or an unquantized model"
    )

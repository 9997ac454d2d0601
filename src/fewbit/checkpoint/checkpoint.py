"""A checkpoint: the one meeting point of readers and writers.

Opening one reads headers; weights come when asked for.
"""

from __future__ import annotations

import fnmatch
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fewbit.checkpoint.files import CPU, DTYPES, Files
from fewbit.checkpoint.formats import FileFormat, Reader, format_of
from fewbit.checkpoint.layout import Packing, Quantization, Stored
from fewbit.checkpoint.names import Names
from fewbit.checkpoint.places import Places
from fewbit.checkpoint.prefix import with_prefix
from fewbit.checkpoint.sources import open_files
from fewbit.errors import CheckpointError
from fewbit.numerics.format import ALL
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.quantspec import KVSpec, QuantSpec
from fewbit.spec.decoder import DecoderSpec, LinearShape
from fewbit.spec.families import Family, family_of
from fewbit.spec.hfconfig import HFConfig

CARRIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "LICENSE",
)
"""Files beside the weights that every checkpoint made from this one needs too."""


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk, in our words.

    Attributes:
        path: its directory, or its file.
        folder: where the tokenizer and the other files beside the weights lie: the directory, or what looks like one.
        sources: the files on disk that hold the weights.
        format: the name of the format it is in.
        family: the family its architecture belongs to.
        spec: the decoder.
        config: config.json as read.
        dtype: dtype of what is not quantized.
        quant: QuantSpec by canonical linear; a linear not named is dense.
        kv: KVSpec by layer.
        tensors: every tensor by canonical name, read when asked for.
        files: tokenizer, generation config, chat template, by file name.
        remarks: what a user should know of how the files are read, in words.
    """

    path: Path
    folder: Traversable
    sources: tuple[Path, ...]
    format: str
    family: Family
    spec: DecoderSpec
    config: Mapping[str, Any]
    dtype: torch.dtype
    quant: Mapping[str, QuantSpec]
    kv: Mapping[int, KVSpec]
    tensors: Tensors
    files: Mapping[str, Traversable] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


Load = Callable[[torch.device], "Tensor | QTensor"]


class Tensors(Mapping[str, "Tensor | QTensor"]):
    """Canonical names to tensors, read anew on every access: hold on to what you need again."""

    def __init__(self) -> None:
        self._load: dict[str, Load] = {}
        self._dtype: dict[str, torch.dtype] = {}
        self._bytes: dict[str, int] = {}

    def add(self, name: str, load: Load, dtype: torch.dtype, nbytes: int) -> None:
        """One more tensor; `load` makes it on the device it is given."""
        self._load[name], self._dtype[name], self._bytes[name] = load, dtype, nbytes

    def __getitem__(self, name: str) -> Tensor | QTensor:
        return self.on(name, CPU)

    def on(self, name: str, device: torch.device) -> Tensor | QTensor:
        """A tensor on a device; what is packed is unpacked there."""
        return self._load[name](device)

    def __contains__(self, name: object) -> bool:
        return name in self._load  # what a mapping does by itself would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._load)

    def __len__(self) -> int:
        return len(self._load)

    def dense(self, name: str, device: torch.device = CPU) -> Tensor:
        """A tensor that is not quantized, on a device."""
        tensor = self.on(name, device)
        assert isinstance(tensor, Tensor), name
        return tensor

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype of a tensor that is not quantized."""
        return self._dtype[name]

    def nbytes(self, name: str) -> int:
        """Bytes in the file: for a quantized weight codes, scales and zeros."""
        return self._bytes[name]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a model directory: Hugging Face (plain or Model Optimizer) or compressed-tensors.

    Raises:
        CheckpointError: something is missing, extra, misshapen or damaged; the message names it.
        UnsupportedError: an architecture or a quantization that fewbit does not know.
    """
    with _understood(f"{path}"):
        files = open_files(Path(path))
    family = family_of(files.config)
    files = with_prefix(files, getattr(family, "PREFIX", ""))
    with _understood("config.json"):
        spec = family.read(HFConfig(files.config))
    names = Names(family, spec)
    method = files.config.get("quantization_config")
    if not isinstance(method, dict | None):
        raise CheckpointError(f"config.json: 'quantization_config' is {method!r}, expected an object")
    fmt = format_of(files)
    with _understood(f"the quantization in {files.path}, which calls itself {fmt.NAME},"):
        quantization = fmt.read(files, spec, names)
        tensors = _Opener(files, spec, names, fmt, quantization).tensors()
    carried = {name: files.folder / name for name in CARRIED if (files.folder / name).is_file()}
    return Checkpoint(
        path=files.path,
        folder=files.folder,
        sources=files.sources,
        format=fmt.NAME,
        family=family,
        spec=spec,
        config=files.config,
        dtype=_dtype(files, tensors),
        quant=quantization.quant,
        kv=quantization.kv,
        remarks=quantization.remarks,
        tensors=tensors,
        files=carried,
    )


@contextmanager
def _understood(what: str) -> Iterator[None]:
    """Turn what a list in the place of a number does to a reader into one clear error."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, re.error) as error:
        raise CheckpointError(f"{what} is not put together as it should be: {type(error).__name__}: {error}") from error


def stored_linear(packing: Packing, linear: LinearShape, quant: QuantSpec) -> dict[str, Stored]:
    """The tensors of a quantized linear's weight."""
    assert quant.weight is not None
    return packing.stored(quant.weight, (linear.out_features, linear.in_features))


class _Opener:
    """Matches the tensors a model needs with those a directory has."""

    def __init__(self, files: Files, spec: DecoderSpec, names: Names, fmt: Reader, quantization: Quantization) -> None:
        self.files, self.spec, self.names, self.quantization = files, spec, names, quantization
        self.fmt = cast("FileFormat", fmt)  # one that is only read has no calibrated inputs and no K and V to ask for
        self.places = Places(names, spec, quantization.quant)
        self.found = Tensors()
        self.used: set[str] = set()

    def tensors(self) -> Tensors:
        linears = {f"{linear.name}.weight": linear for linear in self.spec.linears()}
        for name in self.spec.tensors():
            linear = linears.get(name)
            quant = self.quantization.quant.get(linear.name) if linear else None
            if linear and quant:
                self._quantized(linear, quant)
            else:
                self._placed(name)
        for layer, kv in self.quantization.kv.items():
            heads = self.spec.layers[layer].attention.kv_heads
            for which, source in zip("kv", self.fmt.kv_scale_names(layer, self.names), strict=True):
                name, shape = f"layers.{layer}.attn.{which}_scale", (heads,) if kv.k.block == (1, ALL) else ()
                if self.quantization.kv_cast:
                    self._add(name, functools.partial(_ones, shape), [])
                    continue
                dtype = self._take(source, self.fmt.kv_scale_shape(kv, heads))
                self._add(name, functools.partial(self._scale, source, shape), [source], dtype)
        self._refuse_extra()
        return self.found

    def _scale(self, source: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        return _finite(f"tensor '{source}'", self.files.read(source, device).float().reshape(shape))

    def _placed(self, name: str) -> None:
        """A tensor that is not quantized, wherever it lies."""
        place = self.places.of_tensor(name)
        dtype = self._float(place.source, place.shape)
        size = math.prod(self.places.shape(name)) * dtype.itemsize
        self.found.add(name, lambda device: place.read(self.files, name, device), dtype, size)

    def _dense(self, name: str, source: str, shape: tuple[int, ...]) -> None:
        dtype = self._float(source, shape)
        self._add(name, lambda device: _finite(f"tensor '{source}'", self.files.read(source, device)), [source], dtype)

    def _float(self, source: str, shape: tuple[int, ...]) -> torch.dtype:
        entry = self._take(source, shape)
        if not entry.is_floating_point or entry.itemsize < 2:
            raise CheckpointError(f"tensor '{source}' is {entry}, though the config does not call it quantized")
        return entry

    def _quantized(self, linear: LinearShape, quant: QuantSpec) -> None:
        place, whole = self.places.of_linear(linear.name), self.places.whole(linear.name)
        module = place.source
        packing = self.quantization.packings.get(linear.name) or self.fmt.packing(quant)
        stored = stored_linear(packing, whole, quant)
        for suffix, want in stored.items():
            self._take(f"{module}.{suffix}", want.shape, want.dtype)
        weight, shape = quant.weight, (linear.out_features, linear.in_features)
        assert weight is not None

        def load(device: torch.device) -> QTensor:
            try:
                parts = {s: self.files.read(f"{module}.{s}", device) for s in stored}
                q = packing.unpack(parts, weight, (whole.out_features, whole.in_features))
                for suffix, part in parts.items():
                    if part.is_floating_point() and part.itemsize > 1:  # scales and zeros, some as reciprocals
                        _finite(suffix, part)
                _finite("scales", q.scales())
            except CheckpointError as error:
                raise CheckpointError(f"{module}: {error}") from None
            return place.cut_codes(q, linear.name)

        counted = [f"{module}.{s}" for s in stored if s not in ("weight_shape", packing.wide)]
        size = sum(self.files.entries[source].nbytes for source in counted)
        share = size * linear.out_features // whole.out_features
        self.found.add(f"{linear.name}.weight", load, torch.float32, share)
        if packing.wide:
            wide = f"{module}.{packing.wide}"
            self._add(f"{linear.name}.wide_scale", functools.partial(self._scale, wide, ()), [wide])
        if quant.calibrated:
            form = self.fmt.input_scale(quant)
            source = f"{module}.{form.suffix}"
            self._add(
                f"{linear.name}.input_scale",
                lambda device: form.unpack(_finite(f"tensor '{source}'", self.files.read(source, device))),
                [source],
                self._take(source, form.shape),
            )
        if quant.prescale:
            self._dense(f"{linear.name}.prescale", f"{module}.pre_quant_scale", (linear.in_features,))
        for leaf, factor in quant.lowrank_shapes(*shape).items():
            self._dense(f"{linear.name}.{leaf}", f"{module}.{leaf}", factor)

    def _add(
        self,
        name: str,
        load: Load,
        sources: list[str],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.found.add(name, load, dtype, sum(self.files.entries[source].nbytes for source in sources))

    def _take(self, source: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> torch.dtype:
        """Check that a tensor is there as it should be, and remember that it was asked for."""
        entry = self.files.entries.get(source)
        if entry is None:
            raise CheckpointError(f"tensor '{source}' {list(shape)} is missing from {self.files.path}")
        if entry.shape != shape:
            raise CheckpointError(
                f"tensor '{source}' has shape {list(entry.shape)}, expected {list(shape)} by config.json"
            )
        if dtype is not None and entry.dtype != dtype and not _both_float_scales(entry.dtype, dtype):
            raise CheckpointError(f"tensor '{source}' is {entry.dtype}, expected {dtype}")
        self.used.add(source)
        return entry.dtype

    def _refuse_extra(self) -> None:
        extra = self.files.entries.keys() - self.used
        extra = {name for name in extra if not any(fnmatch.fnmatchcase(name, p) for p in self.names.dropped)}
        if extra:
            first = min(extra)
            more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
            raise CheckpointError(f"tensor '{first}'{more} in {self.files.path} belongs to nothing in config.json")


def _ones(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.ones(shape, device=device)


def _finite(what: str, tensor: Tensor) -> Tensor:
    """The tensor, once it is known to hold numbers only: a scale that is none makes nonsense of all that it scales."""
    if not torch.isfinite(tensor.float()).all():
        raise CheckpointError(f"{what}: NaN or infinity, where only numbers can be; copy or download the file again")
    return tensor


def _both_float_scales(a: torch.dtype, b: torch.dtype) -> bool:
    """Scales come as float32, bfloat16 or float16; the format says what they count as."""
    floats = (torch.float32, torch.bfloat16, torch.float16)
    return a in floats and b in floats


def _dtype(files: Files, tensors: Tensors) -> torch.dtype:
    """The dtype config.json names, else that of the embedding."""
    named = files.config.get("dtype") or files.config.get("torch_dtype")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        if str(dtype) in (named, f"torch.{named}"):
            return dtype
    if named not in (None, "auto"):
        known = ", ".join(str(DTYPES[d]).removeprefix("torch.") for d in ("F32", "F16", "BF16"))
        raise CheckpointError(f"config.json: dtype {named!r} is not supported; known: {known}")
    return tensors.dtype("embed.weight")

"""Keeping a module with fake quantizers in a folder, and putting it back onto a fresh one.

The folder holds ``model.safetensors`` (every parameter and buffer, scales among them) and ``config.json`` (the recipe
and the numerics of each layer). It says nothing of the architecture: whoever restores builds that first. Nothing is
pickled.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from fewbit.checkpoint.files import DTYPES, ModelFiles
from fewbit.checkpoint.layout import Stored, scale_grid
from fewbit.checkpoint.shards import Shards
from fewbit.compress.fake import BUFFERS, KINDS, FakeQuant, install, layers, matrix
from fewbit.errors import CheckpointError, UnsupportedError, nearest_name
from fewbit.numerics.format import Format, format_named
from fewbit.numerics.quantspec import InputScale, QuantSpec
from fewbit.version import __version__

VERSION = 1
"""Of the layout of config.json; one that is not known is refused."""
_BYTES = {str(dtype): dtype for dtype in (torch.bool, torch.float64, torch.int16)}
"""Dtypes that are written as bytes: the table of the file has no word for them."""
_Kind = tuple[tuple[int, ...], torch.dtype]
_Raw = Mapping[str, _Kind]


def save_state(module: nn.Module, path: str | Path) -> Path:
    """Write all parameters and buffers of a module with fake quantizers, and the numerics of its layers, to a folder.

    The folder is there whole or not at all. One that holds an earlier state is replaced, anything else is not.

    Raises:
        UnsupportedError: the module has no fake quantizers, or holds something that is no tensor of a known dtype.
        CheckpointError: something else lies at `path`.
    """
    path = Path(path)
    _check_free(path)
    tensors, words = module.state_dict(), _words(module)
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in (*DTYPES.values(), *_BYTES.values()):
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise UnsupportedError(f"'{name}' is {kind}, which a saved state cannot hold")
        if str(tensor.dtype) in _BYTES:
            words["bytes"][name] = {"dtype": str(tensor.dtype), "shape": list(tensor.shape)}
            tensors[name] = tensor.contiguous().reshape(-1).view(torch.uint8)
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.absolute().parent))
    old = folder.with_name(f"{folder.name}.old")
    try:
        folder.chmod(0o755)
        plan = {name: Stored(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        files = Shards(folder, plan, {"format": "pt", "fewbit": __version__})
        try:
            for name, tensor in tensors.items():
                files.write(name, tensor)
            files.finish()
        finally:
            files.close()
        (folder / "config.json").write_text(json.dumps(words, indent=2) + "\n", "utf8")
        for file in folder.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        if path.exists():
            path.rename(old)
        folder.rename(path)
    finally:
        if old.exists() and not path.exists():  # interrupted between the two
            old.rename(path)
        for left in (folder, old):
            if left.exists():
                shutil.rmtree(left)
    return path


@torch.no_grad()
def restore_state(module: nn.Module, path: str | Path) -> nn.Module:
    """Put what `save_state` wrote onto a fresh module of the same architecture, which is not quantized yet.

    Returns:
        `module`: it computes bit for bit what the saved one did.

    Raises:
        CheckpointError: no saved state, a damaged one, or one of another architecture or dtype; the module is as it
            was.
    """
    files = ModelFiles(Path(path))
    saved, raw = _read(files)
    own = module.state_dict()
    found = layers(module)
    for name in saved:
        if name not in found:
            hint = nearest_name(name, found) if found else "it has no Linear and no Conv2d"
            raise CheckpointError(f"{path} quantizes '{name}', which is no Linear or Conv2d of this module; {hint}")
        if type(found[name]) not in KINDS:
            raise CheckpointError(f"'{name}' of this module is quantized already; restore onto a fresh one")
    buffers = {name: layer.buffers(name, matrix(found[name])) for name, layer in saved.items()}
    wanted = {name: (tuple(t.shape), t.dtype) for name, t in own.items()}
    for owned in buffers.values():
        wanted |= owned
    _compare(files, raw, wanted, path)
    for name, layer in saved.items():
        held = {
            tensor.rpartition(".")[2]: _tensor(files, raw, tensor).to(matrix(found[name]).device)
            for tensor in buffers[name]
        }
        install(found[name], layer.quant, layer.origin, dict(held))
    for name, tensor in own.items():
        tensor.copy_(_tensor(files, raw, name))
    return module


@dataclass(frozen=True)
class _Layer:
    """What config.json says about one layer."""

    quant: QuantSpec
    origin: tuple[str, str]

    def buffers(self, name: str, weight: Tensor) -> dict[str, _Kind]:
        """Shape and dtype of what a layer of this name and weight [out, in] holds besides."""
        fmt = self.quant.weight
        assert fmt is not None
        grid = scale_grid(fmt, tuple(weight.shape))
        has = {
            "weight_scale": (grid, fmt.scale if isinstance(fmt.scale, torch.dtype) else torch.uint8),
            "weight_outer": ((), torch.float32) if fmt.outer else None,
            "weight_zero": (grid, torch.int8) if fmt.zero else None,
            "input_scale": ((), torch.float32) if self.quant.calibrated else None,
            "prescale": ((weight.shape[1],), torch.float32) if self.quant.prescale else None,
        }
        assert has.keys() == set(BUFFERS)
        return {f"{name}.{leaf}".removeprefix("."): kind for leaf, kind in has.items() if kind is not None}


def _words(module: nn.Module) -> dict[str, Any]:
    """What config.json will say."""
    fakes = {name: layer for name, layer in layers(module).items() if isinstance(layer, FakeQuant)}
    if not fakes:
        raise UnsupportedError(f"{type(module).__name__} has no fake quantizers; fewbit.quantize gives it some")
    recipes = list(dict.fromkeys(layer.origin for layer in fakes.values()))
    described = {
        name: {
            "weight": str(layer.quant.weight),
            "input": None if layer.quant.input is None else str(layer.quant.input),
            "input_scale": layer.quant.input_scale,
            "prescale": layer.quant.prescale,
            "recipe": recipes.index(layer.origin),
        }
        for name, layer in fakes.items()
    }
    named = [{"name": name, "text": text} for name, text in recipes]
    return {"fewbit_state": VERSION, "fewbit": __version__, "recipes": named, "layers": described, "bytes": {}}


def _read(files: ModelFiles) -> tuple[dict[str, _Layer], _Raw]:
    """The layers that config.json describes, and the tensors that are written as bytes."""
    words = files.config
    if words.get("fewbit_state") != VERSION:
        raise CheckpointError(
            f"{files.path} holds no saved state that this fewbit reads (fewbit_state is {words.get('fewbit_state')!r})"
        )
    try:
        found = {}
        for name, layer in words["layers"].items():
            recipe = words["recipes"][layer["recipe"]]
            if layer["input_scale"] not in get_args(InputScale):
                raise ValueError(f"input_scale {layer['input_scale']!r}")
            quant = QuantSpec(
                format_named(layer["weight"]), _format(layer["input"]), layer["input_scale"], layer["prescale"]
            )
            found[name] = _Layer(quant, (recipe["name"], recipe["text"]))
        return found, {name: (tuple(raw["shape"]), _BYTES[raw["dtype"]]) for name, raw in words["bytes"].items()}
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{files.path}/config.json is not put together as it should be: {type(error).__name__}: {error}"
        ) from error


def _format(name: str | None) -> Format | None:
    return None if name is None else format_named(name)


def _check_free(path: Path) -> None:
    """Raise if something lies at `path` that is not an earlier state."""
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists():
        try:
            if "fewbit_state" in json.loads((path / "config.json").read_text("utf8")):
                return
        except (OSError, TypeError, ValueError):
            pass
        raise CheckpointError(f"{path} holds something that is no saved state; choose another folder to write to")


def _compare(files: ModelFiles, raw: _Raw, wanted: Mapping[str, _Kind], path: str | Path) -> None:
    """Raise unless the files hold exactly what is wanted."""
    for name in sorted(files.entries.keys() - wanted.keys()):
        raise CheckpointError(f"{path} holds '{name}', for which this module has no place; it is of another model")
    for name, (shape, dtype) in wanted.items():
        if name not in files.entries:
            raise CheckpointError(f"{path} lacks '{name}' {list(shape)} of this module; it is of another model")
        entry = files.entries[name]
        has_shape, has_dtype = raw.get(name, (entry.shape, entry.dtype))
        if has_shape != shape:
            raise CheckpointError(f"{path}: '{name}' is {list(has_shape)}, in this module {list(shape)}")
        if has_dtype != dtype:
            raise CheckpointError(f"{path}: '{name}' is {has_dtype}, in this module {dtype}; convert the module first")


def _tensor(files: ModelFiles, raw: _Raw, name: str) -> Tensor:
    stored = files.read(name)
    if name not in raw:
        return stored
    shape, dtype = raw[name]
    return stored.view(dtype).reshape(shape)

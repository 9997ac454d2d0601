"""Writing a checkpoint: planned from shapes alone, filled in any order, never seen half done.

Every tensor's dtype and shape is known before the first weight is, so headers are written first and each tensor goes
straight to its place: memory is one tensor, whatever the size of the model.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from importlib.resources.abc import Traversable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from fewbit.checkpoint.checkpoint import stored_linear
from fewbit.checkpoint.formats import FileFormat
from fewbit.checkpoint.layout import Quantization, Stored
from fewbit.checkpoint.names import Names
from fewbit.checkpoint.places import Place, Places
from fewbit.checkpoint.shards import PlannedFiles, Shards, write_json
from fewbit.errors import CheckpointError, FewbitError, UnsupportedError
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.quantspec import QuantSpec
from fewbit.spec.decoder import DecoderSpec, by_input
from fewbit.spec.families import Family
from fewbit.version import __version__

UNFINISHED = "unfinished.json"
"""Beside the shards of a folder that is being filled: what is in them already. Gone when all is well."""
log = logging.getLogger(__name__)


def check_target(path: Path, force: bool, source: Path | None = None) -> None:
    """Raise if something lies where a checkpoint is to be written.

    Raises:
        CheckpointError: `path` is a file, a folder that is not empty and `force` is not given, or one that holds the
            model at `source`, which `force` would take away too.
    """
    if source is not None and source.resolve().is_relative_to(path.resolve()):
        raise CheckpointError(f"{path} holds the model that is read, {source}; choose another folder to write to")
    if path.is_file():
        raise CheckpointError(f"{path} is a file; expected a folder to write to")
    if path.is_dir() and any(path.iterdir()) and not force:
        raise CheckpointError(f"{path} is not empty; choose another folder or pass --force to replace it")


class CheckpointWriter:
    """Writes one checkpoint into the folder ``.NAME.unfinished`` beside `target` and renames it when all is well.

    Use as a context manager: `add` every tensor by its canonical name, `finish`, look at `folder`, `commit`. Leaving
    without `commit`, by an error or Ctrl-C, removes the folder and touches nothing else; but after `record` and before
    `finish` the folder stays, and a writer of the same `key` goes on with it: `recorded` is what it holds. (Not after a
    `FewbitError`, which would only come again.)

    Args:
        target: the folder to make.
        fmt: the file format.
        family: whose names are used.
        spec: the decoder as it will be on disk.
        quantization: what is quantized and how.
        dtypes: dtype of each tensor that stays dense, and of scales that had one, by canonical name.
        config: the source's config.json; only what must change is changed.
        files: files to carry along, by name.
        meta: strings for the metadata of the weights' files.
        key: what all that will be written depends on.
        force: replace a folder that is not empty, and unfinished work of another key.

    Attributes:
        folder: can be opened as a checkpoint at any time; what was not added yet is zero.
        recorded: what an unfinished run gave to `record` last; None: there was none.

    Raises:
        UnsupportedError, CheckpointError: the format cannot say this, the target or unfinished work of another key is
            in the way, or another process is writing there.
    """

    def __init__(
        self,
        target: Path,
        fmt: FileFormat,
        family: Family,
        spec: DecoderSpec,
        quantization: Quantization,
        dtypes: Mapping[str, torch.dtype],
        config: Mapping[str, Any],
        files: Mapping[str, Traversable],
        meta: Mapping[str, str],
        key: str = "",
        force: bool = False,
    ) -> None:
        self.target, self.fmt, self.spec, self.quantization, self.key = target, fmt, spec, quantization, key
        self.names, self.config, self.files = Names(family, spec), dict(config), files
        self.places = Places(self.names, spec, quantization.quant)
        self.places.check()
        check_target(target, force)
        self.dense_dtypes = dtypes
        self._linears = {linear.name: linear for linear in spec.linears()}
        self._held: dict[tuple[str, int], dict[str, Tensor | QTensor]] = {}  # parts of a tensor that lacks others
        self._shared: dict[str, Tensor] = {}  # what several linears bring
        wide = {name for name, quant in quantization.quant.items() if fmt.packing(quant).wide}
        groups = ({self.places.of_linear(x.name).source for x in g if x.name in wide} for g in by_input(spec.linears()))
        self._share_wide, self._wide = {m: group for group in groups for m in group}, dict[str, Tensor]()
        self.folder = target.absolute().parent / f".{target.name}.unfinished"
        self.recorded: dict[str, Any] | None = None
        self._finished = False
        self._another = False  # the folder holds work of another key
        self._lock = self._take_folder()
        try:
            written = self._look_for_work(force)
            self._shards = self._open_shards({"format": "pt", "fewbit": __version__, **meta})
            self._shards.missing -= written
            self._write_files()
        except BaseException as error:
            self._place_error(error)
            self._leave(keep=True)
            raise

    def _take_folder(self) -> int:
        """Make the folder, and make sure that no other process fills it; its file descriptor."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise CheckpointError(f"another process is writing to {self.target}; wait for it, or stop it") from None
        return lock

    def _look_for_work(self, force: bool) -> set[str]:
        """Names of tensors that an unfinished run of the same key wrote; an empty folder where there was none."""
        try:
            found = json.loads((self.folder / UNFINISHED).read_text("utf8"))
        except (OSError, ValueError):
            found = None
        if found is not None and found["key"] == self.key:
            self.recorded = found["recorded"]
            return set(found["written"])
        if found is not None and not force:
            self._another = True
            raise CheckpointError(
                f"{self.folder} holds unfinished work on another model, recipe or data; repeat that command to go on "
                "with it, or pass --force to throw it away"
            )
        for file in self.folder.iterdir():
            shutil.rmtree(file) if file.is_dir() else file.unlink()
        return set()

    def _open_shards(self, metadata: Mapping[str, str]) -> PlannedFiles:
        """The files of the weights."""
        return Shards(self.folder, dict(self._plan()), metadata)

    def _write_files(self) -> None:
        """All but the weights, so that the folder can be opened from now on."""
        for name, path in self.files.items():
            (self.folder / name).write_bytes(path.read_bytes())
        config = {k: v for k, v in self.config.items() if k != "quantization_config"}
        config["tie_word_embeddings"] = self.spec.tied
        for name, value in self.fmt.configs(self.spec, self.quantization, self.names).items():
            if name == "quantization_config":
                config[name] = value
            else:
                write_json(self.folder / name, value)
        write_json(self.folder / "config.json", config)

    def _plan(self) -> Iterator[tuple[str, Stored]]:
        """Every tensor of the files, in the order of the forward pass."""
        linears = {f"{linear.name}.weight": linear for linear in self.spec.linears()}
        for name in self.spec.tensors():
            linear = linears.get(name)
            quant = self.quantization.quant.get(linear.name) if linear else None
            if not linear or not quant:
                place = self.places.of_tensor(name)
                if name == place.names[0] and place.expert == 0:
                    yield place.source, Stored(self.dense_dtypes[name], place.shape)
                continue
            place = self.places.of_linear(linear.name)
            if linear.name != place.names[0]:
                continue
            module, whole = place.source, self.places.whole(linear.name)
            for suffix, stored in stored_linear(self.fmt.packing(quant), whole, quant).items():
                yield f"{module}.{suffix}", stored
            if quant.calibrated:
                form = self.fmt.input_scale(quant)
                yield f"{module}.{form.suffix}", Stored(self._scale_dtype(f"{linear.name}.input_scale"), form.shape)
            if quant.prescale or self.fmt.prescale(linear, quant):
                yield f"{module}.pre_quant_scale", Stored(self.dense_dtypes["embed.weight"], (linear.in_features,))
            for leaf, shape in quant.lowrank_shapes(linear.out_features, linear.in_features).items():
                yield f"{module}.{leaf}", Stored(self.dense_dtypes["embed.weight"], shape)
        for layer, kv in self.quantization.kv.items():
            for which, source in zip("kv", self.fmt.kv_scale_names(layer, self.names), strict=True):
                dtype = self._scale_dtype(f"layers.{layer}.attn.{which}_scale")
                yield source, Stored(dtype, self.fmt.kv_scale_shape(kv, self._kv_heads(layer)))

    def _scale_dtype(self, name: str) -> torch.dtype:
        """Of the scale of an input, of K or of V: that of the source where the format lets it be."""
        any_float = self.fmt.input_scale(QuantSpec()).any_float
        return self.dense_dtypes.get(name, torch.float32) if any_float else torch.float32

    def _kv_heads(self, layer: int) -> int:
        return self.spec.layers[layer].attention.kv_heads

    def add(self, name: str, tensor: Tensor | QTensor) -> None:
        """Write one tensor by its canonical name: ``layers.3.attn.q.weight``, ``….input_scale``, ``….k_scale``."""
        owner, _, leaf = name.rpartition(".")
        if leaf in ("k_scale", "v_scale"):
            layer = int(owner.split(".")[1])
            assert isinstance(tensor, Tensor)
            kv_name = self.fmt.kv_scale_names(layer, self.names)["kv".index(leaf[0])]
            shape = self.fmt.kv_scale_shape(self.quantization.kv[layer], self._kv_heads(layer))
            return self._shards.write(kv_name, tensor.reshape(shape).to(self._scale_dtype(name)))
        quant = self.quantization.quant.get(owner)
        if quant is None or leaf == "bias":
            assert isinstance(tensor, Tensor)
            return self._place(name, tensor)
        place = self.places.of_linear(owner)
        module = place.source
        if leaf == "input_scale":
            form = self.fmt.input_scale(quant)
            assert isinstance(tensor, Tensor)
            return self._once(f"{module}.{form.suffix}", form.pack(tensor).to(self._scale_dtype(name)))
        packing = self.fmt.packing(quant)
        if leaf == "wide_scale":
            assert isinstance(tensor, Tensor)
            # a format without it misses nothing: it is no part of the weight
            return self._shards.write(f"{module}.{packing.wide}", tensor) if packing.wide else None
        if leaf == "prescale":
            assert isinstance(tensor, Tensor)
            return self._shards.write(f"{module}.pre_quant_scale", tensor.to(self.dense_dtypes["embed.weight"]))
        if leaf in ("lowrank_a", "lowrank_b"):
            assert isinstance(tensor, Tensor)
            return self._shards.write(f"{module}.{leaf}", tensor)
        assert isinstance(tensor, QTensor), name
        if (held := self._gather(place, owner, tensor)) is None:
            return None
        whole = place.join_codes({n: q for n, q in held.items() if isinstance(q, QTensor)})
        for suffix, part in packing.pack(whole).items():
            if suffix == packing.wide:
                self._widen(module, suffix, part)
            else:
                self._shards.write(f"{module}.{suffix}", part)
        linear = self._linears[owner]
        if self.fmt.prescale(linear, quant) and not quant.prescale:
            ones = torch.ones(linear.in_features, dtype=self.dense_dtypes["embed.weight"])
            self._shards.write(f"{module}.pre_quant_scale", ones)
        return None

    def _place(self, name: str, tensor: Tensor) -> None:
        """Write a tensor that is not quantized, as soon as all are there that lie in one with it."""
        place = self.places.of_tensor(name)
        if (held := self._gather(place, name, tensor)) is not None:
            whole = place.join({n: t for n, t in held.items() if isinstance(t, Tensor)})
            self._shards.write(place.source, whole, place.expert, max(place.experts, 1))

    def _gather(self, place: Place, name: str, tensor: Tensor | QTensor) -> dict[str, Tensor | QTensor] | None:
        """All that lies in one tensor, once it is there."""
        key = place.source, place.expert
        held = self._held.setdefault(key, {})
        held[name] = tensor
        return self._held.pop(key) if len(held) == len(place.names) else None

    def _once(self, source: str, tensor: Tensor) -> None:
        """Write what linears that lie in one tensor have together; each brings it."""
        before = self._shared.setdefault(source, tensor)
        if not torch.equal(before, tensor):
            raise UnsupportedError(f"{source}: the linears that lie in one tensor there differ in it")
        self._shards.write(source, tensor)

    def _widen(self, module: str, suffix: str, wide: Tensor) -> None:
        """Note the FP8 scale of a module; when those that share its input are here too, write the largest for all."""
        self._wide[module], group = wide, self._share_wide[module]
        if group <= self._wide.keys():
            largest = torch.stack([self._wide.pop(other) for other in group]).amax()
            for other in group:
                if f"{other}.{suffix}" in self._shards.missing:  # one that a source had is kept
                    self._shards.write(f"{other}.{suffix}", largest)

    def record(self, progress: Mapping[str, Any]) -> None:
        """Make what was added last, and note how far the work is: JSON that `recorded` will hold."""
        self._shards.sync()
        note = {"key": self.key, "written": sorted(self._shards.written), "recorded": progress}
        new = self.folder / f"{UNFINISHED}.new"
        new.write_text(json.dumps(note), "utf8")
        new.rename(self.folder / UNFINISHED)

    def finish(self) -> Path:
        """Complete the folder and return it.

        Raises:
            CheckpointError: a tensor was never added.
        """
        self._shards.finish()
        self._finished = True
        return self.folder

    def commit(self) -> None:
        """Put the folder in its place: after this it is there whole, before it was not there at all."""
        (self.folder / UNFINISHED).unlink(missing_ok=True)
        for file in (f for f in self.folder.rglob("*") if f.is_file()):
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        if self.target.is_dir():
            old = Path(tempfile.mkdtemp(prefix=f".{self.target.name}.old.", dir=self.folder.parent))
            try:
                self.target.rename(old / "replaced")
                self.folder.rename(self.target)
            finally:
                if not self.target.exists() and (old / "replaced").exists():  # interrupted between the two
                    (old / "replaced").rename(self.target)
                shutil.rmtree(old)
        else:
            self.folder.rename(self.target)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._place_error(error)
        self._shards.close()
        self._leave(keep=not self._finished and not isinstance(error, FewbitError))

    def _place_error(self, error: BaseException | None) -> None:
        """Say where the disk is that was full: a write that fails does not know."""
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(self.target)

    def _leave(self, keep: bool) -> None:
        """Let go of the folder, and take it away if there is nothing to go on with."""
        if self.folder.exists():
            if keep and (self.folder / UNFINISHED).exists():
                if not self._another:
                    log.warning("unfinished work is kept in %s: the same command goes on with it", self.folder)
            else:
                shutil.rmtree(self.folder)
        os.close(self._lock)

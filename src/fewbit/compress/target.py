"""The folder that a compression fills, and what it must know itself by to be gone on with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch

from fewbit.checkpoint import Checkpoint, CheckpointWriter, format_named
from fewbit.checkpoint.layout import Quantization
from fewbit.compress.data import data_hash
from fewbit.compress.plan import Plan
from fewbit.version import __version__


def writer_of(
    checkpoint: Checkpoint, planned: Plan, target: Path, used: str, device: torch.device, force: bool, processes: int
) -> CheckpointWriter:
    """The writer of a plan's result; `used`: the calibration data in words, which `processes` shared."""
    c, p = checkpoint, planned
    meta = {"recipe": p.recipe.name, "torch": torch.__version__}
    if p.calibrated:
        meta["calibration_sha256"] = data_hash(p.recipe.calibration)
        meta["calibration"] = used
        meta["calibration_seed"] = str(p.recipe.calibration.seed)
    names = [n for n in c.tensors if not n.endswith("_scale")]
    return CheckpointWriter(
        target,
        format_named(p.export),
        c.family,
        p.spec,
        Quantization(p.quant, p.kv),
        {name: c.tensors.dtype(name) for name in names},
        c.config,
        c.files,
        meta,
        _key(checkpoint, planned, device, meta | {"processes": str(processes)}),
        force,
    )


def _key(checkpoint: Checkpoint, planned: Plan, device: torch.device, meta: Mapping[str, str]) -> str:
    """A hash of all that the result depends on."""
    path, p = checkpoint.path, planned
    files = [*sorted(checkpoint.sources)]
    # tokenizer, chat template; one that is no file follows from the weights' file
    files += [file for file in checkpoint.files.values() if isinstance(file, Path)]
    weights = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    numerics = [f"{name} {quant}" for name, quant in p.quant.items()], [str(kv) for kv in p.kv.values()]
    what = [
        __version__, str(path.resolve()), checkpoint.config, weights, numerics, str(p.recipe.techniques),
        str(p.recipe.calibration), p.export, device.type, meta,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()

"""How long a compression takes: a model of random weights is written to a disk, compressed from there, and thrown away.

Time says nothing of quality here, and the weights are not asked for any: what a technique computes does not depend on
the numbers.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fewbit.checkpoint import CheckpointWriter, format_named, open_checkpoint
from fewbit.checkpoint.layout import Quantization
from fewbit.compress import compress, plan
from fewbit.compress.recipe import AS_IT_WAS, Recipe, Source
from fewbit.measure.dummy import dummy_checkpoint
from fewbit.ops.device import device_info

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Quantized:
    """What a compression cost.

    Attributes:
        total_s: from opening the model to the checked and finished files.
        seconds: by stage; on a GPU ``load`` and ``write`` go on beside the others.
        peak_bytes: largest resident memory of the process.
        device_bytes: largest memory taken from the GPU; 0 on a CPU.
        weight_bytes: of the files written.
        layers: of the model.
        tokens: of calibration data.
        device: what it ran on.
    """

    total_s: float
    seconds: dict[str, float]
    peak_bytes: int
    device_bytes: int
    weight_bytes: int
    layers: int
    tokens: int
    device: str


def measure(
    config: Mapping[str, Any],
    recipe: Recipe,
    device: torch.device,
    *,
    layers: int | None = None,
    folder: Path | None = None,
    tell: Tell = lambda text: None,
) -> Quantized:
    """Compress a model of this shape once.

    Args:
        config: a config.json.
        recipe: how; its calibration data are replaced by random tokens, as many as it says.
        device: where.
        layers: only so many of the shape's layers.
        folder: where files may lie while this goes on: as large as the model and its result. None: the system's.
        tell: called with what is being done.
    """
    with tempfile.TemporaryDirectory(prefix="fewbit-", dir=folder) as held:
        model, data, target = (Path(held) / name for name in ("model", "data.jsonl", "small"))
        tell(f"writing a model of random weights to {model}")
        write_dummy(config, model, device, layers)
        c = recipe.calibration
        vocab, draw = open_checkpoint(model).spec.vocab, random.Random(0)
        rows = (json.dumps({"ids": draw.choices(range(vocab), k=c.length)}) for _ in range(c.samples))
        data.write_text("\n".join(rows))
        recipe = replace(recipe, calibration=replace(c, data=(Source(data),)))
        tell("compressing it")
        start = time.perf_counter()
        checkpoint = open_checkpoint(model)
        planned = plan(checkpoint, recipe)
        report = compress(checkpoint, planned, target, device=str(device))
        total = time.perf_counter() - start
        assert report.verified is not None
        return Quantized(
            total, report.seconds, report.peak_bytes, report.device_bytes, report.verified.weight_bytes,
            len(checkpoint.spec.layers), c.samples * c.length if planned.calibrated else 0, str(device_info(device)),
        )  # fmt: skip


def write_dummy(config: Mapping[str, Any], folder: Path, device: torch.device, layers: int | None = None) -> None:
    """A checkpoint of random weights, made on `device`, in bfloat16.

    Args:
        config: a config.json.
        folder: what to make.
        device: where tensors are made.
        layers: only so many.
    """
    made = dummy_checkpoint(config, AS_IT_WAS, device, layers)
    config = {**config, "num_hidden_layers": len(made.spec.layers), "torch_dtype": "bfloat16"}
    with CheckpointWriter(
        folder, format_named("hf"), made.family, made.spec, Quantization({}, {}),
        dict.fromkeys(made.tensors, torch.bfloat16), config, {}, {},
    ) as writer:  # fmt: skip
        for name in made.tensors:
            writer.add(name, made.tensors.on(name, device))
        writer.finish()
        writer.commit()

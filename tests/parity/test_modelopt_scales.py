"""Plain max calibration against Model Optimizer itself: the same scales, the same bits in its own export.

Model Optimizer runs in the peers' environment (benchmarks/peers.txt), by the worker of the quality benchmark.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbit.checkpoint import Checkpoint, open_checkpoint
from fewbit.compress import compress, plan, read_recipe
from fewbit.compress.recipe import Calibration, Source, parse_recipe
from fewbit.numerics.format import FORMATS
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.reference import outer_scale, quantize
from helpers import ids, make_model

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-peers" / "bin" / "python"
NVFP4 = FORMATS["nvfp4"]
TOP = 1.3125
"""A largest weight at which NVFP4's outer scale, amax / 2688, is a power of two, as fewbit's always is."""
WAYS = {"fp8": "FP8", "nvfp4": "NVFP4"}


@dataclass(frozen=True)
class Both:
    """What both made of one model on the same data: by recipe fewbit's directory, and Model Optimizer's."""

    source: Checkpoint
    calibration: Calibration
    mine: dict[str, Path]
    theirs: dict[str, Path]


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> Both:
    if not PYTHON.exists():
        pytest.skip(f"NO PEERS: {PYTHON} is not there; `make peers` makes it")
    folder = tmp_path_factory.mktemp("modelopt")
    # float32, in which K and V are kept whole too: transformers would not round them
    model = make_model(folder / "model", dtype=torch.float32, tie_word_embeddings=True)
    _same_tops(model / "model.safetensors")
    calibration, held_out = folder / "calibration.jsonl", folder / "held-out.jsonl"
    calibration.write_text("".join(json.dumps({"ids": ids(48, seed=i)}) + "\n" for i in range(4)))
    held_out.write_text(json.dumps({"ids": ids(8)}) + "\n")
    out = folder / "out"
    out.mkdir()
    job = {
        "tool": "modelopt",
        "model": str(model),
        "calibration": str(calibration),
        "held_out": str(held_out),
        "ways": list(WAYS.values()),
        "own": [],
        "out": str(out),
    }
    (folder / "job.json").write_text(json.dumps(job))
    command = [str(PYTHON), str(ROOT / "benchmarks" / "quality_peer.py"), str(folder / "job.json")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ), cwd=folder)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert [line.split()[1] for line in ran.stdout.splitlines() if line.startswith(tuple(WAYS.values()))] == [
        "done",
        "done",
    ], ran.stdout[-2000:]
    source, mine, data = open_checkpoint(model), {}, Calibration(4, 48, (Source(calibration),))
    for name in WAYS:
        recipe = replace(read_recipe(name), calibration=data)
        mine[name] = folder / f"fewbit-{name}"
        compress(source, plan(source, recipe, "hf"), mine[name])
    return Both(source, data, mine, {name: out / way for name, way in WAYS.items()})


def _same_tops(path: Path) -> None:
    """Let the largest magnitude of every linear be `TOP`."""
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            tensor.clamp_(-1.25, 1.25)
            tensor.view(-1)[7] = TOP
    save_file(tensors, path, {"format": "pt"})


def _parts(path: Path, *endings: str) -> dict[str, torch.Tensor]:
    return {name: t for name, t in load_file(path / "model.safetensors").items() if name.endswith(endings)}


@pytest.mark.parametrize("recipe", WAYS)
def test_the_exported_weights_are_equal_bit_for_bit(recipe, both):
    endings = ("_proj.weight", "weight_scale", "weight_scale_2")
    mine, theirs = _parts(both.mine[recipe], *endings), _parts(both.theirs[recipe], *endings)
    assert mine.keys() == theirs.keys()
    assert len(mine) == len(both.source.spec.layers) * 7 * (2 if recipe == "fp8" else 3)
    for name, tensor in mine.items():
        assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape), name
        mine_bytes, their_bytes = (t.contiguous().view(-1).view(torch.uint8) for t in (tensor, theirs[name]))
        assert torch.equal(mine_bytes, their_bytes), name


@pytest.mark.parametrize("layer", [0, 1])
def test_the_largest_inputs_are_the_same(layer, both, tmp_path):
    """FP8: amax / 448. NVFP4: fewbit's outer scale is the power of two at or above amax / 2688.

    One layer at a time: fewbit calibrates a layer on what the quantized ones before it give, Model Optimizer's max
    calibration on the float model.
    """
    theirs, theirs_four = (_parts(both.theirs[r], "input_scale") for r in WAYS)
    for name, outer in (("fp8", False), ("nvfp4", True)):
        scale = "outer" if outer else "static"
        text = f'rules: [{{match: "layers.{layer}.*", weight: {name}, input: {name}, input_scale: {scale}}}]'
        recipe = replace(parse_recipe("one", text), calibration=both.calibration)
        compress(both.source, plan(both.source, recipe, "hf"), tmp_path / name)
        mine = _parts(tmp_path / name, "input_scale")
        assert len(mine) == 7
        for key, found in mine.items():
            torch.testing.assert_close(theirs_four[key] * 2688, theirs[key] * 448, rtol=1e-6, atol=0, msg=key)
            if outer:
                assert torch.equal(found, outer_scale(theirs_four[key] * 2688, NVFP4)), key
            else:
                torch.testing.assert_close(found, theirs[key], rtol=1e-5, atol=0, msg=key)


def test_under_its_outer_scale_any_weight_is_rounded_alike(both):
    """Block scales and codes, where the outer scale is not a power of two: those of random weights as Model Optimizer
    would export them, made by its own code in the peers' environment."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    weight[3, 16:32] = 0
    weight[5, 32:48] *= 1e-4
    outer = (weight.abs().amax() / 2688).float()
    folder = both.source.path.parent
    save_file({"weight": weight, "outer": outer}, folder / "random.safetensors")
    code = """
import sys
from safetensors.torch import load_file, save_file
from modelopt.torch.quantization.qtensor import NVFP4QTensor
parts = load_file(sys.argv[1])
outer = parts["outer"]
q, scale, outer = NVFP4QTensor.quantize(parts["weight"], 16, weights_scaling_factor_2=outer, try_tensorrt=False)
save_file({"weight": q._quantized_data, "scale": scale, "outer": outer.reshape(())}, sys.argv[2])
"""
    done = folder / "random-done.safetensors"
    command = [str(PYTHON), "-c", code, str(folder / "random.safetensors"), str(done)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    theirs, mine = load_file(done), quantize(weight, NVFP4, outer=outer)
    assert isinstance(mine, QTensor)
    assert torch.equal(theirs["outer"], outer)
    assert torch.equal(mine.scale, theirs["scale"].view(torch.uint8))
    low, high = theirs["weight"] & 15, theirs["weight"] >> 4
    codes = torch.stack((low, high), -1).flatten(-2)
    assert torch.equal(codes, mine.codes)

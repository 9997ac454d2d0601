"""Loading a model for the CPU's kernels: what is said when they are not there, and scales that are none."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[2]))

from fewbit.checkpoint import open_checkpoint
from fewbit.compress import compress, plan
from fewbit.compress.recipe import parse_recipe
from fewbit.errors import CheckpointError
from fewbit.model import load
from fewbit.ops.cpu.build import Missing
from fewbit.ops.linear import cpu
from helpers import make_model

RULE = '{match: "layers.*", weight: int8_row, input: int8, input_scale: static}'
STATIC = f"rules: [{RULE}]\ncalib: {{samples: 2, length: 32}}\n"


@pytest.fixture(scope="module")
def static(tmp_path_factory) -> Path:
    """A model with calibrated scales."""
    folder = tmp_path_factory.mktemp("static")
    source = open_checkpoint(make_model(folder / "plain", "llama", torch.float32, num_hidden_layers=1))
    compress(source, plan(source, parse_recipe("own", STATIC)), folder / "out")
    return folder / "out"


@pytest.mark.parametrize("backend", ["auto", "exact"])
def test_loading_warns_once_that_the_library_is_missing(static, backend, monkeypatch, caplog):
    monkeypatch.setattr(cpu, "library", lambda: Missing("no C compiler"))
    with caplog.at_level(logging.WARNING):
        load(open_checkpoint(static), "cpu", backend)
    said = [r.getMessage() for r in caplog.records if "C compiler" in r.getMessage()]
    wanted = "weights are widened to float32, slower and in up to 8 times the memory: no C compiler"
    assert said == ([wanted] if backend == "auto" else [])


@pytest.mark.parametrize("bad", [0.0, -1.0])  # what is not finite never gets this far
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_calibrated_scale_that_is_no_positive_number_is_refused(static, backend, bad, tmp_path):
    for file in static.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    name = min(n for n in tensors if n.endswith("input_scale"))
    tensors[name] = torch.full_like(tensors[name], bad)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"input_scale is {bad:g}; expected a positive number"):
        load(open_checkpoint(tmp_path), "cpu", backend)

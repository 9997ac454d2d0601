"""Every family through every kind of technique: what is written opens, runs, and says what the model said."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fewbit.checkpoint import open_checkpoint
from fewbit.compress.plan import plan
from fewbit.compress.recipe import Calibration, read_recipe
from fewbit.compress.run import compress
from fewbit.model import load
from fewbit.spec.families import families
from helpers import dense_logits, ids, make_model

WINDOWS = [ids(40, 256, seed) for seed in range(3)]
LIMITS = {"int8": 0.05, "int4_awq": 0.5}
"""Of the relative distance of logits; a model of random weights forgives little."""


def logits(path) -> torch.Tensor:
    return dense_logits(load(open_checkpoint(path)), WINDOWS)


QUICK = ("falcon", "gemma2", "glm4", "gpt2", "gpt_oss", "nemotron", "olmo2", "phi3")
CASES = [
    pytest.param(family, recipe, marks=[] if recipe == "int8" or family in QUICK else pytest.mark.slow)
    for family in families()
    for recipe in LIMITS
]


@pytest.mark.parametrize(("family", "recipe"), CASES)
def test_a_compressed_model_says_what_the_model_said(family, recipe, tmp_path):
    source = make_model(tmp_path / "float", family, torch.float32, gain=1.0)
    exact = logits(source)
    chosen = replace(read_recipe(recipe), calibration=Calibration(8, 64))
    compress(open_checkpoint(source), plan(open_checkpoint(source), chosen), tmp_path / "out")
    off = (logits(tmp_path / "out") - exact).norm(dim=1) / exact.norm(dim=1)
    assert off.median() < LIMITS[recipe]  # of a mixture a few tokens go to other experts

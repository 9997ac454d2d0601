"""Every family with every kind of numerics through every file format: what is read back is what was written."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewbit.checkpoint import Checkpoint, export, open_checkpoint
from fewbit.checkpoint.formats import formats
from fewbit.checkpoint.names import Names
from fewbit.compress import built_in, compress, plan, read_recipe
from fewbit.compress.recipe import Recipe, parse_recipe
from fewbit.errors import UnsupportedError
from fewbit.model import load
from fewbit.numerics.qtensor import QTensor
from fewbit.spec.families import families
from helpers import dense_logits, ids, make_model

WINDOWS = [ids(24, 256, seed) for seed in range(2)]
HOME = "compressed-tensors"
"""The format that says most: the others are reached from it."""
NUMERICS: dict[object, str] = {}
"""One recipe of each numerics; of several the last, which is seldom the plainest: a format sees no more of it."""
for _name in built_in():
    if not (_recipe := read_recipe(_name)).auto:
        NUMERICS[_recipe.rules, bool(_recipe.splitting)] = _name
KV = (None, "fp8", "int8")
PAIRS = [(family, recipe) for family in families() for recipe in NUMERICS.values()]
MATRIX = [(*pair, KV[i % len(KV)]) for i, pair in enumerate(PAIRS)]
QUICK = set(random.Random(0).sample(MATRIX, 14))
CELLS = [
    pytest.param(*cell, id=" ".join(map(str, cell)), marks=[] if cell in QUICK else [pytest.mark.slow])
    for cell in MATRIX
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """`models(family)`: a random model of a family, each made once."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = make_model(tmp_path_factory.mktemp(family) / "model", family, torch.float32, gain=1.0)
        return made[family]

    return make


def recipe_of(name: str, kv: str | None) -> Recipe:
    text = read_recipe(name).text.replace("rank: 32", "rank: 8")  # of matrices as small as these
    recipe = parse_recipe(name, text)
    return replace(recipe, calibration=replace(recipe.calibration, samples=2, length=32)).with_kv(kv)


def says(source: Checkpoint, fmt: str, target: Path) -> bool:
    """Whether a format can say the model, which is then at `target`; if not, that is one line and nothing is there."""
    try:
        export(source, fmt, target)
    except UnsupportedError as error:
        reason = str(error)
    else:
        return True
    assert reason
    assert "\n" not in reason
    assert not target.exists()
    return False


def numbers(tensor: torch.Tensor | QTensor) -> torch.Tensor:
    """What a tensor stands for: AutoAWQ's layout says a zero also where it is 0."""
    return tensor.dequantize() if isinstance(tensor, QTensor) else tensor


@pytest.mark.parametrize(("family", "recipe", "kv"), CELLS)
def test_read_back_as_it_was_written(family, recipe, kv, models, tmp_path):
    checkpoint = open_checkpoint(models(family))
    home = tmp_path / "home"
    try:
        planned = plan(checkpoint, recipe_of(recipe, kv), HOME)
    except UnsupportedError as error:  # q, k and v in one tensor have no room for a branch of each
        reason = str(error)
    else:
        reason = ""
    names = Names(checkpoint.family, checkpoint.spec)
    together = any(names.part(n) for x in checkpoint.spec.linears() for n in (x.name, f"{x.name}.weight"))
    assert bool(reason) == (together and read_recipe(recipe).splitting is not None), reason
    if reason:
        assert "lie in one tensor of this family's files" in reason
        return
    compress(checkpoint, planned, home)
    source = open_checkpoint(home)
    expected = dense_logits(load(source), WINDOWS)
    for fmt in formats():
        if not says(source, fmt, tmp_path / fmt):
            assert fmt != HOME
            continue
        found = open_checkpoint(tmp_path / fmt)
        assert found.format == fmt
        assert torch.equal(dense_logits(load(found), WINDOWS), expected), fmt
        assert says(found, HOME, tmp_path / f"{fmt}-back"), fmt
        back = open_checkpoint(tmp_path / f"{fmt}-back")
        assert back.tensors.keys() == source.tensors.keys()
        for name in source.tensors:
            assert torch.equal(numbers(back.tensors[name]), numbers(source.tensors[name])), (fmt, name)

"""SVDQuant: the branch is the best one for an error, and what is served is what was meant."""

from __future__ import annotations

import json

import pytest
import torch

from fewbit.checkpoint import open_checkpoint
from fewbit.compress import compress, plan, read_recipe
from fewbit.compress.recipe import parse_recipe
from fewbit.compress.stats import Stats
from fewbit.compress.techniques import round_to_nearest
from fewbit.compress.techniques.svdquant import Settings, _factor
from fewbit.engine.config import EngineOptions
from fewbit.engine.engine import generate, open_engine
from fewbit.engine.types import GenerateRequest, SamplingParams
from fewbit.errors import RecipeError, UnsupportedError
from fewbit.measure.facts import inspect
from fewbit.model import Loader
from fewbit.numerics.format import FORMATS
from fewbit.numerics.quantspec import QuantSpec
from helpers import ids, make_model

CPU = torch.device("cpu")
RULES = """
rules: [{match: "layers.*", weight: WEIGHT, input: INPUT, input_scale: SCALE}]
techniques: [svdquant: {rank: 8}]
calib: {samples: 4, length: 32}
"""
NUMERICS = {
    "nvfp4": ("nvfp4", "nvfp4", "outer"), "int4": ("int4_g64", "none", "dynamic"), "fp8": ("fp8", "fp8", "static")
}  # fmt: skip


def problem(seed: int, out: int = 96, width: int = 128) -> tuple[torch.Tensor, Stats, torch.Tensor]:
    """A weight with a few large columns, statistics of inputs that hang together, the inputs."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width, generator=g)
    weight[:, torch.randperm(width, generator=g)[:4]] *= 12
    x = torch.randn(600, 24, generator=g) @ torch.randn(24, width, generator=g) + 0.3 * torch.randn(
        600, width, generator=g
    )
    stats = Stats.empty(width, CPU, {"hessian"})
    stats.see(x)
    return weight, stats, x


def output_error(off: torch.Tensor, x: torch.Tensor) -> float:
    return (x.double() @ off.double().T).norm().item()


@pytest.mark.parametrize("seed", range(3))
def test_the_branch_is_the_best_for_an_error(seed):
    """Against the truncated singular value decomposition in float64."""
    weight, stats, _ = problem(seed)
    factor = _factor(stats.hessian)
    a, b = Settings(rank=8)._branch(weight, factor, torch.float32)
    _, s, _ = torch.linalg.svd(weight.double() @ factor.double(), full_matrices=False)
    best = s[8:].norm().item()
    assert ((weight - b @ a).double() @ factor.double()).norm().item() == pytest.approx(best, rel=1e-3)
    assert torch.equal(a, Settings(rank=8)._branch(weight, factor, torch.float32)[0])  # no chance in it


@pytest.mark.parametrize("fmt", ["nvfp4", "int4_g32", "mxfp4"])
@pytest.mark.parametrize("seed", range(3))
def test_the_output_is_nearer_with_a_branch_and_nearer_with_every_round(fmt, seed):
    weight, stats, x = problem(seed)
    quant, nearest = QuantSpec(FORMATS[fmt]), round_to_nearest.Settings()
    plain = output_error(nearest.layer(weight, quant, None, None).dequantize() - weight, x)
    errors = []
    for rounds in (0, 1, 4):
        q, a, b = Settings(rank=8, rounds=rounds).split(weight, quant, stats, None, nearest, torch.bfloat16)
        assert (a.shape, b.shape, a.dtype) == ((8, 128), (96, 8), torch.bfloat16)
        errors.append(output_error(q.dequantize() + b.float() @ a.float() - weight, x))
    assert errors[0] < plain
    assert errors[2] < errors[0]
    assert errors[2] < errors[1] * 1.02


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("source"), hidden_size=128, intermediate_size=256)


@pytest.fixture(scope="module", params=NUMERICS)
def made(request, source, tmp_path_factory):
    text = RULES
    for word, value in zip(("WEIGHT", "INPUT", "SCALE"), NUMERICS[request.param], strict=True):
        text = text.replace(word, value)
    target = tmp_path_factory.mktemp("made") / request.param
    checkpoint = open_checkpoint(source)
    report = compress(checkpoint, plan(checkpoint, parse_recipe("own", text)), target)
    return report, target, text


def test_what_is_written_is_served(made, source):
    report, target, text = made
    written = open_checkpoint(target)
    quant = written.quant["layers.0.mlp.up"]
    assert quant.lowrank == 8
    assert "rank 8 beside" in str(quant)
    assert json.loads((target / "config.json").read_text())["quantization_config"]["quant_method"] == "fewbit"
    loader = Loader(written, CPU)
    shape = next(s for s in written.spec.linears() if s.name == "layers.0.mlp.up")
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    w = loader.weights(shape)
    a, b = (written.tensors.dense(f"layers.0.mlp.up.{leaf}").float() for leaf in ("lowrank_a", "lowrank_b"))
    expected = w.round_input(x) @ w.weight.dequantize().T + (x @ a.T) @ b.T
    assert torch.allclose(loader.linear(shape)(x), expected, rtol=1e-4, atol=1e-4)
    # the numbers that were meant are nearer to the original than without the branch
    checkpoint = open_checkpoint(source)
    plain = compress(
        checkpoint, plan(checkpoint, parse_recipe("own", text.replace("svdquant: {rank: 8}", ""))), target.parent / "x",
        force=True,
    )  # fmt: skip
    assert report.kl < plain.kl
    assert report.verified.bits_per_weight > plain.verified.bits_per_weight + 16 * 8 / 256
    assert inspect(written)


def test_the_engine_serves_it(made):
    engine = open_engine(made[1], EngineOptions(num_blocks=16, max_batch=2))
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    prompt = tuple(ids(20))
    alone, first, second = (
        [
            o.tokens
            for o in generate(engine, [GenerateRequest(id=str(i), prompt=prompt[i:], params=params) for i in some])
        ]
        for some in ([0], [0, 3], [3, 0])
    )
    assert alone[0] == first[0] == second[1]


def test_what_is_refused(source):
    checkpoint = open_checkpoint(source)
    with pytest.raises(
        UnsupportedError, match=r"attn.k: a branch of rank 32 is no small part of 64 x 128; .* at most 16"
    ):
        plan(checkpoint, read_recipe("nvfp4_svd"))
    recipe = read_recipe("nvfp4_svd")
    text = recipe.text.replace("rank: 32", "rank: 16")
    with pytest.raises(UnsupportedError, match=r"no word for nvfp4 weights, .* rank 16 beside; use --export"):
        plan(checkpoint, parse_recipe("own", text), "hf")
    with pytest.raises(UnsupportedError, match="no word for int4_g128 weights, rank 16 beside"):
        plan(
            checkpoint,
            parse_recipe("own", text.replace("weight: nvfp4, input: nvfp4, input_scale: outer", "weight: int4_g128")),
            "hf",
        )
    for settings, words in (
        ({"rank": 0}, "rank is 0"),
        ({"rounds": -1}, "rounds is -1"),
        ({"rank": True}, "rank is True"),
    ):
        with pytest.raises(RecipeError, match=f"svdquant: {words}; expected a whole number"):
            Settings(**settings)


def test_a_config_that_says_another_dtype_than_the_files(source, tmp_path):
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["dtype"] = config["torch_dtype"] = "float32"
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(tmp_path)
    text = RULES.replace("WEIGHT", "int4_g64").replace("INPUT", "none").replace("SCALE", "dynamic")
    assert compress(checkpoint, plan(checkpoint, parse_recipe("own", text)), tmp_path / "out").verified is not None

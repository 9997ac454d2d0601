"""Automatic mixed precision: the knapsack against trying everything, measured losses against the model itself."""

from __future__ import annotations

import fnmatch
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.checkpoint import open_checkpoint
from fewbit.compress import compress, decide, plan, read_recipe
from fewbit.compress.decide import patterns
from fewbit.compress.recipe import parse_recipe
from fewbit.compress.sensitivity import sensitivities
from fewbit.compress.techniques.auto import Option, Settings, cheapest
from fewbit.errors import RecipeError, UnsupportedError
from fewbit.measure.quality import evaluate
from helpers import ids, make_model, same_tensors

CPU = torch.device("cpu")
AUTO = (
    "techniques: [auto: {bits: BITS, candidates: [int4, int8_wo, none], windows: 3}]\ncalib: {samples: 4, length: 32}"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("source"), hidden_size=128, intermediate_size=256)


@st.composite
def problems(draw):
    option = st.tuples(st.integers(1, 40), st.floats(0, 10, allow_nan=False))
    units = draw(st.lists(st.lists(option, min_size=1, max_size=4), min_size=1, max_size=6))
    made = [[Option(str(i), bits, loss) for i, (bits, loss) in enumerate(unit)] for unit in units]
    least, most = (sum(f(o.bits for o in unit) for unit in made) for f in (min, max))
    return made, draw(st.integers(least, most + 1))


@given(problems())
@settings(max_examples=300, deadline=None)
def test_no_choice_within_the_budget_is_better(problem):
    units, budget = problem
    chosen = [unit[i] for unit, i in zip(units, cheapest(units, budget), strict=True)]
    assert sum(o.bits for o in chosen) <= budget
    every = (c for c in itertools.product(*units) if sum(o.bits for o in c) <= budget)
    assert sum(o.loss for o in chosen) == pytest.approx(min(sum(o.loss for o in c) for c in every))


def test_a_model_of_many_layers_is_solved_at_once():
    g = torch.Generator().manual_seed(0)
    shapes = [6144 * 4096, 4096 * 4096, 28672 * 4096, 4096 * 14336]
    units = [
        [Option(n, int(b * size), loss * float(torch.rand((), generator=g))) for n, b, loss in
         (("a", 4.5, 1.0), ("b", 8, 0.1), ("c", 16, 0.0))]
        for size in shapes * 80
    ]  # fmt: skip
    chosen = cheapest(units, budget := int(sum(shapes) * 80 * 5.3))
    assert sum(u[i].bits for u, i in zip(units, chosen, strict=True)) <= budget
    # at a price a bit, found by bisection, the best choice of each unit is the best for what it takes: a lower bound
    low, high = 0.0, 1.0
    for _ in range(100):
        price = (low + high) / 2
        best = [min(u, key=lambda o: o.loss + price * o.bits) for u in units]
        low, high = (price, high) if sum(o.bits for o in best) > budget else (low, price)
    bound = sum(min(o.loss + high * o.bits for o in u) for u in units) - high * budget
    assert bound <= sum(u[i].loss for u, i in zip(units, chosen, strict=True)) < bound + 0.2  # of 74


def test_a_budget_that_nothing_fits():
    with pytest.raises(UnsupportedError, match="the smallest candidates take 5 bits, the budget is 4"):
        cheapest([[Option("a", 5, 1.0)]], 4)


def test_patterns_say_the_same():
    candidate = {
        f"layers.{i}.{role}": ("fp8" if i in (0, 3) or role == "mlp.down" else "nvfp4")
        for i in range(5)
        for role in ("attn.q", "mlp.up", "mlp.down")
    }
    rules = patterns(candidate)
    assert rules[-1] == ("layers.*.mlp.down", "fp8")
    assert len(rules) == 3 + 2 * 2
    text = "rules:\n" + "".join(f"- {{match: '{match}', weight: {name}}}\n" for match, name in rules)
    parsed = parse_recipe("x", text)
    for linear, name in candidate.items():
        rule = next(r for r in parsed.rules if fnmatch.fnmatchcase(linear, r.match))
        assert str(rule.quant.weight) == name


def test_losses_are_those_of_the_model_with_one_group_quantized(source, tmp_path):
    checkpoint = open_checkpoint(source)
    spec = checkpoint.spec
    windows = [ids(32, seed=s) for s in range(3)]
    candidates = {name: read_recipe(name).resolve(spec) for name in ("int4", "int8_wo")}
    units = sensitivities(checkpoint, candidates | {"none": {}}, windows, CPU)
    assert [u.names for u in units[:2]] == [
        ("layers.0.attn.q", "layers.0.attn.k", "layers.0.attn.v"), ("layers.0.attn.o",)
    ]  # fmt: skip
    for unit in (units[0], units[-1]):
        rules = "\n".join(f"- {{match: {name}, weight: int4_g128}}" for name in unit.names)
        target = tmp_path / unit.names[0]
        compress(checkpoint, plan(checkpoint, parse_recipe("one", f"rules:\n{rules}")), target)
        written = open_checkpoint(target)
        kl = evaluate(written, checkpoint, windows, CPU).kl_mean
        by_name = {o.candidate: o for o in unit.options}
        assert kl is not None
        assert by_name["int4"].loss == pytest.approx(kl.value, rel=1e-3)
        assert by_name["none"].loss == 0 < by_name["int8_wo"].loss < by_name["int4"].loss
        weights = sum(x.in_features * x.out_features for x in spec.linears() if x.name in unit.names)
        assert by_name["none"].bits == 16 * weights
        assert by_name["int4"].bits == pytest.approx(4.125 * weights)


def test_the_estimate_is_near_the_measured_losses(source):
    checkpoint = open_checkpoint(source)
    candidates = {"int4": read_recipe("int4").resolve(checkpoint.spec), "none": {}}
    windows = [ids(64, seed=s) for s in range(6)]
    measured, estimated = (
        torch.tensor([u.options[0].loss for u in sensitivities(checkpoint, candidates, windows, CPU, score)])
        for score in ("kl", "gradient")
    )
    ratio = estimated / measured
    assert ratio.median().item() == pytest.approx(1, abs=0.5)
    assert (ratio.log().abs() < 1.5).all()


@pytest.mark.parametrize("score", ["kl", "gradient"])
def test_what_was_chosen_is_written_and_can_be_done_again(source, tmp_path, score):
    checkpoint = open_checkpoint(source)
    recipe = parse_recipe("own", AUTO.replace("BITS", "6.0").replace("windows", f"score: {score}, windows"))
    decision = decide(checkpoint, recipe.with_kv("fp8").with_head("fp8"), CPU)
    assert 4.2 < decision.bits <= 6.0
    assert len(set(decision.candidate.values())) > 1
    report = compress(checkpoint, plan(checkpoint, decision.recipe), tmp_path / "out")
    assert report.verified is not None
    quantized = {n: c for n, c in decision.candidate.items() if c != "none"}
    written = open_checkpoint(tmp_path / "out")
    assert written.quant.keys() == quantized.keys() | {"lm_head"}
    assert len(written.kv) == 2  # what was asked for beside it is still there
    again = read_recipe(str(tmp_path / "out" / "recipe.yaml"))
    again = again.with_kv("fp8").with_head("fp8")
    assert again.resolve(checkpoint.spec) == decision.recipe.resolve(checkpoint.spec)
    compress(checkpoint, plan(checkpoint, again), tmp_path / "again")
    same_tensors(written, open_checkpoint(tmp_path / "again"))


def test_a_larger_budget_never_loses_more(source):
    checkpoint = open_checkpoint(source)
    losses = [
        decide(checkpoint, parse_recipe("own", AUTO.replace("BITS", bits)), CPU).loss for bits in ("4.2", "8", "16")
    ]
    assert losses[0] > losses[1] > losses[2] == 0


@pytest.mark.parametrize(
    ("given_", "words"),
    [
        ({"bits": 0}, "bits is 0; expected a number above 0"),
        ({"candidates": ["fp8"]}, "expected a list of two or more recipes"),
        ({"score": "guess"}, "score is 'guess'; known: kl, gradient"),
        ({"windows": 0}, "windows is 0; expected a whole number"),
    ],
)
def test_wrong_settings(given_, words):
    with pytest.raises(RecipeError, match=words):
        Settings(**given_)


def test_what_cannot_be_decided(source):
    checkpoint = open_checkpoint(source)
    recipe = parse_recipe("own", AUTO.replace("BITS", "3.5"))
    with pytest.raises(UnsupportedError, match=r"even the smallest candidates take 4\.1\d bits a weight, not 3\.5"):
        decide(checkpoint, recipe, CPU)
    with pytest.raises(RecipeError, match="decides by measuring"):
        plan(checkpoint, recipe)
    with pytest.raises(RecipeError, match="own: auto makes the rules; leave them out"):
        parse_recipe("own", 'rules: [{match: "*", weight: fp8}]\n' + AUTO.replace("BITS", "5"))
    with pytest.raises(RecipeError, match="candidate int4_awq is not one rule without techniques"):
        decide(checkpoint, parse_recipe("own", AUTO.replace("BITS", "5").replace("int8_wo", "int4_awq")), CPU)
    with pytest.raises(RecipeError, match="auto cannot count the branches of svdquant"):
        parse_recipe("own", AUTO.replace("BITS", "5").replace("}]", "}, svdquant: {}]"))
    with pytest.raises(RecipeError, match="technique svdquant stands twice"):
        parse_recipe(
            "own", 'rules: [{match: "*", weight: fp8}]\ntechniques: [svdquant: {rank: 4}, svdquant: {rank: 8}]'
        )
    with pytest.raises(RecipeError, match="unknown recipe 'fp9'"):
        decide(checkpoint, parse_recipe("own", AUTO.replace("BITS", "5").replace("int8_wo", "fp9")), CPU)

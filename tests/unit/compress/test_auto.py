"""Automatic mixed precision: the knapsack against trying everything, measured losses against the model itself."""

from __future__ import annotations

import fnmatch
import itertools
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fewbit.checkpoint import open_checkpoint
from fewbit.compress import compress, decide, plan, read_recipe
from fewbit.compress.decide import patterns
from fewbit.compress.recipe import AS_IT_WAS, parse_recipe
from fewbit.compress.sensitivity import sensitivities
from fewbit.compress.steptimes import StepTimes, groups_of, shape_of
from fewbit.compress.techniques.auto import Option, Settings, cheapest
from fewbit.errors import RecipeError, UnsupportedError
from fewbit.measure import steptimes
from fewbit.measure.dummy import dummy_checkpoint, shape_named
from fewbit.measure.quality import evaluate
from fewbit.spec.decoder import role_of
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


LAST_BITS = [[Option("0", 1, loss), Option("1", 2, 0.0)] for loss in (1.0, 1.2260786989235275, 6.0)]


@given(problems())
@example((LAST_BITS, 6))
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
    with pytest.raises(UnsupportedError, match="the smallest candidates take 5, the budget is 4"):
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


def table(spec, path, **changes):
    """Step times in which int4 and int8_wo save something of every layer."""
    more = {g[0]: {"none": 0.0, "int8_wo": -1e-4 * len(g), "int4": -1.5e-4 * len(g)} for g in groups_of(spec)}
    made = StepTimes("a machine", shape_of(spec), None, 2, 64, "none", 1e-3, 1e-2, more, 0.01)
    replace(made, **changes).write(path)
    return path


def fast(path, speed, more=""):
    line = f"tokens_per_s: {speed}, times: {path}, candidates: [int4, int8_wo, none], windows: 2{more}"
    return parse_recipe("own", f"techniques: [auto: {{{line}}}]\ncalib: {{samples: 4, length: 32}}")


def test_a_speed_is_reached_and_no_faster_choice_loses_less(source, tmp_path):
    checkpoint = open_checkpoint(source)
    path = table(checkpoint.spec, tmp_path / "times.json")
    layers = len(checkpoint.spec.layers)
    slowest, fastest = 2 / (1e-3 + layers * 1e-2), 2 / (1e-3 + layers * (1e-2 - 7 * 1.5e-4))
    wanted = (slowest + fastest) / 2
    found = decide(checkpoint, fast(path, wanted), CPU)
    assert found.tokens_per_s >= wanted
    assert f"# Made by auto: int4, int8_wo, none at {wanted:g} tokens/s, by kl: " in found.recipe.text
    assert found.recipe.resolve(checkpoint.spec).keys() == {n for n, c in found.candidate.items() if c != "none"}
    seconds = [[StepTimes.read(path).of(role_of(u.names[0]), o.candidate) for o in u.options]
               for u in found.units]  # fmt: skip
    least = min(
        sum(u.options[i].loss for u, i in zip(found.units, choice, strict=True))
        for choice in itertools.product(*(range(len(u.options)) for u in found.units))
        if 1e-3 + layers * 1e-2 + sum(s[i] for s, i in zip(seconds, choice, strict=True)) <= 2 / wanted
    )
    assert found.loss == pytest.approx(least)
    assert decide(checkpoint, fast(path, slowest * 0.99), CPU).loss == 0.0
    with pytest.raises(UnsupportedError, match=rf"even the fastest candidates make {fastest:.1f} tokens/s of 2 seq"):
        decide(checkpoint, fast(path, fastest * 1.01), CPU)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": {"hidden": 1}}, r"were measured with hidden 1, the model has 128, width None, the model has 256"),
        ({"kv": "fp8"}, r"were measured with K and V in fp8, not the model's own dtype"),
        ({"more": {r: {"none": 0.0} for r in ("attn.q", "attn.o", "mlp.gate", "mlp.down")}}, "holds none, not int4"),
    ],
)
def test_times_of_something_else(source, tmp_path, changes, message):
    checkpoint = open_checkpoint(source)
    with pytest.raises((UnsupportedError, RecipeError), match=message):
        decide(checkpoint, fast(table(checkpoint.spec, tmp_path / "t.json", **changes), 1.0), CPU)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("bits: 4, tokens_per_s: 3, times: t.json", "bits and tokens_per_s are both set"),
        ("tokens_per_s: 3", "tokens_per_s and times go together"),
        ("times: t.json", "tokens_per_s and times go together"),
        ("tokens_per_s: -1, times: t.json", "tokens_per_s is -1; expected a number above 0"),
    ],
)
def test_budgets_that_make_no_sense(line, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe("own", f"techniques: [auto: {{{line}}}]")


def test_a_file_that_is_no_table(tmp_path):
    (tmp_path / "t.json").write_text("{}")
    for name in ("t.json", "none.json"):
        with pytest.raises(RecipeError, match=r"is no table of step times .*; make one with fewbit bench step"):
            StepTimes.read(tmp_path / name)


def test_step_times_are_differences(tmp_path, monkeypatch):
    """Of a machine on which a byte takes a nanosecond, and one step in four is disturbed."""
    config = json.loads(
        (make_model(tmp_path / "m", hidden_size=128, intermediate_size=256) / "config.json").read_text()
    )
    rounds = itertools.count()

    def step(config, recipe, device, layers, batch, context):
        checkpoint = dummy_checkpoint(config, recipe, device, layers)
        bits = sum(
            x.in_features * x.out_features * (8 if x.name in checkpoint.quant else 16)
            for x in checkpoint.spec.linears()
        )
        return bits / 8 * 1e-9 * (2 if next(rounds) % 4 == 0 else 1)

    monkeypatch.setattr(steptimes, "_step", step)
    found = steptimes.measure(config, ["none", "int8_wo"], CPU, context=8, batch=2, layers=2)
    found.write(tmp_path / "t.json")
    assert StepTimes.read(tmp_path / "t.json") == found
    spec = dummy_checkpoint(config, AS_IT_WAS, CPU).spec
    sizes = {x.name: x.in_features * x.out_features for x in spec.linears()}
    for group in groups_of(spec):
        saved = sum(sizes[f"layers.0.{role}"] for role in group) * 1e-9
        assert found.more[group[0]] == {"none": 0.0, "int8_wo": pytest.approx(-saved)}
    assert found.fixed == pytest.approx(sizes["lm_head"] * 2e-9)
    assert found.seconds(len(spec.layers)) == pytest.approx(sum(sizes.values()) * 2e-9)
    assert found.spread == pytest.approx(1.0)
    monkeypatch.setattr(steptimes, "_step", lambda *a: 1.0)
    with pytest.raises(UnsupportedError, match="does not add up: something else keeps this machine busy"):
        steptimes.measure(config, ["none", "int8_wo"], CPU, context=8)


def test_a_step_is_timed():
    config = shape_named("llama3.2-1b") | {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 64, "head_dim": 16}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    assert steptimes._step(config, AS_IT_WAS, CPU, 2, 3, 8) > 0
    assert steptimes._step(config, AS_IT_WAS, CPU, 2, 12, 100) > 0  # more prompts than a step takes


def test_experts_are_decided_together(tmp_path):
    checkpoint = open_checkpoint(make_model(tmp_path / "m", "qwen3_moe", mlp_only_layers=[1]))
    found = decide(checkpoint, parse_recipe("own", AUTO.replace("BITS", "8.5")), CPU)
    roles = [{role_of(name) for name in unit.names} for unit in found.units]
    assert roles[2:4] == [{"mlp.experts.*.gate", "mlp.experts.*.up"}, {"mlp.experts.*.down"}]
    assert len(found.units[2].names) == 12
    resolved = found.recipe.resolve(checkpoint.spec)
    assert {name for name, chosen in found.candidate.items() if chosen != "none"} == resolved.keys()
    assert all(len(rule.match.split(".")) < 7 for rule in found.recipe.rules)
    with pytest.raises(UnsupportedError, match="step times are of models whose layers are alike"):
        groups_of(checkpoint.spec)
    assert not any("experts." in rule.match and "experts.*" not in rule.match for rule in found.recipe.rules)


def test_gradients_of_experts_that_saw_nothing(tmp_path):
    checkpoint = open_checkpoint(make_model(tmp_path / "m", "qwen3_moe", num_experts=16, num_hidden_layers=1))
    text = AUTO.replace("BITS", "8.5").replace("windows: 3", "windows: 3, score: gradient").replace("32", "6")
    found = decide(checkpoint, parse_recipe("own", text), CPU)
    experts = [unit for unit in found.units if "experts" in unit.names[0]]
    assert len(experts) == 2
    by_name = {o.candidate: o.loss for o in experts[0].options}
    assert by_name["none"] == 0 < by_name["int8_wo"] < by_name["int4"]

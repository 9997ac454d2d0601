"""Techniques against what they promise: the same function after folding, the error of the output never larger."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbit.checkpoint import open_checkpoint
from fewbit.compress import compress, plan
from fewbit.compress.fold import InputGroup, fold, input_groups
from fewbit.compress.recipe import Calibration, Source, parse_recipe, read_recipe
from fewbit.compress.stats import Block, Recorder, Stats
from fewbit.compress.techniques import awq, gptq, scale_search, smoothquant
from fewbit.errors import RecipeError, UnsupportedError
from fewbit.model import DecoderLayer, DenseAttend, KVCodec, Linear, Loader
from fewbit.model.rope import Rotary
from fewbit.numerics.format import FORMATS
from fewbit.numerics.qtensor import block_size
from fewbit.numerics.quantspec import QuantSpec
from fewbit.numerics.reference import quantize, round_to
from fewbit.ops.linear import LinearWeights
from fewbit.ops.linear.dense import Dense
from helpers import WIDE, ids, make_model

FAMILIES = {"llama": {"attention_bias": True, "mlp_bias": True}, "qwen2": {}, "qwen3": {}}
FORMATS_OF_WEIGHTS = ["int8_row", "int4_g32", "int4_g64_asym", "fp8", "fp8_row", "nvfp4", "mxfp4", "fp8_block"]


def block_of(path: Path, fmt: str = "int4_g32", input_: str | None = None) -> Block:
    """The first block of a model, all linears to be quantized, its statistics those of random states."""
    checkpoint = open_checkpoint(path)
    loader = Loader(checkpoint, torch.device("cpu"))
    shapes = checkpoint.spec.layer_linears(0)
    weights = {s.name: loader.weights(s) for s in shapes}
    quant = QuantSpec(FORMATS[fmt], FORMATS[input_] if input_ else None)
    block = Block(
        0, checkpoint.spec.layers[0], {s.name: quant for s in shapes},
        {n: w.weight.float() for n, w in weights.items()}, loader.norms(0), checkpoint.dtype,
        {n: w.bias.float() for n, w in weights.items() if w.bias is not None},
    )  # fmt: skip
    shared: dict[str, Stats] = {}
    for s in shapes:
        empty = Stats.empty(s.in_features, torch.device("cpu"), {"hessian"})
        block.stats[s.name] = shared.setdefault(s.shares_input or s.name, empty)
    run(block, recording(block))
    return block


def recording(block: Block) -> DecoderLayer:
    layer, seen = layer_of(block), set()
    for name, stats in block.stats.items():
        if id(stats) not in seen:
            seen.add(id(stats))
            leaf = name.rpartition(".")[2]
            layer.linears[leaf] = Recorder(layer.linears[leaf], stats)
    return layer


def layer_of(block: Block) -> DecoderLayer:
    linears = {
        n.rpartition(".")[2]: Linear(Dense(), LinearWeights(QuantSpec(), w, block.biases.get(n)), torch.float32)
        for n, w in block.weights.items()
    }
    return DecoderLayer(0, block.layer, linears, {n: w.float() for n, w in block.norms.items()})


def run(block: Block, layer: DecoderLayer, seed: int = 0) -> torch.Tensor:
    width = block.weights["layers.0.attn.q"].shape[1]
    x = torch.randn(30, width, generator=torch.Generator().manual_seed(seed))
    return layer(x, Rotary(torch.arange(30), torch.float32), DenseAttend([KVCodec(torch.float32)], 30))


@pytest.fixture(params=sorted(FAMILIES))
def model(request, tmp_path) -> Path:
    return make_model(tmp_path / "m", request.param, torch.bfloat16, **WIDE, **FAMILIES[request.param])


# --- folding ----------------------------------------------------------------------------------------------------------


def test_folding_keeps_the_function_although_norms_are_rounded(model):
    block = block_of(model)
    before, random = run(block, layer_of(block), 1), torch.Generator().manual_seed(3)
    for group in input_groups(block):
        width = block.weights[group.consumers[0]].shape[1]
        fold(block, group, group.tie(torch.rand(width, generator=random) * 9 + 0.1))
    for name in ("pre_attn", "pre_mlp"):
        assert torch.equal(block.norms[name], block.norms[name].bfloat16().to(block.norms[name].dtype))
    after = run(block, layer_of(block), 1)
    assert (after - before).norm() / before.norm() < 1e-5


def test_statistics_follow_a_fold(model):
    block = block_of(model)
    block.k_amax = block.v_amax = torch.ones(block.layer.attention.kv_heads * block.layer.attention.head_dim)
    for group in input_groups(block):
        width = block.weights[group.consumers[0]].shape[1]
        fold(block, group, group.tie(torch.rand(width) + 0.5))
    fresh = replace(block, stats={})
    shared = {}
    for name, stats in block.stats.items():
        fresh.stats[name] = shared.setdefault(id(stats), Stats.empty(len(stats.amax), torch.device("cpu"), {"hessian"}))
    run(fresh, recording(fresh))
    for name, stats in block.stats.items():
        torch.testing.assert_close(stats.amax, fresh.stats[name].amax, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(stats.hessian, fresh.stats[name].hessian, rtol=1e-3, atol=1e-2)
    assert not torch.equal(block.v_amax, torch.ones_like(block.v_amax))
    assert torch.equal(block.k_amax, torch.ones_like(block.k_amax))


def test_a_fold_that_would_change_the_function_is_refused(model):
    block = block_of(model)
    o = next(g for g in input_groups(block) if g.linear.endswith(".v"))
    width = block.weights[o.consumers[0]].shape[1]
    if o.heads > 1:
        with pytest.raises(ValueError, match="need one scale"):
            fold(block, o, torch.rand(width) + 0.5)
    with pytest.raises(ValueError, match="positive"):
        fold(block, o, torch.zeros(width))


def test_groups_without_a_quantized_linear_are_left_alone(model):
    block = block_of(model)
    block.quant = {n: q for n, q in block.quant.items() if n.endswith("down")}
    assert [g.consumers for g in input_groups(block)] == [("layers.0.mlp.down",)]


# --- GPTQ -------------------------------------------------------------------------------------------------------------


def problem(rows: int = 48, columns: int = 192, seed: int = 0) -> tuple[torch.Tensor, Stats]:
    """A weight and inputs whose channels go together."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=random) / columns**0.5 + torch.eye(columns)
    x = torch.randn(600, columns, generator=random) @ mix * (torch.rand(columns, generator=random) * 3)
    stats = Stats.empty(columns, torch.device("cpu"), {"hessian"})
    stats.see(x)
    return torch.randn(rows, columns, generator=random), stats


def error(q, weight, stats) -> float:
    off = (q.dequantize() - weight).double()
    return float(((off @ stats.hessian.double()) * off).sum())


def one_by_one(weight: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor, damping: float) -> torch.Tensor:
    """The algorithm as the paper derives it: after each column the inverse of what is left is made anew, in float64."""
    w, h = weight.double().clone(), hessian.double()
    h = h + torch.eye(len(h)) * h.diagonal().mean() * damping
    codes = torch.zeros_like(w)
    for i in range(w.shape[1]):
        inverse = torch.linalg.inv(h[i:, i:])
        codes[:, i] = (w[:, i] / scale[:, 0]).round().clamp(-128, 127)
        off = (w[:, i] - codes[:, i] * scale[:, 0]) / inverse[0, 0]
        w[:, i:] -= off[:, None] * inverse[0]
    return codes


def test_gptq_is_the_papers_algorithm():
    weight, stats = problem(16, 150)
    q = gptq.Settings(act_order=False).layer(weight, QuantSpec(FORMATS["int8_row"]), stats, None)
    codes = q.codes.view(torch.int8).double()
    expected = one_by_one(weight, stats.hessian, q.scales().double(), 0.01)
    assert (codes != expected).double().mean() < 0.002  # ties of float32 and float64
    assert (codes - expected).abs().max() <= 1


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("fmt", FORMATS_OF_WEIGHTS)
def test_gptq_leaves_less_error_than_rounding(fmt, act_order):
    weight, stats = problem(128, 256)
    q = gptq.Settings(act_order=act_order).layer(weight, QuantSpec(FORMATS[fmt]), stats, None)
    plain = quantize(weight, FORMATS[fmt])
    assert error(q, weight, stats) < 0.9 * error(plain, weight, stats)
    assert q.parts().keys() == plain.parts().keys()
    assert all(q.parts()[n].shape == plain.parts()[n].shape for n in q.parts())


def test_gptq_keeps_the_outer_scale_it_is_given():
    weight, stats = problem(32, 64)
    outer = torch.tensor(2.0**-6)
    q = gptq.Settings().layer(weight, QuantSpec(FORMATS["nvfp4"]), stats, outer)
    assert q.outer == outer


def test_gptq_rounds_to_nearest_where_the_inputs_say_nothing():
    weight, stats = problem(32, 64)
    stats.hessian[:, 5] = stats.hessian[5] = 0
    q = gptq.Settings(act_order=False).layer(weight, QuantSpec(FORMATS["int8_row"]), stats, None)
    assert torch.equal(q.codes[:, 5], round_to(weight, q).codes[:, 5])
    stats.hessian.zero_()
    q = gptq.Settings().layer(weight, QuantSpec(FORMATS["int8_row"]), stats, None)
    assert error(q, weight, replace(stats, hessian=torch.eye(64))) <= error(
        quantize(weight, FORMATS["int8_row"]), weight, replace(stats, hessian=torch.eye(64))
    )


def test_gptq_damps_a_singular_hessian_and_says_so(caplog):
    weight, _ = problem(16, 64)
    stats = Stats.empty(64, torch.device("cpu"), {"hessian"})
    stats.hessian -= 1e-2 * torch.eye(64)  # not even semidefinite, as rounding may leave it
    stats.hessian[0, 0] = 5.0
    stats.hessian[1:, 1:].diagonal().fill_(1.0)
    stats.hessian[1, 2] = stats.hessian[2, 1] = 1.03
    with caplog.at_level(logging.WARNING):
        gptq.Settings(damping=0.001).layer(weight, QuantSpec(FORMATS["int8_row"]), stats, None)
    assert "singular" in caplog.text
    stats.hessian.fill_(float("nan"))
    with pytest.raises(UnsupportedError, match="cannot invert"):
        gptq.Settings().layer(weight, QuantSpec(FORMATS["int8_row"]), stats, None)


# --- the search for scales --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS_OF_WEIGHTS)
def test_searched_scales_leave_no_more_error_in_any_block(fmt):
    weight, stats = problem(128, 256)
    q = scale_search.Settings().layer(weight, QuantSpec(FORMATS[fmt]), stats, None)
    plain = quantize(weight, FORMATS[fmt])
    assert q.parts().keys() == plain.parts().keys()

    def errors(q):
        rows, columns = block_size(FORMATS[fmt], weight.shape)
        off = (q.dequantize() - weight).square() * stats.importance()
        return off.view(len(weight) // rows, rows, 256 // columns, columns).sum((1, 3))

    assert (errors(q) <= errors(plain) * (1 + 1e-5)).all()
    if fmt in ("nvfp4", "int4_g32", "int4_g64_asym"):
        assert errors(q).sum() < 0.97 * errors(plain).sum()


def test_a_block_of_nvfp4_may_end_at_4():
    """Three quarters of the largest: 4.5 is no number under a largest of 6, but 3 is one under a largest of 4."""
    weight = torch.tensor([[1.0, 0.75, -0.75, 0.75] * 4])
    stats = Stats.empty(16, torch.device("cpu"), {"hessian"})
    q = scale_search.Settings().layer(weight, QuantSpec(FORMATS["nvfp4"]), stats, torch.tensor(2.0**-8))
    assert torch.equal(q.dequantize(), weight)
    assert not torch.equal(quantize(weight, FORMATS["nvfp4"], outer=torch.tensor(2.0**-8)).dequantize(), weight)


# --- AWQ and SmoothQuant ----------------------------------------------------------------------------------------------


def spoil(block: Block, times: float = 50.0) -> None:
    """Make a few channels of every input an outlier without changing the function, as large models have them."""
    for group in input_groups(block):
        width = block.weights[group.consumers[0]].shape[1]
        scale = torch.ones(width)
        scale[torch.randperm(width, generator=torch.Generator().manual_seed(1))[:3]] = 1 / times
        rows = scale.view(-1, group.heads, group.width) if group.heads > 1 else None
        fold(block, group, scale if rows is None else rows.amin(1, keepdim=True).expand_as(rows).reshape(-1))


def total_error(block: Block, wanted: torch.Tensor) -> float:
    rounded = replace(
        block, weights={n: quantize(w, block.quant[n].weight).dequantize() for n, w in block.weights.items()}
    )
    return float((run(rounded, layer_of(rounded), 1) - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("fmt", ["int4_g32", "int4_g64_asym", "nvfp4"])
def test_awq_brings_the_output_closer(model, fmt):
    block = block_of(model, fmt)
    wanted = run(block, layer_of(block), 1)
    spoil(block)
    torch.testing.assert_close(run(block, layer_of(block), 1), wanted, rtol=1e-3, atol=1e-4)
    plain = total_error(block, wanted)
    awq.Settings(steps=10).block(block)
    assert total_error(block, wanted) < 0.97 * plain


def test_awq_without_anything_to_gain_changes_no_scale():
    """Numbers that the format says exactly: no scale and no clipping is better than none."""
    stats = Stats.empty(32, torch.device("cpu"), {"hessian"})
    stats.see(torch.randn(100, 32))
    weight = quantize(torch.randn(8, 32), FORMATS["int4_g32"]).dequantize()
    settings, block = awq.Settings(), Block.__new__(Block)
    block.weights, block.stats = {"a": weight}, {"a": stats}
    block.quant = {"a": QuantSpec(FORMATS["int4_g32"])}
    assert torch.equal(settings._scale(block, InputGroup(("a",)), ["a"]), torch.ones(32))
    before = weight.clone()
    awq._clip(weight, FORMATS["int4_g32"], stats)
    assert torch.equal(weight, before)


def test_smoothquant_moves_outliers_into_the_weights(model):
    block = block_of(model, "int8_row", "int8_row")
    wanted = run(block, layer_of(block), 1)
    spoil(block)
    spread = {n: float(s.amax.max() / s.amax.median()) for n, s in block.stats.items()}
    smoothquant.Settings(alpha=0.8).block(block)
    assert (run(block, layer_of(block), 1) - wanted).norm() / wanted.norm() < 1e-4
    for name, stats in block.stats.items():
        assert float(stats.amax.max() / stats.amax.median()) < 0.5 * spread[name], name


def test_smoothquant_leaves_weight_only_linears_alone(model):
    block = block_of(model, "int8_row")
    before = {n: w.clone() for n, w in block.weights.items()}
    smoothquant.Settings().block(block)
    assert all(torch.equal(before[n], w) for n, w in block.weights.items())


# --- in a recipe ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("technique", "message"),
    [
        ("smoothquant: {alpha: 2}", "alpha is 2; expected a number from 0 to 1"),
        ("gptq: {damping: 0}", "damping is 0; expected a number above 0"),
        ("gptq: {act_order: 1}", "act_order is 1; expected true or false"),
        ("awq: {steps: 0}", "steps is 0; expected a whole number"),
        ("awq: {clip: maybe}", "clip is 'maybe'; expected true or false"),
        ("gptq: {dampening: 1}", "unknown setting 'dampening'"),
    ],
)
def test_a_wrong_setting_is_one_line(technique, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe("own", f"rules: [{{match: '*', weight: int4_g32}}]\ntechniques: [{technique}]")


OWN = {
    "int4_gptq": "rules: [{match: 'layers.*', weight: int4_g32}]\ntechniques: [gptq: {}]",
    "int4_awq": "rules: [{match: 'layers.*', weight: int4_g32}]\ntechniques: [awq: {}]",
    "int8_sq_static": read_recipe("int8_sq_static").text,
}
PLAIN = {
    "int4_gptq": "rules: [{match: 'layers.*', weight: int4_g32}]",
    "int4_awq": "rules: [{match: 'layers.*', weight: int4_g32}]",
    "int8_sq_static": "rules: [{match: 'layers.*', weight: int8_row, input: int8, input_scale: static}]",
}


@pytest.mark.parametrize("name", sorted(OWN))
def test_a_compressed_model_is_closer_than_one_rounded_to_nearest(name, tmp_path):
    """With outliers in the norms, on the data it was calibrated on; files open and give back the model."""
    source = make_model(tmp_path / "m", "qwen2", torch.bfloat16, **WIDE)
    tensors = load_file(source / "model.safetensors")
    for layer in range(2):
        for norm, consumers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            tensors[f"model.layers.{layer}.{norm}.weight"][[3, 50, 77]] *= 8  # a power of two: exact in bfloat16
            for consumer in consumers:
                tensors[f"model.layers.{layer}.{consumer}.weight"][:, [3, 50, 77]] /= 8
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"ids": ids(60, seed=s)}) for s in range(8)))
    found = {}
    for kind, text in (("plain", PLAIN[name]), ("own", OWN[name])):
        recipe = replace(parse_recipe("own", text), calibration=Calibration(8, 64, (Source(rows),))).with_kv("fp8")
        checkpoint = open_checkpoint(source)
        report = compress(checkpoint, plan(checkpoint, recipe), tmp_path / kind)
        assert report.verified is not None
        found[kind] = report.kl
    assert found["own"] < 0.9 * found["plain"], found


# --- smoothing by output error, bias correction -----------------------------------------------------------------------


def sampled(path: Path, fmt: str = "int8_row", input_: str = "int8_row") -> Block:
    block = block_of(path, fmt, input_)
    for name, stats in block.stats.items():
        g = torch.Generator().manual_seed(len(name))
        root = torch.linalg.cholesky(stats.hessian / stats.tokens + 1e-3 * torch.eye(len(stats.amax)))
        stats.sample = torch.randn(200, len(stats.amax), generator=g) @ root.T
        stats.amax = stats.sample.abs().amax(0)
    return block


def test_auto_is_the_alpha_of_least_output_error(tmp_path):
    """Against every alpha of the grid, by the error after the fold, group by group."""
    path = make_model(tmp_path / "model")
    names = ("layers.0.mlp.gate", "layers.0.mlp.up")

    def error(alpha) -> float:
        block = sampled(path)
        block.quant = {n: block.quant[n] for n in names}  # scales of down would move into the rows of up
        for stats in {id(s): s for n in names if (s := block.stats[n])}.values():
            for channel in (1, 5):  # outliers
                stats.sample[:, channel] *= 50
                stats.amax[channel] *= 50
        meant = [block.stats[n].sample @ block.weights[n].float().T for n in names]
        smoothquant.Settings(alpha=alpha).block(block)
        off = 0.0
        for name, y in zip(names, meant, strict=True):
            x, w = block.stats[name].sample, block.weights[name].float()
            rounded = quantize(x, FORMATS["int8_row"]).dequantize() @ quantize(w, FORMATS["int8_row"]).dequantize().T
            off += (rounded - y).double().square().sum().item()
        return off

    errors = {alpha: error(alpha) for alpha in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)}
    assert error("auto") == pytest.approx(min(errors.values()), rel=0.02)
    assert min(errors.values()) < 0.9 * max(errors.values())
    assert smoothquant.Settings(alpha="auto").needs == "sample"


def test_a_sample_is_kept_of_the_inputs_and_no_more():
    stats = Stats.empty(4, torch.device("cpu"), {"sample"})
    g = torch.Generator().manual_seed(0)
    pieces = [torch.randn(n, 4, generator=g) for n in (1, 40, 100, 5000)]
    for piece in pieces:
        stats.see(piece)
    assert len(stats.sample) == 1 + 32 + 32 + 32
    rows = {tuple(row) for piece in pieces for row in piece.tolist()}
    assert all(tuple(row) in rows for row in stats.sample.tolist())
    for _ in range(40):
        stats.see(pieces[1])
    assert len(stats.sample) == 512
    assert torch.allclose(stats.total, sum(p.sum(0) for p in [*pieces, *[pieces[1]] * 40]), rtol=1e-4, atol=1e-2)


CORRECTED = """
rules: [{match: "layers.*", weight: int4_g32}]
techniques: [TECHNIQUES]
calib: {samples: 8, length: 32}
"""


@pytest.mark.parametrize("split", ["", "svdquant: {rank: 4}"])
def test_a_bias_takes_over_the_mean_error(tmp_path, split):
    """The mean output of every linear that has a bias is, on the calibration data, what it was."""
    path = make_model(tmp_path / "model", attention_bias=True, mlp_bias=True, hidden_size=128, dtype=torch.float32)
    checkpoint = open_checkpoint(path)
    written = {}
    for name, techniques in (("plain", split), ("corrected", ", ".join(filter(None, (split, "bias_correction: {}"))))):
        listed = ", ".join(f"{{{t}}}" for t in techniques.split(", ") if t)
        planned = plan(checkpoint, parse_recipe("own", CORRECTED.replace("TECHNIQUES", listed)))
        compress(checkpoint, planned, tmp_path / name)
        written[name] = open_checkpoint(tmp_path / name)
    loaders = {name: Loader(c, torch.device("cpu")) for name, c in written.items()}
    planned = plan(checkpoint, parse_recipe("own", CORRECTED.replace("TECHNIQUES", "gptq: {}")))
    from fewbit.compress.data import windows_of

    windows, _ = windows_of(checkpoint, planned.recipe.calibration)
    embed = Loader(checkpoint, torch.device("cpu")).embed()
    x = torch.cat([embed(torch.tensor(w), torch.arange(len(w)), torch.float32) for w in windows])
    layer = Loader(checkpoint, torch.device("cpu")).layer(0)
    from fewbit.model.decoder import normalize

    x = normalize(x, checkpoint.spec.layers[0].pre_attn, layer.norms["pre_attn"])
    meant = layer.linears["q"](x).mean(0)
    off = {name: (loader.layer(0).linears["q"](x).mean(0) - meant).norm().item() for name, loader in loaders.items()}
    assert off["plain"] > 1e-3
    assert off["corrected"] < 0.01 * off["plain"]
    assert torch.equal(*(w.tensors["layers.0.attn.q.weight"].codes for w in written.values()))


def test_only_what_norms_make_is_smoothed_where_that_is_asked(tmp_path):
    path = make_model(tmp_path / "model")
    for inputs in ("norms", "all"):
        block = block_of(path, "int8_row", "int8_row")
        before = {n: w.clone() for n, w in block.weights.items()}
        smoothquant.Settings(inputs=inputs).block(block)
        same = {n: torch.equal(block.weights[f"layers.0.{n}"], before[f"layers.0.{n}"]) for n in ("attn.o", "mlp.down")}
        assert set(same.values()) == {inputs == "norms"}
        assert not torch.equal(block.weights["layers.0.attn.q"], before["layers.0.attn.q"])
    with pytest.raises(RecipeError, match="smoothquant: inputs is 'some'; known: all, norms"):
        smoothquant.Settings(inputs="some")

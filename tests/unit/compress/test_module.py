"""Any torch module: what fake quantizers compute and learn, what is kept of them, and what a decoder is exported to."""

from __future__ import annotations

import copy
import json
import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
import yaml
from safetensors.torch import load_file
from torch import nn

import fewbit
from fewbit.checkpoint import open_checkpoint
from fewbit.compress import compress, plan
from fewbit.compress.data import calibration_windows
from fewbit.compress.fake import FakeConv2d, FakeLinear, FakeQuant, layers, patches
from fewbit.compress.known import known
from fewbit.compress.recipe import Calibration, parse_recipe
from fewbit.errors import CheckpointError, FewbitError, RecipeError, UnsupportedError
from fewbit.model import load
from fewbit.numerics.format import FORMATS
from fewbit.numerics.reference import fake_quantize, quantize
from fewbit.text import Tokenizer
from helpers import dense_logits, edit_json, ids, make_model

PAGE = Path(__file__).resolve().parents[3] / "docs" / "any-module.md"
WEIGHTS_ONLY = ["int4_g32", "int4_g64_asym", "int8", "int8_row", "fp8", "fp8_row", "fp8_block", "nvfp4", "mxfp4"]


class Net(nn.Module):
    """A little of everything: convolutions, an MLP whose two branches read one input, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(8, 16, 4, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.deep = nn.Conv2d(16, 32, (4, 2), groups=2, padding="same", padding_mode="reflect", dilation=2, bias=False)
        self.a, self.b = nn.Linear(128, 64), nn.Linear(128, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.deep(self.norm(self.stem(x))))  # [N, 32, 4, 4]
        x = x.flatten(2).mean(-1).repeat(1, 4)
        return self.head(F.silu(self.a(x)) * self.b(x))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))


def images(count: int = 4, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 8, 8, 8, generator=torch.Generator().manual_seed(seed))


def rows(count: int = 50, width: int = 64, seed: int = 1) -> torch.Tensor:
    """Inputs some channels of which are much larger than others."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=random) * torch.logspace(-1, 1, width)


def recipe_of(*rules: str, techniques: str = "", calib: str = ""):
    text = "rules:\n" + "".join(f"  - {{{rule}}}\n" for rule in rules)
    return parse_recipe("own", text + (f"techniques: [{techniques}]\n" if techniques else "") + calib)


def fakes(module: nn.Module) -> dict[str, FakeQuant]:
    return {name: m for name, m in module.named_modules() if isinstance(m, FakeQuant)}


# --- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", WEIGHTS_ONLY)
def test_weights_are_rounded_as_the_reference_rounds_them(fmt):
    module = mlp()
    before = copy.deepcopy(module)
    assert fewbit.quantize(module, recipe_of(f'match: "*", weight: {fmt}')) is module
    for layer, old in ((module[0], before[0]), (module[2], before[2])):
        expected = quantize(old.weight.detach(), FORMATS[fmt])
        assert layer.quantized().equal(expected)
        assert torch.equal(layer.rounded_weight(), expected.dequantize())
        assert torch.equal(layer.weight, old.weight)  # the parameter is what it was
    x = rows()
    hidden = F.relu(F.linear(x, module[0].rounded_weight(), before[0].bias))
    assert torch.equal(module(x), F.linear(hidden, module[2].rounded_weight(), before[2].bias))


@pytest.mark.parametrize(
    ("fmt", "scale"), [("int8_row", "dynamic"), ("fp8", "static"), ("mxfp4", "dynamic"), ("nvfp4", "outer")]
)
def test_inputs_are_rounded_as_the_reference_rounds_them(fmt, scale):
    layer, x = nn.Linear(64, 32), rows()
    fewbit.quantize(
        layer, recipe_of(f'match: "*", weight: int8_row, input: {fmt}, input_scale: {scale}'), lambda m: m(x)
    )
    assert isinstance(layer, FakeLinear)
    given = {
        "static": {"scale": x.abs().max().reshape(1, 1) / 448},
        "outer": {"outer": layer.input_scale},
        "dynamic": {},
    }
    expected = fake_quantize(x, FORMATS[fmt], **given[scale])
    torch.testing.assert_close(layer.rounded_input(x), expected, rtol=1e-6, atol=0)
    assert torch.equal(layer(x), F.linear(layer.rounded_input(x), layer.rounded_weight(), layer.bias))


def test_a_convolution_is_a_linear_layer_over_patches():
    module, x = net(), images()
    hidden = module.norm(module.stem(x))
    for conv, given in ((module.stem, x), (module.deep, hidden)):
        found = patches(conv, given)  # [N, L, groups, columns]
        weight = conv.weight.flatten(1).unflatten(0, (conv.groups, -1))
        out = torch.einsum("nlgc,goc->ngol", found, weight).flatten(1, 2).view_as(conv(given))
        out = out if conv.bias is None else out + conv.bias[:, None, None]
        torch.testing.assert_close(out, conv(given))
    fewbit.quantize(module, recipe_of('match: "*", weight: int8_row, input: int8_row'))
    assert isinstance(module.deep, FakeConv2d)
    for conv, given in ((module.stem, x), (module.deep, hidden)):
        expected = fake_quantize(patches(conv, given), FORMATS["int8_row"])
        weight = quantize(conv.weight.detach().flatten(1), FORMATS["int8_row"]).dequantize()
        out = torch.einsum("nlgc,goc->ngol", expected, weight.unflatten(0, (conv.groups, -1))).flatten(1, 2)
        out = out.view_as(conv(given)) if conv.bias is None else out.view_as(conv(given)) + conv.bias[:, None, None]
        torch.testing.assert_close(conv(given), out)
        torch.testing.assert_close(conv(given[0]), conv(given)[0])


@pytest.mark.parametrize("recipe", ["fp8", "fp8_dynamic", "int8", "int8_sq", "int8_sq_static", "int8_wo"])
def test_built_in_recipes_fit_a_small_net(recipe):
    module, x = net(), images()
    exact = module(x)
    fewbit.quantize(module, recipe, lambda m: m(x))
    assert set(fakes(module)) == {"stem", "deep", "a", "b"}
    error = (module(x) - exact).norm() / exact.norm()
    assert 0 < error < 0.15


def test_the_original_patterns_of_a_recipe_of_ones_own():
    module = net()
    fewbit.quantize(module, recipe_of("match: b, weight: none", 'match: "[ab]", weight: int8_row'))
    assert set(fakes(module)) == {"a"}
    with pytest.raises(RecipeError, match=re.escape("rules[0] 'layers.*' matches no Linear or Conv2d of the module")):
        fewbit.quantize(net(), recipe_of('match: "layers.*", weight: int8_row'))


def test_dtype_and_training_mode_are_kept():
    module = net().train().bfloat16()
    fewbit.quantize(module, "int8", lambda m: m(images().bfloat16()))
    assert all(m.training for m in module.modules())
    assert module.norm.num_batches_tracked == 0  # calibration left the running statistics alone
    assert module.eval()(images().bfloat16()).dtype == torch.bfloat16
    assert module.a.weight_scale.dtype == torch.float32
    before = module.a.weight_scale.clone()
    assert torch.equal(module.half().a.weight_scale, before)
    assert module.a.weight_scale.dtype == torch.float32


def test_a_fused_transformer_encoder_does_not_pass_the_quantizers_by():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0).eval()
    x = rows(10, 32)[None]
    exact = layer(x)
    fewbit.quantize(layer, recipe_of('match: "*", weight: int4_g32'))
    assert set(fakes(layer)) == {"linear1", "linear2"}  # out_proj belongs to a class that computes in its own way
    with torch.no_grad():
        found = layer(x)
    assert (found - exact).norm() / exact.norm() > 1e-3
    torch.testing.assert_close(found, layer(x).detach())


# --- what is learned --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["int8", "fp8"])
def test_gradients_are_those_of_the_rounded_layer_passed_straight_through(recipe):
    module, x = mlp(), rows().requires_grad_()
    fewbit.quantize(module, recipe, lambda m: m(rows()))
    module(x).square().sum().backward()
    weights = [module[i].rounded_weight().detach().requires_grad_() for i in (0, 2)]

    def rounded(layer: FakeQuant, y: torch.Tensor) -> torch.Tensor:
        return y + (layer.rounded_input(y) - y).detach()

    y = rows().requires_grad_()
    hidden = F.relu(F.linear(rounded(module[0], y), weights[0], module[0].bias.detach()))
    F.linear(rounded(module[2], hidden), weights[1], module[2].bias.detach()).square().sum().backward()
    for layer, weight in zip((module[0], module[2]), weights, strict=True):
        torch.testing.assert_close(layer.weight.grad, weight.grad)
    torch.testing.assert_close(x.grad, y.grad)


def test_a_few_steps_of_training_reduce_the_loss():
    x = rows(200)
    module, target = mlp(), mlp(seed=1)(x).detach()
    fewbit.quantize(module, recipe_of('match: "*", weight: int4_g32, input: int8_row'))
    optimizer = torch.optim.Adam(module.parameters(), 1e-3)
    losses, old = [], module[0].quantized()
    for _ in range(30):
        loss = F.mse_loss(module(x), target)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]
    assert not module[0].quantized().equal(old)
    assert torch.equal(module[0].quantized().scale, old.scale)  # scales stay


# --- techniques -------------------------------------------------------------------------------------------------------


def error(module: nn.Module, exact: nn.Module, x: torch.Tensor) -> float:
    return float((module(x) - exact(x)).detach().norm() / exact(x).detach().norm())


@pytest.mark.parametrize("technique", ["gptq", "scale_search", "awq", "smoothquant"])
def test_a_technique_is_no_worse_than_rounding_and_its_result_is_kept_bit_for_bit(technique):
    fmt = "int8_row" if technique == "smoothquant" else "int4_g32"
    rule, x = f'match: "*", weight: {fmt}, input: int8_row', rows(300)
    plain, clever, exact = mlp(), mlp(), mlp()
    fewbit.quantize(plain, recipe_of(rule))
    fewbit.quantize(clever, recipe_of(rule, techniques=f"{technique}: {{}}"), lambda m: m(x))
    assert error(clever, exact, x) < error(plain, exact, x)
    assert (clever[0].prescale is not None) == (technique in ("awq", "smoothquant"))
    # the parameter holds what the technique made of it: rounding it once more changes nothing
    if technique == "gptq":
        assert torch.equal(clever[0].weight.detach(), clever[0].rounded_weight().detach())
    if clever[0].prescale is not None:
        before = exact[0].weight.detach() / clever[0].prescale
        # awq also clips
        assert (
            (clever[0].weight.detach() - before).abs()
            <= (1e-6 if technique == "smoothquant" else 0.5) * before.abs() + 1e-7
        ).all()


def test_techniques_work_on_convolutions():
    x = images(16)
    rules = ("match: head, weight: none", 'match: "*", weight: int4_g32, input: int8_row')
    plain, clever = net(), net()
    fewbit.quantize(plain, recipe_of(*rules))
    fewbit.quantize(clever, recipe_of(*rules, techniques="awq: {}, gptq: {}"), lambda m: m(x))
    assert error(clever, net(), x) < error(plain, net(), x)
    assert clever.deep.prescale.shape == (64,)


def test_linears_of_one_input_share_their_outer_scale():
    module, x = net(), images()
    module.a.weight.data *= 100
    fewbit.quantize(module, recipe_of('match: "[ab]", weight: nvfp4'), lambda m: m(x))
    assert torch.equal(module.a.weight_outer, module.b.weight_outer)
    apart = net()
    apart.a.weight.data *= 100
    fewbit.quantize(apart, recipe_of('match: "[ab]", weight: nvfp4'))
    assert not torch.equal(apart.a.weight_outer, apart.b.weight_outer)


STATIC = 'match: "*", weight: int8_row, input: int8, input_scale: static'


def test_the_method_of_a_recipe_decides_how_far_static_scales_reach():
    x = rows(400)
    x[0, 0] = 1000.0
    scales = {}
    for method in ("max", "percentile"):
        layer = nn.Linear(64, 8)
        fewbit.quantize(layer, recipe_of(STATIC, calib=f"calib: {{method: {method}}}\n"), lambda m: m(x))
        scales[method] = float(layer.input_scale)
    assert scales["max"] == pytest.approx(1000 / 127.5)
    assert scales["percentile"] < 0.5 * scales["max"]


def test_the_method_looks_at_prescaled_inputs():
    x, errors = rows(400), {}
    for method in ("max", "mse"):
        module, recipe = mlp(), recipe_of(STATIC, techniques="smoothquant: {}", calib=f"calib: {{method: {method}}}\n")
        fewbit.quantize(module, recipe, lambda m: m(x))
        errors[method] = error(module, mlp(), x)
    assert errors["mse"] < 1.02 * errors["max"]


def test_layers_without_data_are_named(caplog):
    module = nn.ModuleDict({"used": nn.Linear(64, 64), "idle": nn.Linear(64, 64)})
    with caplog.at_level(logging.WARNING):
        fewbit.quantize(
            module, recipe_of('match: "*", weight: int4_g32', techniques="gptq: {}"), lambda m: m["used"](rows())
        )
    assert "forward_loop never ran idle: rounded to nearest" in caplog.text
    assert module["idle"].quantized().equal(quantize(module["idle"].weight.detach(), FORMATS["int4_g32"]))
    module = nn.ModuleDict({"used": nn.Linear(64, 64), "idle": nn.Linear(64, 64)})
    with pytest.raises(RecipeError, match="idle: forward_loop never ran it, so its input has no scale"):
        fewbit.quantize(module, "fp8", lambda m: m["used"](rows()))
    assert not fakes(module)


# --- what is refused --------------------------------------------------------------------------------------------------


def spoiled() -> nn.Module:
    module = mlp()
    module[2].weight.data[0, 0] = float("nan")
    return module


@pytest.mark.parametrize(
    ("module", "recipe", "words"),
    [
        (mlp, "int9", "unknown recipe 'int9'; did you mean"),
        (mlp, "fp8", "recipe fp8 needs data; pass forward_loop"),
        (mlp, "int8_sq", "recipe int8_sq needs data; pass forward_loop"),
        (mlp, "int4", "0: 64 columns do not divide into blocks of 128 (int4_g128)"),
        (nn.ReLU, "int8", "ReLU holds no Linear and no Conv2d"),
        (spoiled, "int8", "2: its weight holds NaN or infinity"),
        (lambda: mlp().to("meta"), "int8", "0: is on the meta device"),
        (lambda: fewbit.quantize(mlp(), "int8"), "int8", "0 is quantized already"),
        (lambda: nn.Sequential(nn.Embedding(4, 4)), "int8", "Sequential holds no Linear and no Conv2d"),
        (net, recipe_of("match: steem, weight: fp8"), "rules[0] 'steem' matches no Linear or Conv2d of the module"),
        (net, recipe_of('match: "*", weight: none'), "recipe own quantizes no layer of Net"),
        (net, recipe_of('match: "*", weight: int8_row', "match: a, weight: fp8"), "rules[1] 'a' decides nothing"),
        (net, replace(fewbit.read_recipe("int8"), name="kv").with_kv("fp8"), "stores K and V in fp8"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_clear_line(module, recipe, words):
    made = module()
    with pytest.raises(FewbitError, match=re.escape(words)) as e:
        fewbit.quantize(made, recipe)
    assert "\n" not in str(e.value)


def test_a_shared_weight_is_not_changed_behind_its_other_owners_back():
    module = nn.Sequential(nn.Embedding(64, 64), nn.Linear(64, 64, bias=False))
    module[1].weight = module[0].weight
    rule = 'match: "*", weight: int4_g32'
    fewbit.quantize(copy.deepcopy(module), recipe_of(rule))  # rounding alone changes no weight
    with pytest.raises(UnsupportedError, match=re.escape("1: its weight is that of 0.weight and 1.weight")):
        fewbit.quantize(module, recipe_of(rule, techniques="gptq: {}"), lambda m: m(torch.arange(64)))


def test_an_input_that_is_no_number_is_named():
    with pytest.raises(CheckpointError, match="the input of 0 holds NaN or infinity on the data of forward_loop"):
        fewbit.quantize(mlp(), "fp8", lambda m: m(rows() / 0))


# --- keeping it -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["fp8", "int8_sq_static", "awq", "nvfp4"])
def test_a_state_comes_back_bit_for_bit(recipe, tmp_path):
    module, x = net(), images()
    module.register_buffer("mask", torch.tensor([True, False]))
    module.register_buffer("wide", torch.tensor(0.1, dtype=torch.float64))
    rules = ("match: head, weight: none", 'match: "*", weight: int4_g32_asym')
    if recipe == "nvfp4":
        rules = (rules[0], 'match: "*", weight: nvfp4, input: nvfp4, input_scale: outer')
    given = recipe if recipe[:2] in ("fp", "in") else recipe_of(*rules, techniques="awq: {}, gptq: {}")
    fewbit.quantize(module, given, lambda m: m(x))
    assert fewbit.save_state(module, tmp_path / "state") == tmp_path / "state"
    words = json.loads((tmp_path / "state" / "config.json").read_text())
    assert words["recipes"][0]["text"] == (given if not isinstance(given, str) else fewbit.read_recipe(given)).text
    fresh = net(seed=5)
    fresh.register_buffer("mask", torch.tensor([False, False]))
    fresh.register_buffer("wide", torch.tensor(0.0, dtype=torch.float64))
    assert fewbit.restore_state(fresh, tmp_path / "state") is fresh
    assert torch.equal(fresh(x), module(x))
    assert fresh.state_dict().keys() == module.state_dict().keys()
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name]), name
    assert fewbit.quantizers(fresh) == fewbit.quantizers(module)
    # keys of weights are those of the module as it was, and anybody's safetensors reads them
    assert net().state_dict().keys() <= load_file(tmp_path / "state" / "model.safetensors").keys()
    fewbit.save_state(module, tmp_path / "state")  # replaces an earlier one
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_a_state_goes_on_training(tmp_path):
    module, x = mlp(), rows()
    fewbit.quantize(module, "int8")
    fewbit.save_state(module, tmp_path / "s")
    fresh = fewbit.restore_state(mlp(3), tmp_path / "s")
    fresh(x).sum().backward()
    assert fresh[0].weight.grad is not None


def another() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 16))


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (another, "'2.weight' is [32, 128], in this module [16, 128]"),
        (net, "quantizes '0', which is no Linear or Conv2d of this module; known:"),
        (lambda: nn.Sequential(*mlp(), nn.Linear(32, 4)), "lacks '3.weight' [4, 32] of this module"),
        (lambda: mlp().bfloat16(), "'0.weight' is torch.float32, in this module torch.bfloat16; convert the module"),
        (lambda: nn.Sequential(nn.Linear(64, 128, bias=False), nn.ReLU(), nn.Linear(128, 32)), "holds '0.bias', for"),
        (lambda: fewbit.quantize(mlp(), "int8"), "'0' of this module is quantized already"),
    ],
)
def test_a_state_of_another_architecture_is_refused(module, words, tmp_path):
    fewbit.save_state(fewbit.quantize(mlp(), "int8"), tmp_path / "s")
    fresh = module()
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    with pytest.raises(CheckpointError, match=re.escape(words)):
        fewbit.restore_state(fresh, tmp_path / "s")
    assert fresh.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.state_dict().items())


def test_what_is_no_state_is_refused(tmp_path):
    with pytest.raises(UnsupportedError, match=re.escape("Sequential has no fake quantizers; fewbit.quantize gives")):
        fewbit.save_state(mlp(), tmp_path / "s")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(CheckpointError, match="holds something that is no saved state; choose another folder"):
        fewbit.save_state(fewbit.quantize(mlp(), "int8"), tmp_path / "other")
    with pytest.raises(CheckpointError, match="holds no saved state that this fewbit reads"):
        fewbit.restore_state(mlp(), make_model(tmp_path / "model"))
    with pytest.raises(CheckpointError, match="is not a directory"):
        fewbit.restore_state(mlp(), tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fewbit_state": 2}, "holds no saved state that this fewbit reads (fewbit_state is 2)"),
        ({"layers": []}, "config.json is not put together as it should be: AttributeError"),
        ({"bytes": None}, "config.json is not put together as it should be: KeyError"),
        ({"layers": {"0": {"weight": "int8_row", "input": None, "input_scale": "often", "recipe": 0}}}, "'often'"),
        ({"layers": {"0": {"weight": "int7", "input": None, "input_scale": "dynamic", "recipe": 0}}}, "format 'int7'"),
    ],
)
def test_a_damaged_state_is_refused(changes, words, tmp_path):
    fewbit.save_state(fewbit.quantize(mlp(), "int8"), tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    with pytest.raises(FewbitError, match=re.escape(words)):
        fewbit.restore_state(mlp(), tmp_path)
    fewbit.save_state(fewbit.quantize(mlp(), "int8"), tmp_path / "s")
    whole = (tmp_path / "s" / "model.safetensors").read_bytes()
    (tmp_path / "s" / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="is damaged or truncated"):
        fewbit.restore_state(mlp(), tmp_path / "s")


def test_the_table_has_a_line_for_layers_that_are_alike():
    module = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(3)), nn.Conv2d(1, 1, 1))
    fewbit.quantize(
        module, recipe_of('match: "?.0", weight: int8, input: int8, input_scale: static'), lambda m: m[:3](rows())
    )
    header, linears, conv = fewbit.quantizers(module).splitlines()
    assert header.split("  ")[0] == "layers"
    assert re.fullmatch(r"\*\.\*\s+3\s+int8\s+\S+ to \S+\s+int8 \(static\)\s+\S+ to \S+", linears)
    assert re.fullmatch(r"\*\s+1\s+as it was", conv)


# --- transformers' decoders -------------------------------------------------------------------------------------------


def llama(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "m", dtype=torch.float32, intermediate_size=256)


@pytest.fixture(scope="module")
def windows(model) -> torch.Tensor:
    return torch.tensor(calibration_windows(Calibration(8, 32), Tokenizer.load(model)))


def logits_of(module: nn.Module, tokens: list[list[int]]) -> torch.Tensor:
    with torch.no_grad():
        return module(torch.tensor(tokens)).logits.flatten(0, 1)


TOKENS = [ids(24, seed=seed) for seed in range(3)]


@pytest.mark.parametrize("name", ["fp8", "int8", "int4", "int4_gptq", "int4_awq", "nvfp4_awq"])
def test_a_decoder_is_quantized_as_its_checkpoint_would_be(name, model, windows, tmp_path):
    recipe = replace(fewbit.read_recipe(name), calibration=Calibration(8, 32))
    checkpoint = open_checkpoint(model)
    compress(checkpoint, plan(checkpoint, recipe), tmp_path / "out")
    opened = open_checkpoint(tmp_path / "out")
    theirs = dense_logits(load(opened), TOKENS)
    module = llama(model)
    exact = logits_of(module, TOKENS)
    fewbit.quantize(module, recipe, lambda m: m(windows))
    assert not isinstance(module.lm_head, FakeQuant)
    assert len(fakes(module)) == 14
    assert not any(layer.quant.prescale for layer in fakes(module).values())  # norms and linears took the scales
    ours = logits_of(module, TOKENS)
    lost = (theirs - exact).norm()
    assert lost > 0
    if name in ("fp8", "int8", "int4"):
        q = module.model.layers[1].self_attn.k_proj.quantized()
        assert q.equal(opened.tensors["layers.1.attn.k.weight"])
        # there, static scales are calibrated behind rounded layers
        assert (ours - theirs).norm() < {"int4": 1e-4, "int8": 0.2, "fp8": 0.5}[name] * lost
    else:
        assert (ours - exact).norm() < 1.2 * lost


def test_a_model_of_bfloat16_and_a_part_of_a_model(model, windows):
    module = llama(model, torch.bfloat16)
    fewbit.quantize(module, "int8_sq", lambda m: m(windows))
    assert all(layer.quantized().codes.unique().numel() > 100 for layer in fakes(module).values())
    part = llama(model)
    fewbit.quantize(part.model, "int4_awq", lambda m: m(windows))  # its class is not that of a whole decoder
    assert all(layer.prescale is not None for layer in fakes(part).values())


# --- the quantizer of two configs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "layout"),
    [("fp8", "hf"), ("int8_sq", "compressed-tensors"), ("int4_awq", "hf"), ("nvfp4", "hf"), (None, "hf")],
)
def test_an_exported_decoder_is_the_module(algorithm, layout, model, windows, tmp_path):
    module = llama(model)
    quantizer = fewbit.Quantizer(
        {"algorithm": algorithm, "awq_block_size": 64, "sq_alpha": 0.5, "enable_kv_cache": None, "num_calib_size": 8},
        {"path": tmp_path / "out", "decoder_type": "llama", "inference_tensor_parallel": 2, "format": layout,
         "model_dir": str(model)},
    )  # fmt: skip
    assert quantizer.quantize(module, lambda m: m(windows)) is module
    assert quantizer.export(module) == tmp_path / "out"
    opened = open_checkpoint(tmp_path / "out")
    assert {str(q.weight) for q in opened.quant.values()} == {
        "fp8": {"fp8"}, "int8_sq": {"int8_row"}, "int4_awq": {"int4_g64"}, "nvfp4": {"nvfp4"}, None: set()
    }[algorithm]  # fmt: skip
    assert "tokenizer.json" in opened.files
    ours, theirs = logits_of(module, TOKENS), dense_logits(load(opened), TOKENS)
    assert (ours - theirs).norm() < 0.02 * theirs.norm()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_an_export_without_a_folder_beside_it_uses_the_models_own_config(model, tmp_path):
    module = llama(model)
    quantizer = fewbit.Quantizer({"algorithm": "int4"}, {"save_path": str(tmp_path / "out"), "dtype": "bf16"})
    quantizer.export(quantizer.quantize(module))
    opened = open_checkpoint(tmp_path / "out")
    assert opened.spec == open_checkpoint(model).spec
    assert opened.dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match="is not empty"):
        quantizer.export(module)


def test_a_tied_head_is_exported_untied_once_it_is_quantized(tmp_path):
    folder = make_model(tmp_path / "m", "qwen2", torch.float32, tie_word_embeddings=True)
    module = llama(folder)
    fewbit.quantize(module, fewbit.read_recipe("int8_wo").with_head("fp8"))
    fewbit.Quantizer(export_config={"path": tmp_path / "out"}).export(module)
    opened = open_checkpoint(tmp_path / "out")
    assert not opened.spec.tied
    assert opened.tensors["lm_head.weight"].equal(module.lm_head.quantized())
    assert known(module) is not None


@pytest.mark.parametrize(
    ("quantization", "export", "words"),
    [
        ({"algorithm": "fp9"}, {}, "unknown recipe 'fp9'"),
        ({"algoritm": "fp8"}, {}, "quantization_config: unknown key 'algoritm'; did you mean 'algorithm'?"),
        ({"algorithm": "fp8", "enable_kv_cache": True}, {}, "K and V are not seen from outside of a module"),
        ({"algorithm": "int4_awq", "awq_block_size": 48}, {}, "awq_block_size is 48; known: 32, 64, 128"),
        ({"algorithm": "int8_sq", "sq_alpha": 2}, {}, "alpha is 2; expected a number from 0 to 1"),
        ({}, {"dtype": "int7"}, "export_config: dtype is 'int7'"),
        ({}, {"inference_tensor_parallel": 0}, "inference_tensor_parallel is 0, expected a whole number of at least 1"),
        (
            {},
            {"format": "trtllm"},
            "a TensorRT-LLM checkpoint is made of a compressed model: use fewbit export --to trtllm",
        ),
        (3, {}, "quantization_config is 3, expected keys"),
    ],
)
def test_settings_that_cannot_be_are_one_clear_line(quantization, export, words):
    with pytest.raises(FewbitError, match=re.escape(words)):
        fewbit.Quantizer(quantization, export)


def test_exports_that_cannot_be_are_one_clear_line(model, tmp_path):
    module = llama(model)
    with pytest.raises(RecipeError, match="needs 'path'"):
        fewbit.Quantizer().export(module)
    with pytest.raises(
        UnsupportedError, match=r"Sequential is no transformers model of a family .* fewbit\.save_state"
    ):
        fewbit.Quantizer(export_config={"path": tmp_path / "o"}).export(mlp())
    with pytest.raises(UnsupportedError, match="decoder_type is 'gptnext'; this model is llama"):
        fewbit.Quantizer(export_config={"path": tmp_path / "o", "decoder_type": "gptnext"}).export(module)
    other = make_model(tmp_path / "other", intermediate_size=512)
    with pytest.raises(CheckpointError, match="describes another model than the one to export"):
        fewbit.Quantizer(export_config={"path": tmp_path / "o"}).export(module, other)
    fewbit.quantize(module, "w4a8")
    with pytest.raises(UnsupportedError, match="has no word for int4_g128"):
        fewbit.Quantizer(export_config={"path": tmp_path / "o", "format": "hf"}).export(module)
    assert not (tmp_path / "o").exists()


def test_every_built_in_recipe_means_the_layers_of_any_module_by_the_same_pattern():
    for file in (Path(fewbit.__file__).parent / "compress" / "recipes").iterdir():
        rules = yaml.safe_load(file.read_text("utf8")).get("rules", [])
        assert {rule["match"] for rule in rules} <= {"layers.*"}, file.name
    assert set(layers(net())) == {"stem", "deep", "a", "b", "head"}


def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text("utf8"), re.DOTALL))
    assert "fewbit.quantize(" in code
    exec(compile(code, str(PAGE), "exec"), {"__name__": "page"})

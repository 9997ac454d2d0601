"""The block loop: what techniques are given, what calibration finds, what is shared, what is refused in the end."""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from fewbit.checkpoint import open_checkpoint
from fewbit.compress import compress, plan, read_recipe, techniques, verify
from fewbit.compress.data import calibration_windows, data_hash
from fewbit.compress.recipe import Calibration, Recipe, Rule, Source, parse_recipe
from fewbit.compress.stats import Stats
from fewbit.errors import CheckpointError, RecipeError, UnsupportedError
from fewbit.model import DenseAttend, load
from fewbit.numerics.format import FORMATS
from fewbit.numerics.quantspec import QuantSpec
from fewbit.numerics.reference import fake_quantize, outer_scale, quantize
from fewbit.text.tokenizer import Tokenizer
from fewbit.text.windows import read_documents, windows
from helpers import dense_logits, ids, make_model

ROWS = [ids(40, seed=s) for s in range(3)] + [ids(25, seed=7)]


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def source(request, tmp_path_factory) -> Path:
    """With biases, so that they are carried."""
    return make_model(tmp_path_factory.mktemp("model"), dtype=request.param, attention_bias=True, mlp_bias=True)


@pytest.fixture
def data(tmp_path) -> Path:
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"ids": row}) for row in ROWS))
    return tmp_path / "rows.jsonl"


def carry_out(source: Path, target: Path, recipe: Recipe, export: str = "compressed-tensors"):
    checkpoint = open_checkpoint(source)
    report = compress(checkpoint, plan(checkpoint, recipe, export), target)
    return report, open_checkpoint(target)


def on(recipe: str | Recipe, data: Path, samples: int = len(ROWS)) -> Recipe:
    chosen = read_recipe(recipe) if isinstance(recipe, str) else recipe
    return replace(chosen, calibration=Calibration(samples, 512, (Source(data),)))


def inputs_of(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """By running the model over the rows: the inputs of every linear, and K and V by layer."""
    decoder = load(open_checkpoint(path))
    seen: dict[str, list[torch.Tensor]] = {}

    def watch(name: str, linear: Callable) -> Callable:
        def call(x: torch.Tensor) -> torch.Tensor:
            seen.setdefault(name, []).append(x.clone())
            return linear(x)

        return call

    class Attend(DenseAttend):
        def __call__(self, layer, q, k, v, a, sinks=None):
            seen.setdefault(f"{layer}.k", []).append(k.flatten())
            seen.setdefault(f"{layer}.v", []).append(v.flatten())
            return super().__call__(layer, q, k, v, a, sinks)

    for i, layer in enumerate(decoder.layers):
        for leaf, linear in layer.linears.items():
            layer.linears[leaf] = watch(
                f"layers.{i}.{'mlp' if leaf in ('gate', 'up', 'down') else 'attn'}.{leaf}", linear
            )
    for row in ROWS:
        decoder.hidden(torch.tensor(row), torch.arange(len(row)), Attend(decoder.codecs, len(row)))
    found = {n: torch.cat(x) for n, x in seen.items()}
    return {n: x for n, x in found.items() if n.startswith("layers")}, {
        n: x for n, x in found.items() if n[0].isdigit()
    }


# --- calibration ------------------------------------------------------------------------------------------------------


def test_static_scales_are_the_largest_magnitude_of_the_data(source, data, tmp_path):
    """Of the first layer, whose inputs no earlier layer has changed; later ones see what was rounded before them."""
    report, written = carry_out(source, tmp_path / "out", on("fp8", data).with_kv("fp8"))
    inputs, kv = inputs_of(source)
    for name in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.down"):
        scale = written.tensors[f"layers.0.{name}.input_scale"]
        assert scale.shape == ()
        assert scale.item() == pytest.approx(inputs[f"layers.0.{name}"].abs().max().item() / 448, rel=1e-5), name
    for which in "kv":
        expected = kv[f"0.{which}"].abs().max().item() / 448
        assert written.tensors[f"layers.0.attn.{which}_scale"].item() == pytest.approx(expected, rel=1e-5)
    assert written.tensors["layers.0.attn.q.input_scale"] == written.tensors["layers.0.attn.v.input_scale"]
    assert report.calibration == f"4 windows of 25 to 40 tokens of {data}"


def test_later_layers_are_calibrated_on_what_they_will_see(source, data, tmp_path):
    """Layer 1's scales come from the states that the rounded layer 0 gives."""
    _, written = carry_out(source, tmp_path / "out", on("fp8", data))
    served = load(written)
    seen = []
    q = served.layers[1].linears["q"]
    served.layers[1].linears["q"] = lambda x: (seen.append(x.abs().max()), q(x))[1]
    for row in ROWS:
        dense_logits(served, [row])
    scale = written.tensors["layers.1.attn.q.input_scale"].item()
    assert scale == pytest.approx(max(seen).item() / 448, rel=1e-5)


def test_int8_scales_of_k_and_v(source, data, tmp_path):
    _, written = carry_out(source, tmp_path / "out", on("int8_wo", data).with_kv("int8"))
    _, kv = inputs_of(source)
    assert written.tensors["layers.0.attn.k_scale"].item() == pytest.approx(
        kv["0.k"].abs().max().item() / 127.5, rel=1e-5
    )


def test_fewer_samples_see_less(source, data, tmp_path):
    scales = []
    for samples in (1, 4):
        _, written = carry_out(source, tmp_path / f"out{samples}", on("fp8", data, samples))
        scales.append(written.tensors["layers.0.mlp.down.input_scale"].item())
    assert scales[0] < scales[1]


def test_nvfp4_outer_scales_are_shared_by_who_reads_the_same_input(source, data, tmp_path):
    _, written = carry_out(source, tmp_path / "out", on("nvfp4", data))
    before = open_checkpoint(source)
    for i in range(2):
        for group in (("attn.q", "attn.k", "attn.v"), ("mlp.gate", "mlp.up"), ("attn.o",), ("mlp.down",)):
            names = [f"layers.{i}.{n}" for n in group]
            amax = torch.stack([before.tensors[f"{n}.weight"].float().abs().max() for n in names]).max()
            expected = outer_scale(amax, FORMATS["nvfp4"])
            for name in names:
                q = written.tensors[f"{name}.weight"]
                assert torch.equal(q.outer, expected), name
                assert q.equal(quantize(before.tensors[f"{name}.weight"], FORMATS["nvfp4"], outer=expected))
            assert len({written.tensors[f"{n}.input_scale"].item() for n in names}) == 1
    inputs, _ = inputs_of(source)
    found = written.tensors["layers.0.attn.o.input_scale"]
    assert found == outer_scale(inputs["layers.0.attn.o"].abs().max(), FORMATS["nvfp4"])


def test_the_report_is_right(source, tmp_path):
    report, written = carry_out(source, tmp_path / "out", read_recipe("int4"))
    before = open_checkpoint(source)
    for name, error in report.weight_error.items():
        w = before.tensors[f"{name}.weight"].float()
        assert error == pytest.approx(
            ((written.tensors[f"{name}.weight"].dequantize() - w).norm() / w.norm()).item(), rel=1e-4
        )
        assert 0.05 < error < 0.2
    assert report.output_error.keys() == {0, 1}
    assert 0 < report.output_error[0] < 0.5
    assert report.calibration == "none needed"
    assert report.verified.scales == sum(written.tensors[f"{n}.weight"].scale.numel() for n in written.quant)
    assert report.verified.bits_per_weight == pytest.approx(4 + 16 / 128)


# --- techniques -------------------------------------------------------------------------------------------------------


def with_technique(technique: object, weight: str, data: Path) -> Recipe:
    rules = (Rule("layers.*", QuantSpec(FORMATS[weight])), Rule("lm_head", QuantSpec(FORMATS[weight])))
    return Recipe(
        "own", "# own", rules, techniques=(technique,), calibration=Calibration(len(ROWS), 512, (Source(data),))
    )


@dataclass(frozen=True)
class Curious:
    """A layer technique that wants to know everything."""

    seen: dict[int, Stats] = field(default_factory=dict)
    needs: ClassVar[str] = "hessian"

    def layer(self, weight, quant, stats, outer):
        self.seen[len(self.seen)] = stats
        return quantize(weight, quant.weight, outer=outer)


def test_a_layer_technique_is_given_what_it_needs(source, data, tmp_path):
    technique = Curious()
    carry_out(source, tmp_path / "out", with_technique(technique, "int8_row", data))
    inputs, _ = inputs_of(source)
    names = [linear.name for linear in open_checkpoint(source).spec.linears()]
    assert len(technique.seen) == len(names)
    for number, name in enumerate(names[:7]):
        x, stats = inputs[name], technique.seen[number]
        assert stats.tokens == sum(map(len, ROWS)) == len(x)
        assert torch.allclose(stats.amax, x.abs().amax(0), rtol=1e-5)
        gram = x.double().T @ x.double()
        assert (stats.hessian - gram).norm() / gram.norm() < 1e-5, name
    assert technique.seen[14].hessian.shape == (128, 128)  # the head's


@dataclass(frozen=True)
class Fold:
    """A block technique: a scale of each channel goes from the linears that read a norm into the norm."""

    by: float
    needs: ClassVar[str] = "inputs"

    def block(self, block):
        scale = torch.linspace(1, self.by, len(block.norms["pre_mlp"]))
        block.norms["pre_mlp"] = block.norms["pre_mlp"] / scale
        for leaf in ("gate", "up"):
            name = f"layers.{block.index}.mlp.{leaf}"
            block.weights[name] = block.weights[name] * scale
            if name in block.quant:
                assert block.stats[name].tokens == sum(map(len, ROWS))
                assert block.stats[name].hessian is None


@pytest.mark.parametrize("left", [(), ("layers.0.mlp.up",)], ids=["all quantized", "one left as it was"])
def test_what_a_block_technique_changes_is_what_is_written(source, data, tmp_path, left):
    """Also in bfloat16, where a folded norm is rounded when it is stored; and in a linear that is not quantized."""
    recipe = with_technique(Fold(3.0), "int8_row", data)
    recipe = replace(recipe, rules=(*(Rule(name, QuantSpec()) for name in left), *recipe.rules))
    _, written = carry_out(source, tmp_path / "out", recipe)
    before = open_checkpoint(source)
    scale = torch.linspace(1, 3.0, 128)
    for i in range(2):
        norm = before.tensors[f"layers.{i}.pre_mlp.weight"].float() / scale
        assert torch.equal(written.tensors[f"layers.{i}.pre_mlp.weight"], norm.to(before.dtype))
        assert torch.equal(
            written.tensors[f"layers.{i}.pre_attn.weight"], before.tensors[f"layers.{i}.pre_attn.weight"]
        )
        changed = before.tensors[f"layers.{i}.mlp.up.weight"].float() * scale
        found = written.tensors[f"layers.{i}.mlp.up.weight"]
        if f"layers.{i}.mlp.up" in left:
            assert torch.equal(found, changed.to(before.dtype))
        else:
            assert found.equal(quantize(changed, FORMATS["int8_row"]))


def test_a_technique_is_found_by_its_file_name(monkeypatch, tmp_path, source, data):
    """The folder is the registry: a recipe's name is a module, its settings are the fields of `Settings`."""

    @dataclass(frozen=True)
    class Settings:
        shrink: float = 1.0
        needs: ClassVar[str] = "none"

        def layer(self, weight, quant, stats, outer):
            assert stats is None
            return quantize(weight * self.shrink, quant.weight, outer=outer)

    module = types.ModuleType("fewbit.compress.techniques.shrunken")
    module.Settings = Settings
    monkeypatch.setitem(sys.modules, module.__name__, module)
    listed = list(techniques.pkgutil.iter_modules(techniques.__path__))
    monkeypatch.setattr(
        techniques.pkgutil, "iter_modules", lambda path: [*listed, types.SimpleNamespace(name="shrunken")]
    )
    text = 'rules: [{match: "layers.*", weight: fp8_row}]\ntechniques: [shrunken: {shrink: 0.5}]'
    _, written = carry_out(source, tmp_path / "out", parse_recipe("own", text))
    w = open_checkpoint(source).tensors["layers.0.attn.q.weight"].float() * 0.5
    assert written.tensors["layers.0.attn.q.weight"].equal(quantize(w, FORMATS["fp8_row"]))
    with pytest.raises(RecipeError, match=r"shrunken: unknown setting 'shrnk'; did you mean 'shrink'\?"):
        parse_recipe("own", text.replace("shrink:", "shrnk:"))


def test_only_one_technique_may_round(source):
    recipe = parse_recipe(
        "two", "rules: [{match: '*', weight: fp8}]\ntechniques: [round_to_nearest: {}, scale_search: {}]"
    )
    with pytest.raises(RecipeError, match="a recipe can hold one technique that rounds weights, not several"):
        plan(open_checkpoint(source), recipe)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_code_that_was_written_wrong_is_found(source, tmp_path, monkeypatch):
    """One flipped bit in the finished files: nothing is kept."""
    from fewbit.compress import run

    def spoil(written, windows, logits, device, progress):
        file = next(p for p in written.path.iterdir() if p.name == "model.safetensors")
        raw = bytearray(file.read_bytes())
        entry = written.tensors  # the up projection's codes lie in the middle of the file
        assert "layers.1.mlp.up.weight" in entry
        at = open_entry(written, "model.layers.1.mlp.up_proj.weight_packed").start + 1000
        raw[at] ^= 0x40
        file.write_bytes(raw)
        return verify(written, windows, logits, device, progress)

    monkeypatch.setattr(run, "verify", spoil)
    with pytest.raises(
        CheckpointError, match=r"the written files do not give back the model: logits of \d+ of 128 held-out"
    ):
        carry_out(source, tmp_path / "out", read_recipe("int8_wo"))
    assert list(tmp_path.iterdir()) == []


def open_entry(checkpoint, source: str):
    from fewbit.checkpoint.files import ModelFiles

    return ModelFiles(checkpoint.path).places[source]


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["layers.1.attn.o.weight", "layers.0.mlp.up.input_scale", "layers.1.attn.k_scale"])
def test_a_scale_that_is_zero_or_not_finite_is_found(source, data, tmp_path, monkeypatch, bad, name):
    from fewbit.compress import run

    def spoil(written, windows, logits, device, progress):
        load = written.tensors._load[name]

        def worse(device):
            tensor = load(device)
            if isinstance(tensor, torch.Tensor):
                return torch.full_like(tensor, bad)
            return replace(tensor, scale=torch.full_like(tensor.scale, bad))

        written.tensors._load[name] = worse
        return verify(written, windows, logits, device, progress)

    monkeypatch.setattr(run, "verify", spoil)
    with pytest.raises(
        CheckpointError, match=rf"{name}.* is (zero or not finite in the written files|\S+; expected a positive)"
    ):
        carry_out(source, tmp_path / "out", on("fp8", data).with_kv("int8"))
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_quantized_already(source, tmp_path):
    carry_out(source, tmp_path / "out", read_recipe("int8_wo"))
    with pytest.raises(UnsupportedError, match=r"is already quantized \(compressed-tensors\); start from the original"):
        plan(open_checkpoint(tmp_path / "out"), read_recipe("int4"))


@pytest.mark.parametrize(
    ("calibration", "words"),
    [
        (
            Calibration(9, 512, (Source(Path("rows.jsonl")),)),
            "rows.jsonl holds 4 windows of 512 tokens, asked for 9; give more text, or",
        ),
        (Calibration(10**6, 200), "the shipped text holds "),
        (Calibration(1, 512), "windows of 512 tokens exceed the model's 256; see --length"),
        (Calibration(1, 8, (Source(Path("gone.txt")),)), "gone.txt: no such file"),
    ],
)
def test_data_that_will_not_do(source, data, tmp_path, monkeypatch, calibration, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as e:
        carry_out(source, tmp_path / "out", replace(read_recipe("fp8"), calibration=calibration))
    assert words in str(e.value)
    assert not (tmp_path / "out").exists()


def test_text_is_cut_as_it_is_for_eval(source, tmp_path):
    """Windows, never documents: a book is many, a short row is part of one."""
    file = tmp_path / "two.jsonl.gz"
    with gzip.open(file, "wt") as out:
        out.write(json.dumps({"text": "A fox. " * 100}) + "\n" + json.dumps({"text": "Rain came down. " * 50}) + "\n")
    tokenizer = Tokenizer.load(source)
    found = calibration_windows(Calibration(9, 32, (Source(file),)), tokenizer)
    assert found == windows(read_documents(file), tokenizer, 32, 9)
    assert [len(w) for w in found] == [32] * 9
    assert found[0][0] == 1


def rows_of(folder: Path, name: str, count: int, first: int) -> Path:
    """A file whose every row begins with a token that tells which row it is."""
    path = folder / name
    path.write_text("\n".join(json.dumps({"ids": [first + i, *ids(9, seed=i)]}) for i in range(count)))
    return path


def test_several_files_share_the_windows(source, tmp_path):
    tokenizer = Tokenizer.load(source)
    a, b = rows_of(tmp_path, "a.jsonl", 20, 100), rows_of(tmp_path, "b.jsonl", 20, 200)
    mixed = Calibration(10, 10, (Source(a, 0.7), Source(b, 0.3)))
    found = [w[0] for w in calibration_windows(mixed, tokenizer)]
    assert found == [*range(100, 107), *range(200, 203)]
    assert [sum(Calibration(n, 8, mixed.data).counts()) for n in range(2, 30)] == list(range(2, 30))
    assert Calibration(3, 8, (Source(a), Source(b), Source(a))).counts() == [1, 1, 1]
    drawn = [w[0] for w in calibration_windows(replace(mixed, seed=5), tokenizer)]
    assert drawn != found
    assert (sum(w < 200 for w in drawn), sum(w >= 200 for w in drawn), len(set(drawn))) == (7, 3, 10)
    assert drawn == [w[0] for w in calibration_windows(replace(mixed, seed=5), tokenizer)]
    assert drawn != [w[0] for w in calibration_windows(replace(mixed, seed=6), tokenizer)]
    with pytest.raises(RecipeError, match=r"the share of .*b\.jsonl is no window of 4; raise it, or --samples"):
        calibration_windows(Calibration(4, 8, (Source(a, 0.99), Source(b, 0.01))), tokenizer)
    recipe = replace(read_recipe("fp8"), calibration=mixed)
    report, _ = carry_out(source, tmp_path / "out", recipe)
    assert report.calibration == f"10 windows of 10 tokens of {a} (7), {b} (3)"
    assert data_hash(mixed) == hashlib.sha256(a.read_bytes() + b.read_bytes()).hexdigest()


def test_what_is_calibrated_is_what_is_served(source, data, tmp_path):
    """The static scale that was found is the one that rounds inputs: by hand for one linear."""
    _, written = carry_out(source, tmp_path / "out", on("fp8", data))
    linear = load(written).layers[0].linears["down"]
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(1)) * 3
    scale = written.tensors["layers.0.mlp.down.input_scale"].reshape(1, 1)
    rounded = fake_quantize(x, FORMATS["fp8"], scale=scale)
    assert torch.equal(rounded, (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale)
    expected = rounded @ written.tensors["layers.0.mlp.down.weight"].dequantize().T
    bias = written.tensors["layers.0.mlp.down.bias"].float()
    assert torch.allclose(linear(x), expected + bias, rtol=1e-5, atol=1e-4)

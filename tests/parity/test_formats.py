"""Every recipe through every export: read back code for code, by us, by a stranger's decoder, by the library."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file

from fewbit.checkpoint import format_named, open_checkpoint
from fewbit.checkpoint.layout import Quantization
from fewbit.checkpoint.names import Names
from fewbit.compress import built_in, compress, plan, read_recipe
from fewbit.compress.recipe import parse_recipe
from fewbit.errors import UnsupportedError
from fewbit.model import Loader, load
from fewbit.numerics.format import FORMATS
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.quantspec import QuantSpec
from helpers import dense_logits, ids, make_model, same_tensors
from independent_decoder import decode

EXPORTS = ("compressed-tensors", "hf")
HF_CANNOT = ("int4_awq_asym", "int8", "int8_sq", "w4a8", "w4a8_awq")
ONLY_HF = (".prescale", ".wide_scale")
RULED = [name for name in built_in() if not (r := read_recipe(name)).auto and not r.splitting]
"""Recipes whose numerics need no measuring first, and no branch, which only fewbit reads."""
HF_SAYS = [name for name in RULED if name not in HF_CANNOT]
KV = (None, "fp8", "int8")
MATRIX = [
    (recipe, export, kv)
    for recipe in RULED
    for export in EXPORTS
    for kv in KV
    if export != "hf" or (recipe in HF_SAYS and kv != "int8")
]
QUICK = {*random.Random(0).sample(MATRIX, 5), ("int4", "hf", "fp8"), ("nvfp4", "compressed-tensors", None)}
CELLS = [
    pytest.param(*cell, id=" ".join(map(str, cell)), marks=[] if cell in QUICK else [pytest.mark.slow])
    for cell in MATRIX
]
HEAD = """
rules:
  - {match: lm_head, weight: %s}
  - {match: "layers.0.*", weight: none}
  - {match: "layers.*", weight: %s}
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Biases, so that a quantized linear has a companion; a tied head, which is the commonest trap."""
    return make_model(
        tmp_path_factory.mktemp("source"), attention_bias=True, mlp_bias=True, tie_word_embeddings=True, vocab_size=384
    )


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    """`made(recipe, export, kv)` gives the compressed directory, each made once."""
    done: dict[tuple, Path] = {}

    def make(recipe: str, export: str, kv: str | None) -> Path:
        if (recipe, export, kv) not in done:
            checkpoint = open_checkpoint(source)
            chosen = parse_recipe("own", recipe) if "\n" in recipe else read_recipe(recipe)
            chosen = small(chosen.with_kv(kv))
            target = tmp_path_factory.mktemp("made") / "model"
            report = compress(checkpoint, plan(checkpoint, chosen, export), target)
            assert report.verified is not None
            done[recipe, export, kv] = target
        return done[recipe, export, kv]

    return make


def small(recipe):
    return replace(recipe, calibration=replace(recipe.calibration, samples=3, length=48))


def weights(path: Path) -> dict[str, torch.Tensor]:
    """Every weight as we read it, dequantized, under its Hugging Face name."""
    checkpoint = open_checkpoint(path)
    names = Names(checkpoint.family, checkpoint.spec)
    found = {}
    for name, tensor in checkpoint.tensors.items():
        if not name.endswith(("_scale", *ONLY_HF)):
            found[names.tensor(name)] = tensor.dequantize() if isinstance(tensor, QTensor) else tensor.float()
    return found


@pytest.mark.parametrize(("recipe", "export", "kv"), CELLS)
def test_reads_back_alike(recipe, export, kv, made, source):
    path = made(recipe, export, kv)
    written, before = open_checkpoint(path), open_checkpoint(source)
    assert written.format == export
    assert bool(written.kv) == (kv is not None)
    assert (written.spec, written.dtype) == (before.spec, before.dtype)
    assert set(written.quant) == {n.name for n in before.spec.linears()} - {"lm_head"}
    _by_a_stranger(path)
    if export == "hf":
        _prescales(path, recipe)
        _configs_agree(path, written, kv)
    else:
        _by_the_library(path)
    other = EXPORTS[export == EXPORTS[0]]
    if (recipe, other, kv) in MATRIX:
        theirs = open_checkpoint(made(recipe, other, kv))
        plain = {k: v.weight for k, v in written.quant.items()}
        assert plain == {k: v.weight for k, v in theirs.quant.items()}
        shared = [n for n in written.tensors if not n.endswith(ONLY_HF)]
        assert set(shared) == {n for n in theirs.tensors if not n.endswith(ONLY_HF)}
        for name in shared:
            mine, its = written.tensors[name], theirs.tensors[name]
            assert mine.equal(its) if isinstance(mine, QTensor) else torch.equal(mine, its), name
        window = [ids(30)]
        assert torch.equal(dense_logits(load(written), window), dense_logits(load(theirs), window))


def _by_a_stranger(path: Path) -> None:
    ours, theirs = weights(path), decode(path)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name


def _prescales(path: Path, recipe: str) -> None:
    """TensorRT-LLM's INT4 loader wants a vector on o_proj and down_proj, and nowhere else."""
    tensors = load_file(path / "model.safetensors")
    found = {n: t for n, t in tensors.items() if n.endswith("pre_quant_scale")}
    if not recipe.startswith(("int4", "w4a8")):
        assert not found
        return
    assert sorted(found) == sorted(
        f"model.layers.{i}.{m}.pre_quant_scale" for i in range(2) for m in ("self_attn.o_proj", "mlp.down_proj")
    )
    for name, t in found.items():
        assert (t == 1).all()
        assert t.dtype == torch.bfloat16
        assert t.shape == (256 if "down" in name else 128,)


def _configs_agree(path: Path, written, kv: str | None) -> None:
    """hf_quant_config.json and config.json say the same, and either of them alone is enough."""
    nested = json.loads((path / "hf_quant_config.json").read_text())["quantization"]
    config = json.loads((path / "config.json").read_text())
    flat = config["quantization_config"]
    assert flat["quant_method"] == "modelopt"
    assert flat["quant_algo"] == nested["quant_algo"]
    assert flat["ignore"] == nested["exclude_modules"] == ["lm_head"]
    assert nested["kv_cache_quant_algo"] == ("FP8" if kv else None)
    assert flat.get("kv_cache_scheme") == ({"dynamic": False, "num_bits": 8, "type": "float"} if kv else None)
    if "group_size" in nested and "config_groups" in flat:
        assert flat["config_groups"]["group_0"]["weights"]["group_size"] == nested["group_size"]
    for loser in ("hf_quant_config.json", "config.json"):
        file = path / loser
        kept = file.read_text()
        try:
            if loser == "config.json":
                file.write_text(json.dumps({k: v for k, v in config.items() if k != "quantization_config"}))
            else:
                file.unlink()
            alone = open_checkpoint(path)
            # which dtype an INT4 scale really has, and whether mxfp4 covers inputs, is said in config.json alone
            told = "scale_dtype" not in json.dumps(flat) and nested["quant_algo"] != "mxfp4"
            if told or loser != "config.json":
                assert (alone.quant, alone.kv) == (written.quant, written.kv)
        finally:
            file.write_text(kept)


def _by_the_library(path: Path) -> None:
    """compressed-tensors parses the config and decompresses every weight to ours."""
    raw = json.loads((path / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate({k: v for k, v in raw.items() if k in QuantizationConfig.model_fields})
    (scheme,) = config.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(scheme.format or raw["format"])
    tensors, ours = load_file(path / "model.safetensors"), weights(path)
    for name in open_checkpoint(path).quant:
        module = Names(open_checkpoint(path).family, open_checkpoint(path).spec).module(name)
        parts = {n.rpartition(".")[2]: t for n, t in tensors.items() if n.rpartition(".")[0] == module}
        if name.endswith(".q"):
            assert "bias" in parts
        parts = {n: t for n, t in parts.items() if n.startswith("weight")}
        found = compressor.decompress(parts, scheme)["weight"]
        # the library multiplies the 4-bit floats in bfloat16
        near = 2**-7 if found.dtype == torch.bfloat16 else 1e-6
        assert torch.allclose(found.float(), ours[f"{module}.weight"], rtol=near, atol=1e-9), name


@pytest.mark.parametrize("recipe", HF_CANNOT)
def test_what_hf_cannot_say_is_refused_before_any_weight_is_read(recipe, source):
    checkpoint = open_checkpoint(source)
    with pytest.raises(UnsupportedError, match=r"has no word for .*use --export compressed-tensors, which can") as e:
        plan(checkpoint, read_recipe(recipe), "hf")
    assert str(e.value).startswith("layers.0.attn.q: ")


def test_int8_k_and_v_are_refused_by_hf(source):
    checkpoint = open_checkpoint(source)
    with pytest.raises(UnsupportedError, match="K and V in int8; use --export compressed-tensors, which can"):
        plan(checkpoint, read_recipe("fp8").with_kv("int8"), "hf")


@pytest.mark.parametrize("export", EXPORTS)
def test_a_head_of_its_own_and_layers_left_alone(export, made, source):
    """A quantized head of a tied model is untied; the other format of the same model says the same."""
    path = made(HEAD % ("int4_g64", "int4_g64"), export, None)
    written = open_checkpoint(path)
    assert not written.spec.tied
    assert json.loads((path / "config.json").read_text())["tie_word_embeddings"] is False
    assert sorted(written.quant) == sorted(
        ["lm_head", *(x.name for x in written.spec.layer_linears(1))],
    )
    _by_a_stranger(path)
    embed = open_checkpoint(source).tensors["embed.weight"]
    assert torch.equal(written.tensors["embed.weight"], embed)
    head = written.tensors["lm_head.weight"].dequantize()
    assert 0 < (head - embed.float()).norm() / embed.float().norm() < 0.15
    window = [ids(20)]
    other = open_checkpoint(made(HEAD % ("int4_g64", "int4_g64"), EXPORTS[export == EXPORTS[0]], None))
    assert torch.equal(dense_logits(load(written), window), dense_logits(load(other), window))


MIXED = """
rules:
  - {match: "layers.*.mlp.down", weight: fp8_block}
  - {match: "layers.0.attn.*", weight: int8_row, input: int8, input_scale: static}
  - {match: "layers.1.attn.[qkv]", weight: int4_g32_asym}
  - {match: "layers.1.attn.o", weight: int8_g64}
  - {match: "layers.*.mlp.gate", weight: mxfp8, input: mxfp8}
  - {match: "layers.*.mlp.up", weight: int8_g32, input: int8_row}
kv: {format: int8}
"""


def test_a_mixture_in_one_file(made):
    """Every layout of the default export at once; the formats that no built-in recipe uses are among them."""
    path = made(MIXED, "compressed-tensors", None)
    written = open_checkpoint(path)
    assert {str(q.weight) for q in written.quant.values()} == {
        "fp8_block",
        "int8_row",
        "int4_g32_asym",
        "int8_g64",
        "mxfp8",
        "int8_g32",
    }
    assert {str(kv) for kv in written.kv.values()} == {"int8"}
    raw = json.loads((path / "config.json").read_text())["quantization_config"]
    assert raw["format"] == "mixed-precision"
    QuantizationConfig.model_validate({k: v for k, v in raw.items() if k in QuantizationConfig.model_fields})
    _by_a_stranger(path)


MIXED_HF = """
rules:
  - {match: "layers.0.attn.[qkv]", weight: nvfp4, input: nvfp4, input_scale: outer}
  - {match: "layers.*.attn.[qkv]", weight: int4_g32}
  - {match: "layers.0.attn.o", weight: fp8_block}
  - {match: "layers.0.mlp.down", weight: mxfp4}
  - {match: "layers.1.mlp.down", weight: mxfp8, input: mxfp8}
  - {match: "layers.0.mlp.*", weight: int4_g64, input: fp8, input_scale: static}
  - {match: "layers.1.mlp.*", weight: int8_row, input: int8, input_scale: static}
kv: {format: fp8}
"""


def test_a_mixture_in_hf_names_every_layer_in_both_files(made, source):
    path = made(MIXED_HF, "hf", None)
    written = open_checkpoint(path)
    _by_a_stranger(path)
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    nested = json.loads((path / "hf_quant_config.json").read_text())["quantization"]
    assert config["quant_algo"] == nested["quant_algo"] == "MIXED_PRECISION"
    assert config["quantized_layers"] == nested["quantized_layers"]
    names = Names(written.family, written.spec)
    assert nested["quantized_layers"].keys() == {names.module(name) for name in written.quant}
    # engines take what no list names for quantized, and what a list drops for lost: Model Optimizer writes no excludes
    assert config["ignore"] == nested["exclude_modules"] == ["model.layers.1.self_attn.o_proj", "lm_head"]
    targets = [t for group in config["config_groups"].values() for t in group["targets"]]
    assert sorted(targets) == sorted(nested["quantized_layers"])
    asked = parse_recipe("mixed", MIXED_HF).resolve(open_checkpoint(source).spec)
    for name, quant in asked.items():
        found = written.quant[name]
        assert (found.weight, found.input, found.input_scale) == (quant.weight, quant.input, quant.input_scale), name
    for layer, group in ((0, ("gate", "up")),):
        scales = [written.tensors[f"layers.{layer}.mlp.{name}.wide_scale"] for name in group]
        assert torch.equal(*scales)
        amax = max(written.tensors[f"layers.{layer}.mlp.{name}.weight"].dequantize().abs().max() for name in group)
        assert torch.equal(scales[0], amax / 448)


@pytest.mark.parametrize(
    ("rules", "sentence"),
    [
        ('{match: "layers.*.attn.q", weight: int8_row}, {match: "layers.*.attn.[kv]", weight: int4_g64}', "attn.k"),
        ('{match: "layers.*.mlp.gate", weight: int8_row}', r"mlp.up \(not quantized\)"),
    ],
)
def test_what_engines_join_has_one_format_in_hf(rules, sentence, source):
    checkpoint = open_checkpoint(source)
    with pytest.raises(UnsupportedError, match=sentence + ".* reads the input of .* engines .* join them") as e:
        plan(checkpoint, parse_recipe("two", f"rules: [{rules}]"), "hf")
    assert str(e.value).startswith("layers.0.")


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        ("qwen3_moe", "w4a8_awq_static"),
        pytest.param("mixtral", "w4a8_awq_static", marks=pytest.mark.slow),
        pytest.param("mixtral", "nvfp4", marks=pytest.mark.slow),
        pytest.param("qwen3_moe", "int8_sq_static", marks=pytest.mark.slow),
        pytest.param("qwen3_moe", "mxfp4", marks=pytest.mark.slow),
    ],
)
def test_experts_in_hf(family, recipe, tmp_path):
    """Each expert under its own name, gate and up under one range; the router left alone, and said so."""
    source = open_checkpoint(make_model(tmp_path / "source", family))
    path = tmp_path / "model"
    compress(source, plan(source, small(read_recipe(recipe)), "hf"), path)
    written = open_checkpoint(path)
    _by_a_stranger(path)
    nested = json.loads((path / "hf_quant_config.json").read_text())["quantization"]
    names = Names(written.family, written.spec)
    assert {names.module(router) for router in written.spec.routers()} <= set(nested["exclude_modules"])
    tensors = load_file(path / "model.safetensors")
    for expert in range(written.spec.layers[0].mlp.experts if recipe.startswith("w4a8") else 0):
        gate, up = (names.module(f"layers.0.mlp.experts.{expert}.{leaf}") for leaf in ("gate", "up"))
        assert torch.equal(tensors[f"{gate}.weight_scale_2"], tensors[f"{up}.weight_scale_2"])
        assert torch.equal(tensors[f"{gate}.input_scale"], tensors[f"{up}.input_scale"])


@pytest.mark.parametrize("export", EXPORTS)
@pytest.mark.parametrize("fmt", ["fp8_e5m2", "fp8_e5m2_row"])
def test_e5m2_has_no_word_in_either(export, fmt, source):
    checkpoint = open_checkpoint(source)
    with pytest.raises(UnsupportedError, match=r"layers.0.attn.q: .* has no word for"):
        plan(checkpoint, parse_recipe("e5m2", f'rules: [{{match: "layers.*", weight: {fmt}}}]'), export)


def test_k_and_v_alone(made, source):
    """A recipe with no rules: the weights stay as they are, the cache gets its scales."""
    for export in EXPORTS:
        written = open_checkpoint(made("rules: []\nkv: {format: fp8}\n", export, None))
        assert (written.format, dict(written.quant)) == (export, {})
        assert {str(kv) for kv in written.kv.values()} == {"fp8"}
        before = open_checkpoint(source)
        for name, tensor in before.tensors.items():
            assert torch.equal(written.tensors[name], tensor), name
    both = [open_checkpoint(made("rules: []\nkv: {format: fp8}\n", export, None)) for export in EXPORTS]
    same_tensors(*both)


LIBRARY_CELLS = [pytest.param(r, marks=[] if r == "int4" else [pytest.mark.slow]) for r in RULED]


@pytest.mark.parametrize("recipe", LIBRARY_CELLS)
def test_transformers_loads_the_default_export_and_computes_the_same(recipe, made):
    """Each linear, given the same input, gives the same output there; whole models where no 4-bit rounding is chaos."""
    path = made(recipe, "compressed-tensors", None)
    four = "fp4" in recipe  # the library reads 4-bit floats, and rounds to them, in bfloat16
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16 if four else torch.float32)
    windows = [ids(24, seed=s) for s in range(2)]
    seen = {}
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_hook(lambda m, x, y, name=name: seen.update({name: (x[0], y)}))
    with torch.no_grad():
        theirs = model(torch.tensor(windows)).logits.flatten(0, 1).float()
    checkpoint = open_checkpoint(path)
    loader, names = Loader(checkpoint, torch.device("cpu")), Names(checkpoint.family, checkpoint.spec)
    for shape in checkpoint.spec.linears():
        if shape.name != "lm_head":
            x, y = seen[names.module(shape.name)]
            ours = loader.linear(shape)(x.float().flatten(0, 1))
            off = (ours - y.float().flatten(0, 1)).norm() / ours.norm()
            assert off < (2e-2 if four else 1e-4), (shape.name, off)
    if not four:
        found = load(checkpoint)
        found.codecs = tuple(replace(c, dtype=torch.float32) for c in found.codecs)
        ours = dense_logits(found, windows)
        assert (ours - theirs).norm() / theirs.norm() < 1e-2


def test_the_formats_answer_for_a_quantization_they_cannot_say(source):
    """`why_not` is asked before work starts: an input format without a weight is nobody's."""
    spec = open_checkpoint(source).spec
    odd = Quantization({"layers.0.attn.q": QuantSpec(None, FORMATS["fp8"], "static")}, {})
    assert "an input is quantized but not its weight" in format_named("compressed-tensors").why_not(spec, odd)
    assert "has no word for" in format_named("hf").why_not(spec, odd)

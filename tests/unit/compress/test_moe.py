"""Mixtures of experts: every recipe, folding around a router, and experts that see little."""

from __future__ import annotations

import functools
import json

import pytest
import torch
import torch.nn.functional as F
import transformers

import fewbit
from fewbit.checkpoint import open_checkpoint
from fewbit.compress import compress, plan, read_recipe
from fewbit.compress.calibrate import FLOOR, observe
from fewbit.compress.fold import fold, input_groups
from fewbit.compress.recipe import parse_recipe
from fewbit.compress.stats import Block
from fewbit.compress.stream import Stream
from fewbit.compress.techniques import technique_named
from fewbit.engine.config import EngineOptions
from fewbit.engine.engine import generate, open_engine
from fewbit.engine.types import GenerateRequest, SamplingParams
from fewbit.errors import UnsupportedError
from fewbit.measure.quality import evaluate
from fewbit.model import DecoderLayer, DenseAttend, KVCodec, Loader
from fewbit.model.decoder import normalize
from fewbit.numerics.format import FORMATS
from fewbit.numerics.quantspec import QuantSpec
from fewbit.spec.decoder import MoE, leaf_of
from fewbit.spec.families import families
from helpers import dense_logits, ids, make_model

CPU = torch.device("cpu")
FAMILIES = ("mixtral", "qwen3_moe")
RECIPES = ("int8_wo", "int4", "fp8", "int8_sq", "int4_awq", "int4_gptq", "nvfp4_awq")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A float32 model of each family, every second layer of qwen3_moe plain."""
    more = {"mixtral": {}, "qwen3_moe": {"mlp_only_layers": [1]}}
    root = tmp_path_factory.mktemp("moe")
    return {f: make_model(root / f, f, torch.float32, **more[f]) for f in FAMILIES}


def carry_out(path, target, recipe, windows=8, length=64):
    data = path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"ids": ids(length, 256, seed)}) for seed in range(windows)))
    checkpoint = open_checkpoint(path)
    text = f"{recipe}\ncalib: {{samples: {windows}, length: {length}, data: {data}}}"
    chosen = parse_recipe("own", text)
    return compress(checkpoint, plan(checkpoint, chosen), target), open_checkpoint(target)


def built_in(name):
    text = read_recipe(name).text.replace("int4_g128", "int4_g64")
    return "\n".join(line for line in text.splitlines() if not line.startswith("calib"))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_recipe_makes_a_model_that_is_checked(models, tmp_path, family, recipe):
    report, written = carry_out(models[family], tmp_path / "out", built_in(recipe))
    assert report.verified is not None
    checkpoint = open_checkpoint(models[family])
    assert written.quant.keys() == {x.name for x in checkpoint.spec.linears()} - {"lm_head"}
    router = checkpoint.spec.routers()[0]
    ignored = written.config["quantization_config"]["ignore"]
    assert ("model.layers.0.block_sparse_moe.gate" if family == "mixtral" else "model.layers.0.mlp.gate") in ignored
    if recipe in ("int8_wo", "int4", "fp8"):
        assert torch.equal(written.tensors.dense(f"{router}.weight"), checkpoint.tensors.dense(f"{router}.weight"))
    found = evaluate(written, checkpoint, [ids(48, 256, 99)], CPU)
    assert found.kl_mean.value < (0.5 if "4" in recipe else 0.05)


def test_experts_are_counted_and_those_that_see_little_are_named(models, tmp_path):
    path = models["qwen3_moe"]
    report, _ = carry_out(path, tmp_path / "much", built_in("int4_awq"))
    mixture = open_checkpoint(path).spec.layers[0].mlp
    assert isinstance(mixture, MoE)
    assert len(report.experts) == mixture.experts  # of the one layer that has some
    assert sum(report.experts.values()) == 8 * 64 * mixture.top_k
    assert not report.scarce
    report, _ = carry_out(path, tmp_path / "little", built_in("int4_awq"), windows=1, length=40)
    assert report.scarce == sorted(name for name, tokens in report.experts.items() if tokens < FLOOR)
    assert report.scarce
    report, written = carry_out(path, tmp_path / "static", built_in("fp8"), windows=1, length=8)
    scales = [written.tensors.dense(f"{name}.down.input_scale").item() for name in report.scarce]
    reached = max(scales)  # the largest is that of an expert which saw something
    assert all(0 < scale <= reached for scale in scales)


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_into_the_norm_changes_nothing_and_no_token_changes_its_experts(models, family):
    checkpoint = open_checkpoint(models[family])
    spec, loader = checkpoint.spec, Loader(checkpoint, CPU, "dense")
    layer = loader.layer(0)
    windows = Stream([ids(64, 256, seed) for seed in range(4)], loader.embed(), loader.dtype)
    shapes = spec.layer_linears(0)
    weights = {shape.name: loader.weights(shape).weight for shape in shapes}
    quant = dict.fromkeys(weights, QuantSpec(FORMATS["int8_row"]))
    block = Block(0, spec.layers[0], quant, dict(weights), dict(layer.norms))
    observe(block, shapes, layer, windows, [KVCodec(torch.float32)], {"hessian"})
    generator = torch.Generator().manual_seed(0)
    for group in input_groups(block):
        width = weights[group.consumers[0]].shape[1]
        fold(block, group, group.tie(torch.rand(width, generator=generator) * 3 + 0.3))
    linears = {leaf_of(name): functools.partial(F.linear, weight=w) for name, w in block.weights.items()}
    folded = DecoderLayer(0, spec.layers[0], linears, block.norms)
    for x in windows.pieces():
        before, after = (normalize(x, layer.layer.pre_mlp, y.norms["pre_mlp"]) for y in (layer, folded))
        torch.testing.assert_close(folded.mlp(after), layer.mlp(before), rtol=1e-4, atol=1e-4)
        scores = (F.linear(z, y.norms["router"]) for z, y in ((after, folded), (before, layer)))
        torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_module_whose_experts_are_one_tensor_is_refused(family):
    config = transformers.AutoConfig.for_model(**families()[family].TINY)
    module = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedError, match="holds all experts of a layer in one tensor"):
        fewbit.quantize(module, "int8_wo")


@pytest.mark.parametrize("family", FAMILIES)
def test_rotated_it_is_the_same_model(models, family):
    checkpoint = open_checkpoint(models[family])
    turned = technique_named("rotation", {}).model(checkpoint)
    windows = [ids(30, 256, 3)]
    ours, theirs = (dense_logits(Loader(c, CPU).decoder(), windows) for c in (turned, checkpoint))
    assert (ours - theirs).abs().max() < 1e-3 * theirs.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_the_same_alone_and_in_a_batch(models, family):
    params = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True)
    prompts = [ids(n, 256, n) for n in (5, 17, 9)]
    requests = [GenerateRequest(id=str(i), prompt=tuple(p), params=params) for i, p in enumerate(prompts)]
    together = generate(open_engine(models[family], EngineOptions(num_blocks=32, max_batch=3)), requests)
    for request, output in zip(requests, together, strict=True):
        (alone,) = generate(open_engine(models[family], EngineOptions(num_blocks=32, max_batch=1)), [request])
        assert output.tokens == alone.tokens
    decoder = Loader(open_checkpoint(models[family]), CPU).decoder()
    tokens = list(prompts[0])
    for token in together[0].tokens:
        attend = DenseAttend(decoder.codecs, len(tokens))
        hidden = decoder.hidden(torch.tensor(tokens), torch.arange(len(tokens)), attend)
        assert int(decoder.logits(hidden[-1:]).argmax()) == token
        tokens.append(token)

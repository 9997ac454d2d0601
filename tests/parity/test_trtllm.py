"""TensorRT-LLM checkpoints: as Model Optimizer writes them, by a reader of its own, split, merged, and served."""

from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fewbit.checkpoint import Parallel, Target, export, open_checkpoint, plan_export
from fewbit.cli import run
from fewbit.compress import compress, plan, read_recipe
from fewbit.compress.recipe import parse_recipe
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.model import load
from fewbit.numerics.format import FORMATS
from fewbit.numerics.qtensor import QTensor
from helpers import dense_logits, edit_json, ids, make_model, same_tensors

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "trtllm"
PYTHON = ROOT / ".venv-peers" / "bin" / "python"
THEIRS = sorted(p.name for p in GOLDEN.iterdir() if p.is_dir())
CLOSE = {"fp8": 0.03, "int8": 0.02, "int4": 0.13, "w4a8": 0.13, "nvfp4": 0.11, "bf16": 0.0}
"""Relative error of rounded weights, by format: what round-to-nearest of normal numbers gives and a little more."""


def layout(tp: int = 1, pp: int = 1, nim: bool = False) -> Target:
    return Target(Parallel(tp, pp), nim)


def same_file(mine: Path, theirs: Path) -> None:
    ours, other = load_file(mine), load_file(theirs)
    assert ours.keys() == other.keys()
    for name, tensor in ours.items():
        assert (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape), name
        bits, their_bits = (t.contiguous().reshape(-1).view(torch.uint8) for t in (tensor, other[name]))
        assert torch.equal(bits, their_bits), name


# --- Model Optimizer's own --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", THEIRS)
def test_ours_is_theirs_byte_for_byte(name, tmp_path):
    """Read and written again: the same files, keys, dtypes, shapes and values, and the same config.json."""
    config = json.loads((GOLDEN / name / "config.json").read_text())
    mapping = config["mapping"]
    checkpoint = open_checkpoint(GOLDEN / name)
    done = export(checkpoint, "trtllm", tmp_path / "out", layout=layout(mapping["tp_size"], mapping["pp_size"]))
    assert done.equal == done.tensors
    for rank in range(mapping["world_size"]):
        same_file(tmp_path / "out" / f"rank{rank}.safetensors", GOLDEN / name / f"rank{rank}.safetensors")
    ours = json.loads((tmp_path / "out" / "config.json").read_text())
    assert ours.pop("rotary_base") == 10000.0  # which Model Optimizer leaves out
    assert ours.pop("fewbit")["hf_config"]["architectures"] == ["LlamaForCausalLM"]
    assert ours.pop("producer")["name"] == "fewbit"
    assert config.pop("producer") == {"name": "modelopt", "version": "0.47.0"}
    assert ours == config


@pytest.mark.parametrize("name", THEIRS)
def test_theirs_is_the_model_it_was_made_of(name):
    """q, k, v and gate, up are what they were: the model is made again by its seed."""
    torch.manual_seed(0)
    checkpoint = open_checkpoint(GOLDEN / name)
    spec = checkpoint.spec
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=spec.hidden,
            intermediate_size=spec.hidden,
            num_hidden_layers=len(spec.layers),
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=spec.hidden // 4,
            tie_word_embeddings=False,
        )
    )
    weights = model.to(torch.bfloat16).state_dict()
    table = {"attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj", "attn.v": "self_attn.v_proj",
             "attn.o": "self_attn.o_proj", "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj",
             "mlp.down": "mlp.down_proj"}  # fmt: skip
    for layer in range(len(spec.layers)):
        for ours, theirs in table.items():
            was = weights[f"model.layers.{layer}.{theirs}.weight"].double()
            found = checkpoint.tensors[f"layers.{layer}.{ours}.weight"]
            value = found.dequantize().double() if isinstance(found, QTensor) else found.double()
            if f"layers.{layer}.{ours}.prescale" in checkpoint.tensors:
                value = value * checkpoint.tensors[f"layers.{layer}.{ours}.prescale"].double()
            assert (value - was).norm() / was.norm() <= CLOSE[name.split("_")[0]], ours
    assert torch.equal(checkpoint.tensors["embed.weight"], weights["model.embed_tokens.weight"])
    assert torch.equal(checkpoint.tensors["lm_head.weight"], weights["lm_head.weight"])


def test_a_base_that_is_left_out_is_told_of(caplog):
    open_checkpoint(GOLDEN / "fp8")
    assert "names no rotary_base: 10000 is taken" in caplog.text


@pytest.mark.slow
def test_the_golden_files_are_what_the_peer_makes(tmp_path):
    if not PYTHON.exists():
        pytest.skip(f"NO PEERS: {PYTHON} is not there; benchmarks/peers.txt says how to make it")
    done = subprocess.run([PYTHON, GOLDEN / "make.py", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in THEIRS:
        for file in (GOLDEN / name).glob("rank*.safetensors"):
            same_file(tmp_path / name / file.name, file)
        mine, theirs = (json.loads((p / name / "config.json").read_text()) for p in (GOLDEN, tmp_path))
        assert mine == theirs


# --- a reader of its own ----------------------------------------------------------------------------------------------

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


def decode(folder: Path) -> dict[str, torch.Tensor]:
    """Every linear of a TensorRT-LLM checkpoint of a plain decoder in float64, by what the layout says and no more."""
    config = json.loads((folder / "config.json").read_text())
    tp, pp = config["mapping"]["tp_size"], config["mapping"]["pp_size"]
    heads, kv, dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_size"]
    local = config["num_hidden_layers"] // pp
    found = {}
    for stage in range(pp):
        ranks = [load_file(folder / f"rank{stage * tp + r}.safetensors") for r in range(tp)]
        for layer in range(local):
            p, n = f"transformer.layers.{layer}", f"layers.{stage * local + layer}"
            qkv = [weight(rank, f"{p}.attention.qkv") for rank in ranks]
            cuts = [heads * dim // tp, kv * dim // tp, kv * dim // tp]
            for name, parts in zip("qkv", zip(*(w.split(cuts) for w in qkv), strict=True), strict=True):
                found[f"{n}.attn.{name}"] = torch.cat(parts)
            found[f"{n}.attn.o"] = torch.cat([weight(rank, f"{p}.attention.dense") for rank in ranks], 1)
            found[f"{n}.mlp.gate"] = torch.cat([weight(rank, f"{p}.mlp.fc") for rank in ranks])
            found[f"{n}.mlp.up"] = torch.cat([weight(rank, f"{p}.mlp.gate") for rank in ranks])
            found[f"{n}.mlp.down"] = torch.cat([weight(rank, f"{p}.mlp.proj") for rank in ranks], 1)
    return found


def weight(rank: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    w, scale = rank[f"{module}.weight"], rank.get(f"{module}.weights_scaling_factor")
    if w.dtype == torch.uint8:  # NVFP4
        code = torch.stack((w & 15, w >> 4), -1).flatten(1)
        value = E2M1[(code & 7).long()] * torch.where(code & 8 > 0, -1.0, 1.0)
        blocks = scale.double().repeat_interleave(16, 1)
        return value * blocks * rank[f"{module}.weights_scaling_factor_2"].double() * pre(rank, module)
    if scale is None and f"{module}.per_channel_scale" in rank:
        return w.double() * rank[f"{module}.per_channel_scale"].double()[:, None]
    if scale is None:
        return w.double()
    if w.dtype == torch.int8 and scale.shape[0] == 2 * len(w):  # INT4: a byte holds two rows
        low, high = (w << 4) >> 4, w >> 4
        value = torch.stack((low, high), 1).flatten(0, 1).double()
        scale = scale.double().reshape(len(value), -1)
        return value * scale.repeat_interleave(value.shape[1] // scale.shape[1], 1) * pre(rank, module)
    return w.double() * scale.double().reshape(-1, 1) * pre(rank, module)


def pre(rank: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    return rank.get(f"{module}.prequant_scaling_factor", torch.ones(())).double()


def mine(path: Path) -> dict[str, torch.Tensor]:
    """The same as fewbit reads a directory."""
    checkpoint, found = open_checkpoint(path), {}
    for linear in checkpoint.spec.linears():
        if linear.name != "lm_head":
            tensor = checkpoint.tensors[f"{linear.name}.weight"]
            found[linear.name] = tensor.dequantize().double() if isinstance(tensor, QTensor) else tensor.double()
            if checkpoint.quant.get(linear.name) and checkpoint.quant[linear.name].prescale:
                found[linear.name] *= checkpoint.tensors[f"{linear.name}.prescale"].double()
    return found


# --- ours -------------------------------------------------------------------------------------------------------------


def rule(text: str) -> str:
    return f'rules: [{{match: "layers.*", {text}}}]\ncalib: {{samples: 2, length: 32}}\n'


RECIPES = {
    "fp8": "fp8",
    "fp8 a row": rule("weight: fp8_row, input: fp8_row"),
    "int8 sq": "int8_sq_static",
    "int8": rule("weight: int8_row"),
    "int4 a row": rule("weight: int4_row"),
    "int4": rule("weight: int4_g32"),
    "int4 awq": rule("weight: int4_g32") + "techniques: [{awq: {}}]\n",
    "w4a8": rule("weight: int4_g32, input: fp8, input_scale: static"),
    "nvfp4": "nvfp4",
    "nvfp4 awq": "nvfp4_awq",
    "mixed": 'rules: [{match: "layers.0.*", weight: int8_row}, {match: "layers.*.mlp.*", weight: int4_g64}]\n',
}
ALGO = {
    "fp8": "FP8",
    "fp8 a row": "FP8_PER_CHANNEL_PER_TOKEN",
    "int8 sq": "W8A8_SQ_PER_CHANNEL",
    "int8": "W8A16",
    "int4 a row": "W4A16",
    "int4": "W4A16_AWQ",
    "int4 awq": "W4A16_AWQ",
    "w4a8": "W4A8_AWQ",
    "nvfp4": "NVFP4",
    "nvfp4 awq": "NVFP4",
    "mixed": "MIXED_PRECISION",
}
RANKS = [(1, 1), (2, 1), (1, 2), (2, 2)]
CELLS = [
    pytest.param(r, *w, id=f"{r} tp{w[0]} pp{w[1]}", marks=[] if w == RANKS[i % 3 + 1] else [pytest.mark.slow])
    for i, r in enumerate(RECIPES)
    for w in RANKS
]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("source"), attention_bias=True, mlp_bias=True, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    done: dict[tuple[str, str | None], Path] = {}

    def make(recipe: str, kv: str | None = None) -> Path:
        if (recipe, kv) not in done:
            text = RECIPES[recipe]
            chosen = parse_recipe("own", text) if "\n" in text else read_recipe(text)
            chosen = replace(chosen, calibration=replace(chosen.calibration, samples=2, length=32)).with_kv(kv)
            checkpoint, target = open_checkpoint(source), tmp_path_factory.mktemp("made") / "model"
            compress(checkpoint, plan(checkpoint, chosen), target)
            done[recipe, kv] = target
        return done[recipe, kv]

    return make


@pytest.mark.parametrize(("recipe", "tp", "pp"), CELLS)
def test_there_and_back(recipe, tp, pp, made, tmp_path):
    first = open_checkpoint(made(recipe))
    asked = recipe == "fp8"  # a scale a projection becomes one a tensor
    export(first, "trtllm", tmp_path / "out", requantize=asked, layout=layout(tp, pp))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"]["quant_algo"] == ALGO[recipe]
    written = open_checkpoint(tmp_path / "out")
    assert (written.format, written.spec, written.dtype) == ("trtllm", first.spec, first.dtype)
    theirs, ours = decode(tmp_path / "out"), mine(tmp_path / "out")
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-6, atol=0)
    window = [ids(20)]
    logits = dense_logits(load(written), window)
    if asked:
        before = mine(made(recipe))
        for name, value in ours.items():
            assert (before[name] - value).norm() / value.norm() < 0.04, name
    else:
        same = {name: value.weight for name, value in first.quant.items()}
        assert {name: value.weight for name, value in written.quant.items()} == same
        assert torch.equal(logits, dense_logits(load(first), window))
    export(written, "trtllm", tmp_path / "one")
    same_tensors(written, open_checkpoint(tmp_path / "one"))
    assert torch.equal(logits, dense_logits(load(open_checkpoint(tmp_path / "one")), window))


@pytest.mark.parametrize("kv", ["fp8", "int8"])
def test_k_and_v(kv, made, tmp_path):
    first = open_checkpoint(made("int8", kv))
    export(first, "trtllm", tmp_path / "out", layout=layout(2, 2))
    second = open_checkpoint(tmp_path / "out")
    assert second.kv == first.kv
    same_tensors(first, second)
    files = load_file(tmp_path / "out" / "rank3.safetensors")
    k, v, both = (files[f"transformer.layers.0.attention.{n}_cache_scaling_factor"] for n in ("k", "v", "kv"))
    assert k.shape == (1,)
    assert torch.equal(k, first.tensors["layers.1.attn.k_scale"].reshape(1))
    assert torch.equal(both, torch.maximum(k, v))
    for rank in range(4):  # older files have one scale for both
        path = tmp_path / "out" / f"rank{rank}.safetensors"
        save_file({n: t for n, t in load_file(path).items() if not re.search("[.][kv]_cache", n)}, path)
    older = open_checkpoint(tmp_path / "out")
    assert torch.equal(older.tensors["layers.1.attn.v_scale"], both.reshape(()))


FAMILIES = {
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "mixtral": {},
    "qwen3_moe": {"decoder_sparse_step": 1, "mlp_only_layers": [1]},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, tmp_path):
    source = make_model(tmp_path / "source", family, **FAMILIES[family])
    checkpoint = open_checkpoint(source)
    export(checkpoint, "trtllm", tmp_path / "out", layout=layout(2, 2))
    written = open_checkpoint(tmp_path / "out")
    assert written.spec == checkpoint.spec
    same_tensors(checkpoint, written)
    window = [ids(20)]
    logits = dense_logits(load(checkpoint), window)
    assert torch.equal(logits, dense_logits(load(written), window))
    export(written, "hf", tmp_path / "back")
    config, before = (json.loads((p / "config.json").read_text()) for p in (tmp_path / "back", source))
    assert config == before | {"tie_word_embeddings": before.get("tie_word_embeddings", False)}


@pytest.mark.parametrize("recipe", ["int8_wo", "nvfp4", "fp8", pytest.param("int4_awq", marks=pytest.mark.slow)])
def test_a_mixture_of_experts(recipe, tmp_path):
    """Stacked: [experts, up rows then gate rows, columns], a scale a weight for each expert, one of the inputs."""
    source = open_checkpoint(make_model(tmp_path / "source", "mixtral"))
    chosen = read_recipe(recipe)
    chosen = replace(chosen, calibration=replace(chosen.calibration, samples=4, length=48))
    compress(source, plan(source, chosen), tmp_path / "made")
    first = open_checkpoint(tmp_path / "made")
    asked = recipe in ("fp8", "nvfp4")
    tp = 1 if recipe == "int4_awq" else 2
    export(first, "trtllm", tmp_path / "out", requantize=asked, layout=layout(tp, 1))
    second = open_checkpoint(tmp_path / "out")
    for name, quant in first.quant.items():
        assert second.quant[name].weight == quant.weight
        was, now = (c.tensors[f"{name}.weight"] for c in (first, second))
        assert asked or was.equal(now), name
        off = (was.dequantize() - now.dequantize()).norm() / was.dequantize().norm()
        assert off < (0.12 if asked else 1e-9), name
    files = [load_file(tmp_path / "out" / f"rank{rank}.safetensors") for rank in range(tp)]
    fc = [rank["transformer.layers.1.mlp.fc.weight"] for rank in files]
    up, gate = (second.tensors[f"layers.1.mlp.experts.2.{n}.weight"] for n in ("up", "gate"))
    assert fc[0].shape[:2] == (4, 2 * 256 // tp // (2 if recipe == "int4_awq" else 1))
    if recipe == "fp8":
        rows = torch.cat([part[2, : 256 // tp] for part in fc]).view(torch.uint8)
        assert torch.equal(rows, up.codes)
        rows = torch.cat([part[2, 256 // tp :] for part in fc]).view(torch.uint8)
        assert torch.equal(rows, gate.codes)
        assert files[0]["transformer.layers.1.mlp.fc.weights_scaling_factor"].shape == (4, 1)
        assert files[0]["transformer.layers.1.mlp.fc.activation_scaling_factor"].shape == (1,)
    window = [ids(12)]
    again = load(second)
    export(second, "trtllm", tmp_path / "one")
    assert torch.equal(dense_logits(again, window), dense_logits(load(open_checkpoint(tmp_path / "one")), window))


def test_one_scale_a_tensor_is_said_before_work_starts(made, tmp_path):
    checkpoint = open_checkpoint(made("fp8"))
    with pytest.raises(UnsupportedError) as error:
        export(checkpoint, "trtllm", tmp_path / "out")
    assert str(error.value).startswith(
        "layers.0.attn.q, layers.0.attn.k, layers.0.attn.v (and 3 more groups like them)"
    )
    assert "one scale of the whole weight" in str(error.value)
    assert str(error.value).endswith("with --requantize")
    assert list(tmp_path.iterdir()) == []
    planned = plan_export(checkpoint, "trtllm", requantize=True)
    assert len(planned.rounded) == 10
    export(checkpoint, "trtllm", tmp_path / "out", requantize=True)
    after = open_checkpoint(tmp_path / "out")
    for group in (("attn.q", "attn.k", "attn.v"), ("mlp.gate", "mlp.up")):
        was = [checkpoint.tensors[f"layers.0.{n}.weight"] for n in group]
        now = [after.tensors[f"layers.0.{n}.weight"] for n in group]
        largest = max(q.scale.item() for q in was)
        assert {q.scale.item() for q in now} == {largest}
        for old, new in zip(was, now, strict=True):
            if old.scale.item() == largest:
                assert old.equal(new)
            else:  # rounded to the nearest under the larger scale
                meant = (old.dequantize().double() / largest).float().to(torch.float8_e4m3fn)
                assert torch.equal(meant.view(torch.uint8), new.codes)


def test_for_nim(made, source, tmp_path):
    (tmp_path / "small").symlink_to(made("nvfp4"))
    (made("nvfp4") / "generation_config.json").write_text('{"eos_token_id": 2}')
    assert (
        run(["export", str(tmp_path / "small"), "--to", "trtllm", "--layout", "nim", "-o", str(tmp_path / "nim")]) == 0
    )
    above = ["config.json", "generation_config.json", "recipe.yaml", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(p.name for p in (tmp_path / "nim").iterdir()) == [*above, "trtllm_ckpt"]
    assert sorted(p.name for p in (tmp_path / "nim" / "trtllm_ckpt").iterdir()) == sorted([*above, "rank0.safetensors"])
    assert json.loads((tmp_path / "nim" / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )
    inner = json.loads((tmp_path / "nim" / "trtllm_ckpt" / "config.json").read_text())
    assert inner["quantization"]["quant_algo"] == "NVFP4"
    first, second = open_checkpoint(made("nvfp4")), open_checkpoint(tmp_path / "nim")
    same_tensors(first, second)
    assert set(second.files) == {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    export(second, "compressed-tensors", tmp_path / "back")
    same_tensors(first, open_checkpoint(tmp_path / "back"))
    with pytest.raises(UnsupportedError, match="only 'trtllm' is split over ranks or laid out for NIM"):
        export(first, "hf", tmp_path / "hf", layout=layout(2))


def test_it_is_served_like_any_other(made, tmp_path, capsys):
    export(open_checkpoint(made("int4")), "trtllm", tmp_path / "out", layout=layout(2, 2))
    said = []
    for folder in (made("int4"), tmp_path / "out"):
        words = [
            "run",
            str(folder),
            "--prompt",
            "Once",
            "--max-tokens",
            "12",
            "--temperature",
            "0",
            "--device",
            "cpu",
            "-q",
        ]
        assert run(words) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert run(["inspect", str(tmp_path / "out")]) == 0
    assert "trtllm" in capsys.readouterr().out


def test_without_our_own_words(tmp_path):
    """What others write says all of a Llama: positions and their scaling, sizes, biases."""
    first = open_checkpoint(make_model(tmp_path / "source", attention_bias=True, mlp_bias=True, rope_theta=123456.0))
    export(first, "trtllm", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rotary_base"] == 123456.0
    assert config["rotary_scaling"]["rope_type"] == "llama3"
    edit_json(tmp_path / "out" / "config.json", fewbit=None)
    second = open_checkpoint(tmp_path / "out")
    assert second.spec == first.spec
    same_tensors(first, second)


def test_a_vocabulary_that_does_not_divide_is_filled_up(tmp_path):
    first = open_checkpoint(
        make_model(tmp_path / "source", vocab_size=385, num_attention_heads=8, num_key_value_heads=4)
    )
    export(first, "trtllm", tmp_path / "out", layout=layout(4))
    assert load_file(tmp_path / "out" / "rank3.safetensors")["lm_head.weight"].shape == (97, 128)
    same_tensors(first, open_checkpoint(tmp_path / "out"))


def test_what_cannot_be_split_or_said_is_refused(made, tmp_path):
    checkpoint = open_checkpoint(made("int4"))
    for ranks, said in (
        ((3, 1), "layer 0: 4 attention heads do not divide over 3 ranks"),
        ((4, 1), "layer 0: 2 key/value heads do not divide over 4 ranks"),
        ((1, 4), "2 layers do not divide into 4 pipeline stages"),
    ):
        with pytest.raises(UnsupportedError, match=re.escape(said)):
            export(checkpoint, "trtllm", tmp_path / "out", layout=layout(*ranks))
    wide = parse_recipe("own", 'rules: [{match: "layers.*", weight: int4_g128}]')
    source = open_checkpoint(make_model(tmp_path / "plain"))
    compress(source, plan(source, wide), tmp_path / "wide")
    with pytest.raises(UnsupportedError, match=r"layers.0.attn.o: 128 columns over 2 ranks cut through groups of 128"):
        export(open_checkpoint(tmp_path / "wide"), "trtllm", tmp_path / "out", layout=layout(2))
    with pytest.raises(UnsupportedError, match="fewbit export --to trtllm"):
        plan(source, wide, "trtllm")
    for text, said in (
        ("weight: mxfp4", "layers.0.attn.q: a TensorRT-LLM checkpoint has no word for mxfp4"),
        ("weight: int4_g128_asym", "no word for int4_g128_asym"),
    ):
        compress(source, plan(source, parse_recipe("own", rule(text))), tmp_path / "odd", force=True)
        with pytest.raises(UnsupportedError, match=said):
            export(open_checkpoint(tmp_path / "odd"), "trtllm", tmp_path / "out")
    apart = 'rules: [{match: "layers.*.attn.q", weight: int8_row}, {match: "layers.*.attn.k", weight: int4_g64}]'
    compress(source, plan(source, parse_recipe("own", apart)), tmp_path / "apart")
    with pytest.raises(UnsupportedError, match="lie in one tensor here, but their numerics differ"):
        export(open_checkpoint(tmp_path / "apart"), "trtllm", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_broken_folders(made, tmp_path):
    def fresh(name: str, **ranks: int) -> Path:
        export(open_checkpoint(made("int8", "fp8")), "trtllm", tmp_path / name, layout=layout(**ranks))
        return tmp_path / name

    def refused(path: Path, said: str, error: type[Exception] = CheckpointError) -> None:
        with pytest.raises(error, match=said):
            dict(open_checkpoint(path).tensors)

    path = fresh("a", tp=2)
    (path / "rank1.safetensors").unlink()
    refused(path, "rank1.safetensors is missing from .* of which config.json promises 2")
    path = fresh("b", tp=2)
    tensors = load_file(path / "rank1.safetensors")
    save_file({n: t for n, t in tensors.items() if "ln_f" not in n}, path / "rank1.safetensors")
    refused(path, "rank1.safetensors lacks tensor 'transformer.ln_f.weight', which other ranks have")
    save_file(tensors | {"transformer.ln_f.weight": tensors["transformer.ln_f.weight"] + 1}, path / "rank1.safetensors")
    refused(path, "'transformer.ln_f.weight' should be the same on every rank, but is not")
    save_file(tensors | {"transformer.surprise": torch.zeros(2)}, path / "rank1.safetensors")
    refused(path, "'rank1.safetensors: transformer.surprise' .* belongs to nothing")
    save_file(tensors, path / "rank1.safetensors")
    os.truncate(path / "rank0.safetensors", (path / "rank0.safetensors").stat().st_size - 50)
    refused(path, "rank0.safetensors is damaged or truncated")
    path = fresh("c")
    for changes, said, error in (
        ({"architecture": "GPTForCausalLM"}, "GPTForCausalLM has no known layout", UnsupportedError),
        (
            {"mapping": {"world_size": 3, "tp_size": 2, "pp_size": 1}},
            "is not one of tp_size times pp_size",
            CheckpointError,
        ),
        ({"head_size": 64}, "head_dim is 32 by Hugging Face's words, here 64", CheckpointError),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 2 by Hugging Face", CheckpointError),
        ({"quantization": {"quant_algo": "W2A2"}}, "quant_algo 'W2A2' is not supported", UnsupportedError),
        (
            {"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}},
            "expected torch.float8",
            CheckpointError,
        ),
        ({"quantization": {"quant_algo": "MIXED_PRECISION"}}, "there is no quant_cfg.json beside it", CheckpointError),
        ({"quantization": None}, "though the config does not call it quantized", CheckpointError),
    ):
        before = (path / "config.json").read_text()
        edit_json(path / "config.json", **changes)
        refused(path, said, error)
        (path / "config.json").write_text(before)


def test_scales_that_one_tensor_holds_once(made, tmp_path):
    """Prescales of q, k and v that differ cannot be written, nor put right by rounding."""
    checkpoint = open_checkpoint(GOLDEN / "int8_sq")
    export(checkpoint, "trtllm", tmp_path / "sq")
    name = "transformer.layers.0.attention.qkv.prequant_scaling_factor"
    assert load_file(tmp_path / "sq" / "rank0.safetensors")[name].shape == (64,)
    assert {q.prescale for q in checkpoint.quant.values()} == {True}
    assert {q.input for q in checkpoint.quant.values()} == {FORMATS["int8"]}

"""From one file format to another: nothing is rounded that need not be, and nothing is left half done."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fewbit.checkpoint.shards
from fewbit.checkpoint import export, open_checkpoint, plan_export
from fewbit.checkpoint.nearest import nearest_kv, nearest_linear
from fewbit.compress import compress, plan, read_recipe
from fewbit.compress.recipe import parse_recipe
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.model import load
from fewbit.numerics.format import FORMATS
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.quantspec import KVSpec, QuantSpec
from helpers import dense_logits, edit_json, ids, make_model, same_tensors
from independent_decoder import decode


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("source"), tie_word_embeddings=True, attention_bias=True)


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    """`made(recipe, format)` gives a compressed directory, each made once."""
    done: dict[tuple[str, str], Path] = {}

    def make(recipe: str, fmt: str = "compressed-tensors", kv: str | None = None) -> Path:
        if (recipe, fmt, kv) not in done:
            chosen = (parse_recipe("own", recipe) if "\n" in recipe else read_recipe(recipe)).with_kv(kv)
            chosen = replace(chosen, calibration=replace(chosen.calibration, samples=2, length=32))
            checkpoint, target = open_checkpoint(source), tmp_path_factory.mktemp("made") / "model"
            compress(checkpoint, plan(checkpoint, chosen, fmt), target)
            done[recipe, fmt, kv] = target
        return done[recipe, fmt, kv]

    return make


@pytest.mark.parametrize("recipe", ["fp8", "int4_awq", "nvfp4", "int8_wo"])
def test_there_and_back_is_the_same_model(recipe, made, tmp_path):
    first = open_checkpoint(made(recipe, kv="fp8"))
    done = export(first, "hf", tmp_path / "hf")
    assert (done.equal, done.rounded, done.last_bit) == (done.tensors, 0, 0)
    middle = open_checkpoint(tmp_path / "hf")
    export(middle, "compressed-tensors", tmp_path / "back")
    last = open_checkpoint(tmp_path / "back")
    assert (middle.format, last.format) == ("hf", "compressed-tensors")
    assert (first.spec, first.quant, first.kv, first.dtype) == (last.spec, last.quant, last.kv, last.dtype)
    same_tensors(first, last)
    ours, theirs = decode(made(recipe, kv="fp8")), decode(tmp_path / "hf")
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())
    window = [ids(20)]
    assert torch.equal(dense_logits(load(first), window), dense_logits(load(middle), window))


def test_what_goes_along(made, source, tmp_path):
    export(open_checkpoint(made("int4_awq")), "hf", tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert (tmp_path / "out" / "recipe.yaml").read_bytes() == (made("int4_awq") / "recipe.yaml").read_bytes()
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        said = file.metadata()
    assert (said["format"], said["recipe"], said["exported_from"]) == ("pt", "int4_awq", "compressed-tensors")
    assert len(said["calibration_sha256"]) == 64


def test_an_unquantized_model_is_copied(source, tmp_path):
    done = export(open_checkpoint(source), "hf", tmp_path / "out")
    assert done.equal == done.tensors
    same_tensors(open_checkpoint(source), open_checkpoint(tmp_path / "out"))


def test_shards(made, tmp_path, monkeypatch):
    monkeypatch.setattr(fewbit.checkpoint.shards, "SHARD_BYTES", 60_000)
    export(open_checkpoint(made("fp8")), "hf", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    same_tensors(open_checkpoint(made("fp8")), open_checkpoint(tmp_path / "out"))


def test_an_outer_scale_that_is_no_power_of_two_survives_its_reciprocal(made, tmp_path):
    """Model Optimizer stores scales, compressed-tensors their reciprocals: off by a last bit at most, and said so."""
    path = tmp_path / "theirs"
    export(open_checkpoint(made("nvfp4")), "hf", path)
    tensors = load_file(path / "model.safetensors")
    random = torch.Generator().manual_seed(3)
    for name in [n for n in tensors if n.endswith(("weight_scale_2", "input_scale"))]:
        tensors[name] = torch.rand((), generator=random) * 1e-3 + 1e-4
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    done = export(open_checkpoint(path), "compressed-tensors", tmp_path / "out")
    changed = sum(n.endswith(("weight_scale_2", "input_scale")) for n in tensors)
    reciprocals = [t.reciprocal().reciprocal() != t for n, t in tensors.items() if n.endswith("weight_scale_2")]
    assert sum(reciprocals) <= done.last_bit <= changed
    assert done.equal == done.tensors - done.last_bit
    for name, weight in decode(path).items():
        torch.testing.assert_close(decode(tmp_path / "out")[name], weight, rtol=3e-7, atol=0)


def test_scales_in_fewer_bits_are_said_in_more(made, tmp_path):
    """FP8 scales in bfloat16, as llm-compressor writes them: float32 says the same."""
    path = tmp_path / "bf16"
    export(open_checkpoint(made("fp8")), "compressed-tensors", path)
    tensors = load_file(path / "model.safetensors")
    for name in [n for n in tensors if n.endswith("weight_scale")]:
        tensors[name] = tensors[name].bfloat16()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    before = open_checkpoint(path)
    assert {q.weight.scale for q in before.quant.values()} == {torch.bfloat16}
    done = export(before, "hf", tmp_path / "out")
    assert done.equal == done.tensors
    ours, theirs = decode(path), decode(tmp_path / "out")
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def test_what_the_target_cannot_say_is_refused_before_anything_is_written(made, tmp_path):
    checkpoint = open_checkpoint(made("int4_awq_asym"))
    with pytest.raises(UnsupportedError) as error:
        export(checkpoint, "hf", tmp_path / "out")
    said = str(error.value)
    assert said.startswith("layers.0.attn.q: Model Optimizer's layout has no word for int4_g128_asym")
    assert "and 13 more linears: layers.0.attn.k, layers.0.attn.v" in said
    assert said.endswith("with --requantize")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UnsupportedError, match="unknown checkpoint format 'gguff'"):
        export(checkpoint, "gguff", tmp_path / "out")


def test_requantized_only_where_needed_and_near(made, tmp_path):
    before = open_checkpoint(made("int4_awq_asym", kv="int8_head"))
    planned = plan_export(before, "hf", requantize=True)
    assert set(planned.rounded.values()) == {"int4_g128_asym weights becomes int4_g128 weights"}
    assert set(planned.rescaled.values()) == {"int8_head becomes fp8"} or set(planned.rescaled) == {0, 1}
    done = export(before, "hf", tmp_path / "out", requantize=True)
    after = open_checkpoint(tmp_path / "out")
    assert done.rounded == 14
    assert {str(kv) for kv in after.kv.values()} == {"fp8"}
    for name, tensor in before.tensors.items():
        other = after.tensors[name]
        if isinstance(tensor, QTensor):
            was = tensor.dequantize().double()
            off = (other.dequantize().double() - was).norm() / was.norm()
            assert 0 < off < 0.1, name
        elif name.endswith(("k_scale", "v_scale")):
            assert other.shape == ()
            torch.testing.assert_close(other * 448, tensor.amax() * 127.5)
        else:
            assert torch.equal(tensor, other), name


def test_rounding_inputs_otherwise_leaves_the_weights(made, tmp_path):
    """w4a8's weights can be said by Model Optimizer's layout, its inputs cannot."""
    done = export(open_checkpoint(made("w4a8")), "hf", tmp_path / "out", requantize=True)
    assert done.equal == done.tensors
    assert {q.input for q in open_checkpoint(tmp_path / "out").quant.values()} == {None}


def test_a_branch_and_a_prescale_become_part_of_the_weight(source, tmp_path):
    recipe = """
rules: [{match: "layers.*", weight: nvfp4, input: nvfp4, input_scale: outer}]
techniques: [{svdquant: {rank: 16}}]
calib: {samples: 2, length: 32}
"""
    checkpoint = open_checkpoint(source)
    compress(checkpoint, plan(checkpoint, parse_recipe("own", recipe)), tmp_path / "svd")
    before = open_checkpoint(tmp_path / "svd")
    export(before, "hf", tmp_path / "out", requantize=True)
    after = open_checkpoint(tmp_path / "out")
    assert not any(q.lowrank for q in after.quant.values())
    for index in range(2):
        group = [after.tensors[f"layers.{index}.attn.{n}.weight"] for n in "qkv"]
        assert len({q.outer.item() for q in group}) == 1
    name = "layers.1.mlp.down"
    a, b = (before.tensors[f"{name}.lowrank_{x}"].double() for x in "ab")
    meant = before.tensors[f"{name}.weight"].dequantize().double() + b @ a
    assert (after.tensors[f"{name}.weight"].dequantize().double() - meant).norm() / meant.norm() < 0.12


def test_the_nearest_numerics():
    fp8, row = FORMATS["fp8"], FORMATS["fp8_row"]
    says = [QuantSpec(fp8, fp8, "static"), QuantSpec(row, row), QuantSpec(FORMATS["int4_g128"])]
    near = nearest_linear(QuantSpec(FORMATS["fp8_block"], row), says.__contains__)
    assert near == says[1]
    assert nearest_linear(QuantSpec(FORMATS["int8_row"], FORMATS["int8"], "static"), says.__contains__) == says[0]
    assert nearest_linear(QuantSpec(FORMATS["int4_g32_asym"]), says.__contains__) == says[2]
    assert nearest_linear(QuantSpec(fp8), [].__contains__) is None
    fp8_kv = KVSpec(fp8, fp8)
    assert nearest_kv(KVSpec(FORMATS["int8_row"], FORMATS["int8_row"]), [fp8_kv].__contains__) == fp8_kv


def test_over_nothing_that_was_not_to_be_replaced(made, tmp_path):
    checkpoint = open_checkpoint(made("fp8"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(CheckpointError, match="is not empty"):
        export(checkpoint, "hf", tmp_path / "out")
    with pytest.raises(CheckpointError, match="holds the model that is read"):
        export(checkpoint, "hf", made("fp8"), force=True)
    export(checkpoint, "hf", tmp_path / "out", force=True)
    assert not (tmp_path / "out" / "mine").exists()


def test_damaged_weights_leave_nothing(made, tmp_path):
    path = tmp_path / "damaged"
    export(open_checkpoint(made("fp8")), "hf", path)
    checkpoint = open_checkpoint(path)
    os.truncate(path / "model.safetensors", (path / "model.safetensors").stat().st_size - 100)
    with pytest.raises(CheckpointError, match="ends inside tensor"):
        export(checkpoint, "compressed-tensors", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged"]


def test_on_the_command_line(made, tmp_path, capsys):
    from fewbit.cli import run

    assert run(["export", str(made("fp8")), "--to", "hf", "-o", str(tmp_path / "out"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["command"], said["format"], said["rounded"]) == ("export", "hf", {})
    assert said["equal"] == said["tensors"] > 20
    assert run(["export", str(made("w4a8")), "--to", "hf", "-o", str(tmp_path / "w4a8")]) == 2
    assert "no word for int4_g128" in capsys.readouterr().err
    assert run(["export", str(made("w4a8")), "--to", "hf", "-o", str(tmp_path / "w4a8"), "--requantize"]) == 0
    both = capsys.readouterr()
    assert "rounded anew: int4_g128 weights, fp8_row inputs (dynamic) becomes int4_g128 weights in 14" in both.err
    assert "equal bit for bit" in both.out


@pytest.mark.slow
def test_killed_half_way_it_leaves_no_directory_that_opens(tmp_path):
    source = make_model(tmp_path / "source", num_hidden_layers=12)
    code = """
import sys, time
from fewbit import export, open_checkpoint
from fewbit.checkpoint import writer
add = writer.CheckpointWriter.add
def slow(self, name, tensor):
    print(name, flush=True)
    time.sleep(0.05)
    add(self, name, tensor)
writer.CheckpointWriter.add = slow
export(open_checkpoint(sys.argv[1]), "hf", sys.argv[2])
"""
    for waited in (1, 40, 90):
        child = subprocess.Popen([sys.executable, "-c", code, source, tmp_path / "out"], stdout=subprocess.PIPE)
        for _ in range(waited):
            child.stdout.readline()
        time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        assert not (tmp_path / "out").exists()
        with pytest.raises(CheckpointError):
            open_checkpoint(tmp_path / "out")
    export(open_checkpoint(source), "hf", tmp_path / "out")  # what was left behind is in nobody's way
    same_tensors(open_checkpoint(source), open_checkpoint(tmp_path / "out"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


def test_a_format_of_another_producer_is_named(made, tmp_path):
    export(open_checkpoint(made("fp8")), "hf", tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization_config"]
    config["producer"] = {"name": "modelopt", "version": "0.47.0"}
    edit_json(tmp_path / "theirs" / "config.json", quantization_config=config)
    export(open_checkpoint(tmp_path / "theirs"), "compressed-tensors", tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata()["producer"] == "modelopt 0.47.0"

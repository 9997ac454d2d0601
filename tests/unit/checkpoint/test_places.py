"""Several of our tensors in one of a file: cut when read, joined when written, and refused where they cannot be one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbit.checkpoint import CheckpointWriter, files, format_named, open_checkpoint
from fewbit.checkpoint.layout import Quantization
from fewbit.compress import compress, plan
from fewbit.compress.recipe import Calibration, parse_recipe, read_recipe
from fewbit.errors import UnsupportedError
from fewbit.spec.families import families
from fewbit.spec.part import Part
from helpers import make_model, same_tensors

FUSED = sorted(name for name, kind in families().items() if any(isinstance(v, Part) for v in kind.NAMES.values()))


@pytest.mark.parametrize("family", families())
def test_a_copy_has_the_layout_of_its_family(family, tmp_path):
    source = open_checkpoint(make_model(tmp_path / "m", family, with_tokenizer=False))
    dtypes = {name: source.tensors.dtype(name) for name in source.tensors}
    with CheckpointWriter(
        tmp_path / "out", format_named("hf"), source.family, source.spec, Quantization({}, {}), dtypes, source.config,
        {}, {},
    ) as writer:  # fmt: skip
        for name in source.tensors:
            writer.add(name, source.tensors[name])
        writer.finish()
        writer.commit()
    mine, theirs = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "m"))
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


def test_the_rows_of_each_head_in_turn(tmp_path):
    """GPT-NeoX: [heads, (q, k, v), head_dim] rows, in the words of its own code."""
    path = make_model(tmp_path, "gpt_neox", torch.float32, with_tokenizer=False)
    tensors = open_checkpoint(path).tensors
    whole = load_file(path / "model.safetensors")["gpt_neox.layers.1.attention.query_key_value.weight"]
    for at, which in enumerate("qkv"):
        expected = whole.view(4, 3, 32, 128)[:, at].reshape(128, 128)
        assert torch.equal(tensors[f"layers.1.attn.{which}.weight"], expected)


def test_experts_in_one_tensor(tmp_path):
    """gpt-oss: gate and up in turns along the last axis of [experts, in, out]."""
    path = make_model(tmp_path, "gpt_oss", torch.float32, with_tokenizer=False)
    tensors, stored = open_checkpoint(path).tensors, load_file(path / "model.safetensors")
    both, bias = (stored[f"model.layers.0.mlp.experts.gate_up_proj{end}"] for end in ("", "_bias"))
    assert torch.equal(tensors["layers.0.mlp.experts.3.gate.weight"], both[3, :, ::2].T)
    assert torch.equal(tensors["layers.0.mlp.experts.3.up.weight"], both[3, :, 1::2].T)
    assert torch.equal(tensors["layers.0.mlp.experts.2.up.bias"], bias[2, 1::2])
    down = stored["model.layers.0.mlp.experts.down_proj"]
    assert torch.equal(tensors["layers.0.mlp.experts.1.down.weight"], down[1].T)


def test_only_the_rows_that_are_asked_for_are_read(tmp_path, monkeypatch):
    seen, plain = [], files.read_tensor
    checkpoint = open_checkpoint(make_model(tmp_path, "phi3", with_tokenizer=False))

    def watched(path, start, stored, name, device):
        seen.append(stored.nbytes)
        return plain(path, start, stored, name, device)

    monkeypatch.setattr(files, "read_tensor", watched)
    k = checkpoint.tensors["layers.0.attn.k.weight"]
    assert seen == [k.numel() * k.element_size()]
    assert checkpoint.tensors.nbytes("layers.0.attn.k.weight") == seen[0]


@pytest.mark.parametrize("family", FUSED)
def test_one_scale_for_all_that_lies_in_one_tensor(family, tmp_path):
    source = open_checkpoint(make_model(tmp_path / "m", family))
    chosen = replace(read_recipe("fp8"), calibration=Calibration(2, 32))
    compress(source, plan(source, chosen), tmp_path / "out")
    tensors = open_checkpoint(tmp_path / "out").tensors
    together = [name for name in ("q", "k", "v") if isinstance(source.family.NAMES[f"layers.{{i}}.attn.{name}"], Part)]
    scales = {tensors[f"layers.0.attn.{name}.weight"].scale.item() for name in together}
    assert len(scales) <= 1
    float_, eight = (t["layers.1.attn.k.weight"] for t in (source.tensors, tensors))
    assert (eight.dequantize() - float_.float()).norm() / float_.float().norm() < 0.05


def test_linears_of_one_tensor_want_one_rule(tmp_path):
    source = open_checkpoint(make_model(tmp_path / "m", "phi3"))
    rules = 'rules:\n  - {match: "layers.*.attn.v", weight: none}\n  - {match: "layers.*", weight: int8_row}\n'
    with pytest.raises(UnsupportedError, match=r"attn.q, layers.0.attn.k, layers.0.attn.v lie in one .*qkv_proj.* one"):
        plan(source, parse_recipe("own", rules))
    text = read_recipe("nvfp4_svd").text.replace("rank: 32", "rank: 8")
    with pytest.raises(UnsupportedError, match="no place for a low-rank branch of each"):
        plan(source, parse_recipe("own", text))


def test_experts_of_one_tensor_want_one_rule(tmp_path):
    source = open_checkpoint(make_model(tmp_path / "m", "gpt_oss"))
    rules = (
        'rules:\n  - {match: "layers.*.mlp.experts.2.down", weight: none}\n  - {match: "layers.*", weight: int8_row}\n'
    )
    with pytest.raises(UnsupportedError, match=r"lie in one tensor of this family's files .*down_proj"):
        plan(source, parse_recipe("own", rules))


def test_names_may_lack_what_their_family_begins_with(tmp_path):
    path = make_model(tmp_path / "m", "gpt2", with_tokenizer=False)
    whole = open_checkpoint(path)
    stored = load_file(path / "model.safetensors")
    short = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    assert short.keys() & stored.keys() == set()
    save_file(short | {"h.0.attn.bias": torch.ones(1, 1, 4, 4)}, path / "model.safetensors")
    same_tensors(open_checkpoint(path), whole_of(whole, stored, tmp_path))


def whole_of(checkpoint, stored, path):
    """The model as it was before its file was changed."""
    (path / "whole").mkdir()
    (path / "whole" / "config.json").write_text((checkpoint.path / "config.json").read_text())
    save_file(stored, path / "whole" / "model.safetensors")
    return open_checkpoint(path / "whole")

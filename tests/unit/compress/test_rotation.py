"""Rotation changes no output, spreads outliers, and is written as an ordinary model."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbit.checkpoint import open_checkpoint
from fewbit.compress import compress, plan
from fewbit.compress.recipe import parse_recipe
from fewbit.compress.techniques.rotation import Settings, orthogonal
from fewbit.errors import RecipeError
from fewbit.measure.quality import evaluate
from fewbit.model import DenseAttend, Loader
from helpers import ids, make_model

CPU = torch.device("cpu")
SHAPES = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "odd": ("llama", {"hidden_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24}),
}


@pytest.mark.parametrize("size", [1, 2, 64, 96, 100, 17, 320])
def test_it_is_orthogonal_and_mixes_everything(size):
    q = orthogonal(size, 0)
    assert torch.allclose(q @ q.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    if size & (size - 1) == 0:
        assert torch.allclose(q.abs(), torch.full_like(q, size**-0.5))
    assert (q != 0).all()
    assert size < 3 or not torch.equal(q, orthogonal(size, 1))


def logits(checkpoint) -> torch.Tensor:
    decoder = Loader(checkpoint, CPU).decoder()
    tokens = torch.tensor(ids(40))
    attend = DenseAttend(decoder.codecs, 40)
    return decoder.logits(decoder.hidden(tokens, torch.arange(40), attend))


def with_random_norms(path):
    """Norms and biases that are not what a fresh model has: ones and zeros hide mistakes."""
    tensors = load_file(path / "model.safetensors")
    g = torch.Generator().manual_seed(1)
    for name, t in tensors.items():
        if "norm" in name:
            tensors[name] = torch.rand(t.shape, generator=g).to(t.dtype) + 0.5
        elif name.endswith("bias"):
            tensors[name] = torch.randn(t.shape, generator=g).to(t.dtype) * 0.1
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("heads", [True, False])
def test_no_output_changes(shape, heads, tmp_path):
    family, options = SHAPES[shape]
    path = with_random_norms(make_model(tmp_path / "model", family, dtype=torch.float32, **options))
    checkpoint = open_checkpoint(path)
    turned = Settings(heads=heads).model(checkpoint)
    assert not turned.spec.tied
    assert set(turned.tensors) == set(turned.spec.tensors())
    before, after = logits(checkpoint), logits(turned)
    assert torch.allclose(before, after, rtol=1e-3, atol=2e-4 * before.abs().max().item())
    for name in checkpoint.tensors:
        if name.endswith(("attn.q.weight", "attn.v.weight", "attn.o.weight", "mlp.down.weight", "embed.weight")):
            assert not torch.allclose(checkpoint.tensors.dense(name), turned.tensors.dense(name))
        if name.endswith(("pre_attn.weight", "pre_mlp.weight", "final_norm.weight")):
            assert (turned.tensors.dense(name) == 1).all()
        assert turned.tensors.dtype(name) == turned.tensors.dense(name).dtype == checkpoint.tensors.dtype(name)


RECIPE = """
rules: [{match: "layers.*", weight: int4_g32}]
techniques: [TECHNIQUES]
calib: {samples: 2, length: 32}
"""


def test_outliers_cost_less_after_it(tmp_path):
    """Columns of weights are large because the norm before is small there: the function of the model is the same."""
    path = make_model(tmp_path / "model", dtype=torch.float32)
    tensors = load_file(path / "model.safetensors")
    for name, t in tensors.items():
        if "layernorm" in name:
            t[[3, 77]] /= 40
        elif name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
            t[:, [3, 77]] *= 40
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(path)
    windows = [ids(64, seed=s) for s in range(4)]
    losses = []
    for number, techniques in enumerate(("", "rotation: {}")):
        text = RECIPE.replace("TECHNIQUES", f"{{{techniques}}}" if techniques else "")
        planned = plan(checkpoint, parse_recipe("own", text))
        report = compress(checkpoint, planned, tmp_path / str(number))
        assert report.verified is not None
        found = evaluate(open_checkpoint(tmp_path / str(number)), checkpoint, windows, CPU).kl_mean
        assert found is not None
        losses.append(found.value)
    assert losses[1] < 0.8 * losses[0]


def test_a_tied_model_is_written_with_a_head_of_its_own(tmp_path):
    path = make_model(tmp_path / "model", tie_word_embeddings=True)
    checkpoint = open_checkpoint(path)
    compress(
        checkpoint, plan(checkpoint, parse_recipe("own", RECIPE.replace("TECHNIQUES", "rotation: {}"))), tmp_path / "o"
    )
    assert json.loads((tmp_path / "o" / "config.json").read_text())["tie_word_embeddings"] is False
    written = open_checkpoint(tmp_path / "o")
    assert "lm_head.weight" in written.tensors
    assert written.tensors.dense("lm_head.weight").dtype == written.dtype


def test_wrong_settings():
    with pytest.raises(RecipeError, match="heads is 1; expected true or false"):
        Settings(heads=1)
    with pytest.raises(RecipeError, match="seed is -1; expected a whole number"):
        Settings(seed=-1)

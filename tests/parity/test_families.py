"""Every family against transformers: the same weights, the same logits; and its config.json both ways."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers

from fewbit.checkpoint import open_checkpoint
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.model import load
from fewbit.spec.families import families
from fewbit.spec.hfconfig import HFConfig
from helpers import dense_logits, edit_json, ids, make_model

LENGTH = 40
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
VARIANTS = {
    "llama": {
        "tiny": {},
        "tied": {"tie_word_embeddings": True},
        "llama 2, whole heads": {"rope_scaling": None, "num_key_value_heads": 4, "rope_theta": 10000.0},
        "llama3 rope": {"rope_scaling": None, "rope_parameters": LLAMA3},
        "linear rope": {"rope_scaling": None, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
        "linear rope, old spelling": {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "yarn": {"rope_scaling": None, "rope_parameters": YARN},
        "yarn, all said": {
            "rope_scaling": None,
            "rope_parameters": YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.25},
        },
        "biases": {"attention_bias": True, "mlp_bias": True},
        "head_dim of its own": {"head_dim": 40},
        "head_dim not said": {"head_dim": None},
        "one kv head": {"num_key_value_heads": 1},
        "gelu": {"hidden_act": "gelu"},
        "gelu, tanh": {"hidden_act": "gelu_pytorch_tanh"},
        "relu": {"hidden_act": "relu"},
    },
    "mistral": {
        "tiny": {},
        "no window": {"sliding_window": None},
        "wide window": {"sliding_window": 31},
        "tied": {"tie_word_embeddings": True},
        "head_dim of its own": {"head_dim": 48},
    },
    "qwen2": {
        "tiny": {},
        "untied": {"tie_word_embeddings": False},
        "no window": {"use_sliding_window": False},
        "window in every layer": {"max_window_layers": 0},
        "layer types": {"layer_types": ["sliding_attention", "full_attention"]},
        "yarn": {"rope_parameters": YARN},
    },
    "qwen3": {
        "tiny": {},
        "tied": {"tie_word_embeddings": True},
        "biases": {"attention_bias": True},
        "window": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
        "yarn": {"rope_parameters": YARN},
    },
    "mixtral": {
        "tiny": {},
        "window": {"sliding_window": 7},
        "one expert for each token": {"num_experts_per_tok": 1},
        "tied": {"tie_word_embeddings": True},
    },
    "qwen3_moe": {
        "tiny": {},
        "scores as they are": {"norm_topk_prob": False},
        "a plain layer": {"mlp_only_layers": [0]},
        "every other layer": {"decoder_sparse_step": 2},
        "biases": {"attention_bias": True},
        "window": {"use_sliding_window": True, "sliding_window": 5},
    },
}
CASES = [(family, variant) for family, variants in VARIANTS.items() for variant in variants]


def configure(family: str, variant: str) -> dict:
    config = {**families()[family].TINY, **VARIANTS[family][variant]}
    return {k: v for k, v in config.items() if v is not None or k == "sliding_window"}


def save(config: dict, path) -> transformers.PreTrainedModel:
    """A model of transformers with random weights, and its directory as transformers writes it."""
    kind = transformers.AutoConfig.for_model(**config)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(kind, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim >= 2:
                p.normal_(std=1.0 if "embed" in name else 1.5 * p.shape[-1] ** -0.5)
            else:
                p.normal_(mean=0.0 if name.endswith("bias") else 1.0, std=0.2)
    model.tie_weights()
    model.save_pretrained(path)
    return model


def compare(model, path, vocab: int = 256) -> None:
    windows = [ids(LENGTH, vocab, seed) for seed in range(3)]
    with torch.no_grad():
        theirs = model(torch.tensor(windows)).logits.flatten(0, 1)
    ours = dense_logits(load(open_checkpoint(path)), windows)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert theirs.std() > 0.1  # the model says something


def test_every_family_is_tried():
    assert VARIANTS.keys() == families().keys()


@pytest.mark.parametrize(("family", "variant"), CASES, ids=[f"{f}: {v}" for f, v in CASES])
def test_logits_equal_those_of_transformers(family, variant, tmp_path):
    compare(save(configure(family, variant), tmp_path), tmp_path)


@pytest.mark.parametrize(("family", "variant"), CASES, ids=[f"{f}: {v}" for f, v in CASES])
def test_config_goes_there_and_back(family, variant):
    kind = families()[family]
    spec = kind.read(HFConfig(configure(family, variant)))
    assert kind.read(HFConfig(kind.write(spec))) == spec


@pytest.mark.parametrize("family", families())
def test_what_a_family_writes_is_read_by_transformers(family, tmp_path):
    kind = families()[family]
    config = kind.write(kind.read(HFConfig(kind.TINY)))
    model = save({k: v for k, v in config.items() if v is not None or k == "sliding_window"}, tmp_path)
    compare(model, tmp_path)


@pytest.mark.parametrize("family", families())
def test_tiny_fits_every_numeric_format(family):
    kind = families()[family]
    spec = kind.read(HFConfig(kind.TINY))
    assert kind.TINY["architectures"] == list(kind.ARCHITECTURES[:1])
    for linear in spec.linears():
        if linear.name != "lm_head":
            assert linear.in_features % 128 == 0, linear
        assert linear.out_features % 64 == 0, linear


@pytest.mark.parametrize("family", families())
def test_an_absent_field_means_what_transformers_takes_it_to_mean(family, tmp_path):
    """A config.json that says little: the rest comes from the class of the architecture."""
    said = ("architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    config = {k: families()[family].TINY[k] for k in said} | {
        "num_attention_heads": 32 if family.startswith("qwen") else 8,
        "hidden_act": "silu",
        "use_sliding_window": True,
        "num_hidden_layers": 30,
    }
    full = transformers.AutoConfig.for_model(**config)
    found = families()[family].read(HFConfig(config))
    a = found.layers[0].attention
    assert a.kv_heads == full.num_key_value_heads
    assert a.head_dim == (getattr(full, "head_dim", None) or 128 // a.heads)
    assert found.final_norm.eps == full.rms_norm_eps
    assert a.position.theta == full.rope_parameters["rope_theta"]
    assert found.tied == full.tie_word_embeddings
    window = getattr(full, "sliding_window", None)
    kinds = getattr(full, "layer_types", None) or ["sliding_attention"] * 30
    assert [x.attention.window for x in found.layers] == [window if k == "sliding_attention" else None for k in kinds]


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("llama", {"hidden_size": 0}, "'hidden_size' is 0, expected a positive whole number"),
        ("llama", {"vocab_size": "many"}, "'vocab_size' is 'many', expected a positive whole number"),
        ("llama", {"num_hidden_layers": True}, "'num_hidden_layers' is True"),
        ("llama", {"num_key_value_heads": 3}, "4 attention heads are no multiple of 3 key/value heads"),
        ("llama", {"head_dim": 33}, "head_dim 33 is odd"),
        ("llama", {"rms_norm_eps": "small"}, "'rms_norm_eps' is 'small', expected a number"),
        ("llama", {"tie_word_embeddings": "yes"}, "expected true or false"),
        ("llama", {"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu' is not supported; known: silu"),
        ("llama", {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "not supported; known: linear, llama3"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "'factor' is None, expected a number"),
        ("llama", {"rope_scaling": {**YARN, "mscale": 1.0}}, "'mscale': 1.0"),
        ("llama", {"partial_rotary_factor": 0.5, "rope_scaling": None}, "partial_rotary_factor other than 1"),
        ("mixtral", {"num_experts_per_tok": 9}, "9 experts a token, but there are 4"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, "9 experts a token, but there are 6"),
        ("qwen3_moe", {"mlp_only_layers": "all"}, "'mlp_only_layers' is 'all', expected a list of layers"),
        ("qwen2", {"layer_types": ["full_attention"]}, "expected 2 of full or sliding_attention"),
        ("qwen3", {"layer_types": ["full_attention", "chunked_attention"]}, "expected 2 of full or sliding_attention"),
    ],
)
def test_a_config_that_cannot_be_is_refused(family, changes, words):
    with pytest.raises((CheckpointError, UnsupportedError)) as e:
        families()[family].read(HFConfig({**families()[family].TINY, "use_sliding_window": True, **changes}))
    assert words in str(e.value)


def test_layers_that_differ_cannot_be_written_as_llama():
    kind = families()["llama"]
    spec = kind.read(HFConfig(kind.TINY))
    first, second = spec.layers
    other = replace(spec, layers=(first, replace(second, mlp=replace(second.mlp, width=512))))
    with pytest.raises(UnsupportedError, match="layers that differ"):
        kind.write(other)


def test_bfloat16_weights_of_a_made_model_open_in_transformers(tmp_path):
    """What the other tests build with `make_model` is an ordinary directory."""
    make_model(tmp_path, tie_word_embeddings=True)
    edit_json(tmp_path / "config.json", eos_token_id=None)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    windows = [ids(LENGTH)]
    with torch.no_grad():
        theirs = model(torch.tensor(windows)).logits[0]
    found = load(open_checkpoint(tmp_path))
    codecs = [replace(codec, dtype=torch.float32) for codec in found.codecs]  # the cache would round to bfloat16
    found.codecs = tuple(codecs)
    assert (dense_logits(found, windows) - theirs).abs().max() <= 1e-5 * theirs.abs().max()

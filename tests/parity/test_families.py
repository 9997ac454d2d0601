"""Every family against transformers: the same weights, the same logits; and its config.json both ways."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from fewbit.checkpoint import open_checkpoint
from fewbit.engine.attend import KVCache, PagedAttend
from fewbit.engine.batch import Batch, Piece
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.model import load
from fewbit.model.load import _shape_why_not, _spec_why_not
from fewbit.spec.families import UNSUPPORTED, families, family_of
from fewbit.spec.hfconfig import HFConfig
from helpers import dense_logits, edit_json, ids, make_model

LENGTH = 40
NULLS = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
"""Fields whose null is not the same as their absence."""
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
VARIANTS |= {
    "gemma": {"tiny": {}, "biases": {"attention_bias": True}, "whole heads": {"num_key_value_heads": 4}},
    "gemma2": {
        "tiny": {},
        "no caps": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
        "layer types": {"layer_types": ["full_attention", "sliding_attention"]},
        "window longer than the text": {"sliding_window": 64},
    },
    "gemma3": {
        "tiny": {},
        "transformers 5": {
            "rope_scaling": None, "rope_theta": None, "rope_local_base_freq": None, "sliding_window_pattern": None,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        "cap": {"final_logit_softcapping": 20.0},
    },
    "phi3": {
        "tiny": {},
        "short factors": {"max_position_embeddings": 64, "original_max_position_embeddings": 64},
        "plain rope": {"rope_scaling": None, "sliding_window": None},
        "partial rope": {"rope_scaling": None, "partial_rotary_factor": 0.5},
        "tied, whole heads": {"tie_word_embeddings": True, "num_key_value_heads": 4},
    },
    "qwen2_moe": {
        "tiny": {},
        "scores that add up to one": {"norm_topk_prob": True, "mlp_only_layers": [0]},
        "window": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    },
    "gpt_neox": {
        "tiny": {},
        "one after the other": {"use_parallel_residual": False, "tie_word_embeddings": True},
        "whole heads turned": {"rotary_pct": 1.0, "hidden_act": "gelu_fast"},
        "no biases in attention": {"attention_bias": False},
        "transformers 5": {
            "rotary_pct": None, "rotary_emb_base": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
        },
    },
    "gpt2": {
        "tiny": {},
        "untied": {"tie_word_embeddings": False},
        "scaled by layer": {"scale_attn_by_inverse_layer_idx": True},
        "inner width, relu": {"n_inner": 256, "activation_function": "relu"},
        "scores as they are": {"scale_attn_weights": False},
    },
    "falcon": {
        "tiny": {},
        "40B": {"num_attention_heads": 4, "new_decoder_architecture": True, "num_kv_heads": 2},
        "11B": {
            "num_attention_heads": 4, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1,
            "tie_word_embeddings": False, "ffn_hidden_size": 256,
        },
        "RW": {
            "num_attention_heads": 4, "alibi": True, "bias": True, "multi_query": False, "parallel_attn": False,
        },
        "RW, heads no power of two": {
            "num_attention_heads": 6, "hidden_size": 192, "alibi": True, "multi_query": False, "parallel_attn": False,
        },
    },
    "olmo2": {"tiny": {}, "tied, whole heads": {"tie_word_embeddings": True, "num_key_value_heads": 4}},
    "smollm3": {
        "tiny": {},
        "layers by name, windows": {
            "no_rope_layers": [0, 1], "use_sliding_window": True, "sliding_window": 6, "tie_word_embeddings": True,
        },
    },
    "starcoder2": {"tiny": {}, "no biases": {"use_bias": False, "sliding_window": None, "tie_word_embeddings": False}},
    "nemotron": {"tiny": {}, "biases": {"attention_bias": True, "mlp_bias": True, "partial_rotary_factor": 1.0}},
    "glm": {"tiny": {}, "whole heads, tied": {"num_key_value_heads": 4, "tie_word_embeddings": True}},
    "glm4": {"tiny": {}, "no biases": {"attention_bias": False}},
    "mpt": {
        "tiny": {},
        "heads no power of two": {"n_heads": 6, "d_model": 192, "attn_config": {"alibi": True}},
        "untied, scaled": {"tie_word_embeddings": False, "attn_config": {"softmax_scale": 0.25}},
    },
    "gpt_bigcode": {
        "tiny": {},
        "heads of their own": {"multi_query": False, "n_head": 4},
        "untied": {"tie_word_embeddings": False},
    },
    "gpt_oss": {
        "tiny": {},
        "plain rope": {"rope_scaling": {"rope_type": "default"}, "tie_word_embeddings": True},
        "no biases, other windows": {
            "attention_bias": False, "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 64,
        },
    },
}  # fmt: skip
OTHERS = {
    "chatglm": {
        "tiny": {},
        "every head its own": {"multi_query_attention": False, "rope_ratio": 50.0, "add_qkv_bias": False},
    },
    "baichuan": {
        "tiny": {},
        "2": {"z_loss_weight": 0},
        "13B": {"max_position_embeddings": None, "model_max_length": 256},
        "2, 13B, heads no power of two": {
            "max_position_embeddings": None, "model_max_length": 256, "z_loss_weight": 0, "num_attention_heads": 6,
            "hidden_size": 192,
        },
    },
}  # fmt: skip
"""Families that transformers does not know under their own names: the oracle is one of another family."""
CASES = [(family, variant) for family, variants in VARIANTS.items() for variant in variants]
OTHER_CASES = [(family, variant) for family, variants in OTHERS.items() for variant in variants]


def configure(family: str, variant: str) -> dict:
    config = {**families()[family].TINY, **(VARIANTS | OTHERS)[family][variant]}
    return {k: v for k, v in config.items() if v is not None or k in NULLS}


def save(config: dict, path) -> transformers.PreTrainedModel:
    """A model of transformers with random weights, and its directory as transformers writes it."""
    kind = transformers.AutoConfig.for_model(**deepcopy(config))  # it writes into what it is given
    torch.manual_seed(0)
    how = "eager" if config["model_type"] == "gemma2" else None  # the usual one leaves out the cap of its scores
    model = transformers.AutoModelForCausalLM.from_config(kind, dtype=torch.float32, attn_implementation=how).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim >= 2:
                p.normal_(std=1.0 if any(word in name for word in ("embed", "wte")) else 1.5 * p.shape[-1] ** -0.5)
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
    assert torch.equal(paged_logits(load(open_checkpoint(path)), windows), ours)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert theirs.std() > 0.1  # the model says something


def paged_logits(decoder, windows: list[list[int]], block: int = 4) -> torch.Tensor:
    """The same through the engine's cache: windows in chunks of uneven length, side by side, in scattered blocks."""
    count, each = len(windows), -(-LENGTH // block)
    cache = KVCache(decoder.spec, decoder.codecs, count * each, block, decoder.device)
    blocks = [list(range(w, count * each, count)) for w in range(count)]  # of each window every `count`-th
    found: list[list[torch.Tensor]] = [[] for _ in windows]
    at = [0] * count
    for turn in range(LENGTH):
        sizes = [min((7, 1, 12)[(turn + w) % 3], LENGTH - at[w]) for w in range(count)]
        pieces = [
            Piece(str(w), window[at[w] : at[w] + n], at[w], blocks[w][: -(-(at[w] + n) // block)], None)
            for w, (window, n) in enumerate(zip(windows, sizes, strict=True)) if n
        ]  # fmt: skip
        if not pieces:
            break
        positions = [p for piece in pieces for p in range(piece.first, piece.end)]
        slots = [b.blocks[p // block] * block + p % block for b in pieces for p in range(b.first, b.end)]
        tables = torch.tensor([b for piece in pieces for b in piece.blocks])
        attend = PagedAttend(cache, Batch(pieces), torch.tensor(slots), tables)
        tokens = torch.tensor([t for piece in pieces for t in piece.tokens])
        logits = decoder.logits(decoder.hidden(tokens, torch.tensor(positions), attend))
        for piece, part in zip(pieces, logits.split([len(p.tokens) for p in pieces]), strict=True):
            found[int(piece.id)].append(part)
        at = [a + n for a, n in zip(at, sizes, strict=True)]
    return torch.cat([torch.cat(parts) for parts in found])


def test_every_family_is_tried():
    assert (VARIANTS | OTHERS).keys() == families().keys()


@pytest.mark.parametrize(("family", "variant"), CASES, ids=[f"{f}: {v}" for f, v in CASES])
def test_logits_equal_those_of_transformers(family, variant, tmp_path):
    compare(save(configure(family, variant), tmp_path), tmp_path)


@pytest.mark.parametrize(("family", "variant"), OTHER_CASES, ids=[f"{f}: {v}" for f, v in OTHER_CASES])
def test_logits_equal_those_of_a_family_that_transformers_knows(family, variant, tmp_path):
    config = configure(family, variant)
    make_model(tmp_path, family, torch.float32, with_tokenizer=False, **dict.fromkeys(families()[family].TINY) | config)
    edit_json(tmp_path / "config.json", bos_token_id=None, eos_token_id=None)
    theirs = load_file(tmp_path / "model.safetensors")
    compare(as_glm(config, theirs) if family == "chatglm" else as_llama(config, theirs), tmp_path)


def as_glm(config: dict, tensors: dict[str, torch.Tensor]) -> transformers.PreTrainedModel:
    """A ChatGLM as transformers' GLM: other names, q, k and v apart."""
    heads, dim = config["num_attention_heads"], config["kv_channels"]
    kv = config["multi_query_group_num"] if config["multi_query_attention"] else heads
    renamed = {
        "transformer.embedding.word_embeddings": "model.embed_tokens", "transformer.encoder.layers": "model.layers",
        "transformer.encoder.final_layernorm": "model.norm", "transformer.output_layer": "lm_head",
        "self_attention.dense": "self_attn.o_proj", "mlp.dense_h_to_4h": "mlp.gate_up_proj",
        "mlp.dense_4h_to_h": "mlp.down_proj",
    }  # fmt: skip
    found = {}
    for name, tensor in tensors.items():
        if "query_key_value" in name:
            for which, part in zip("qkv", tensor.split([heads * dim, kv * dim, kv * dim]), strict=True):
                at = name.replace("self_attention.query_key_value", f"self_attn.{which}_proj")
                found[at.replace("transformer.encoder", "model")] = part
            continue
        for old, new in renamed.items():
            name = name.replace(old, new)
        found[name] = tensor
    kind = transformers.GlmConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=kv, head_dim=dim, rms_norm_eps=1e-5, attention_bias=config["add_qkv_bias"], pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0 * config["rope_ratio"]},
    )  # fmt: skip
    model = transformers.GlmForCausalLM(kind).eval()
    model.load_state_dict(found)
    return model


def as_llama(config: dict, tensors: dict[str, torch.Tensor]) -> transformers.PreTrainedModel:
    """A Baichuan as transformers' Llama; ALiBi as the bias of transformers' MPT, in a mask, and nothing turned."""
    found = {}
    for name, tensor in tensors.items():
        if "W_pack" in name:
            for which, part in zip("qkv", tensor.chunk(3), strict=True):
                found[name.replace("W_pack", f"{which}_proj")] = part
        else:
            found[name] = tensor
    if "z_loss_weight" in config:
        found["lm_head.weight"] = torch.nn.functional.normalize(found["lm_head.weight"])
    heads = config["num_attention_heads"]
    kind = transformers.LlamaConfig(
        vocab_size=256, hidden_size=config["hidden_size"], intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=heads, num_key_value_heads=heads, rms_norm_eps=1e-6, max_position_embeddings=256,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(kind).eval()
    model.load_state_dict(found)
    if "max_position_embeddings" in config:
        return model
    model.model.rotary_emb.inv_freq.zero_()
    later = torch.ones(LENGTH, LENGTH).triu(1).bool()
    mask = build_mpt_alibi_tensor(heads, LENGTH).masked_fill(later, torch.finfo(torch.float32).min)
    return lambda tokens: model(tokens, attention_mask=mask.expand(len(tokens), -1, -1, -1))


EVERY = CASES + OTHER_CASES


@pytest.mark.parametrize(("family", "variant"), EVERY, ids=[f"{f}: {v}" for f, v in EVERY])
def test_config_goes_there_and_back(family, variant):
    kind = families()[family]
    spec = kind.read(HFConfig(configure(family, variant)))
    assert kind.read(HFConfig(kind.write(spec))) == spec


@pytest.mark.parametrize("family", VARIANTS)
def test_what_a_family_writes_is_read_by_transformers(family, tmp_path):
    kind = families()[family]
    config = kind.write(kind.read(HFConfig(kind.TINY)))
    model = save({k: v for k, v in config.items() if v is not None or k in NULLS} | {"pad_token_id": 0}, tmp_path)
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


@pytest.mark.parametrize("family", VARIANTS)
def test_an_absent_field_means_what_transformers_takes_it_to_mean(family):
    """A config.json that says little: the rest comes from the class of the architecture."""
    wide = {"hidden_size": 3072, "num_attention_heads": 32, "num_hidden_layers": 30, "intermediate_size": 512}
    old = {"n_embd": 3072, "n_head": 32, "n_layer": 30, "d_model": 3072, "n_heads": 32, "n_layers": 30}
    tiny = families()[family].TINY
    config = {k: (wide | old).get(k, v) for k, v in tiny.items() if k in {**wide, **old, "model_type": 0}}
    config |= {"vocab_size": 256, "use_sliding_window": True, "architectures": tiny["architectures"]}
    config |= {k: tiny[k] for k in ("hidden_act", "attn_config") if tiny.get(k) == "silu" or k == "attn_config" in tiny}
    full = transformers.AutoConfig.for_model(**deepcopy(config)).to_dict()
    kind = families()[family]
    assert kind.read(HFConfig(config)) == kind.read(HFConfig({**config, **full}))


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
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "not supported; known: linear, llama3"),
        ("llama", {"rope_scaling": {"rope_type": "longrope"}}, "'short_factor' is None, expected a list of numbers"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "'factor' is None, expected a number"),
        ("llama", {"rope_scaling": {**YARN, "mscale": 1.0}}, "'mscale': 1.0"),
        ("llama", {"partial_rotary_factor": 0.5, "rope_scaling": None}, "partial_rotary_factor other than 1"),
        ("phi3", {"partial_rotary_factor": 0.5}, "longrope has 16 factors, expected one for each of the 8 pairs"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "'attn_logit_softcapping' is 50.0; only None is supported"),
        ("mpt", {"attn_config": {"clip_qkv": 6}}, "'clip_qkv' is 6; only None is supported"),
        ("mpt", {"attn_config": {"alibi": False}}, "an MPT without alibi is not supported"),
        ("gpt_oss", {"swiglu_limit": 5.0}, "'swiglu_limit' is 5.0; only 7.0 is supported"),
        ("smollm3", {"no_rope_layers": [1]}, "expected 2 of 0 or 1"),
        ("chatglm", {"rmsnorm": False}, "'rmsnorm' is False; only True is supported"),
        ("gpt2", {"add_cross_attention": True}, "'add_cross_attention' is True; only False is supported"),
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


@pytest.mark.parametrize("family", families())
def test_fused_kernels_decline_what_they_do_not_know(family):
    spec = families()[family].read(HFConfig(families()[family].TINY))
    reasons = [_spec_why_not(spec), *map(_shape_why_not, spec.layers)]
    assert any(reasons) == (family not in ("llama", "mistral", "qwen2", "qwen3", "phi3", "baichuan"))


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_no_spec_can_say_is_refused_by_name(name):
    assert name not in {known for family in families().values() for known in family.ARCHITECTURES}
    with pytest.raises(UnsupportedError, match=f"'{name}' is not supported: nothing here runs "):
        family_of({"architectures": [name]})


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

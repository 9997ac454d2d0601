"""What a step reads and computes: experts by how many tokens choose them, against the arithmetic by hand."""

from __future__ import annotations

import pytest
import torch

from fewbit.checkpoint import open_checkpoint
from fewbit.compress import bits_per_weight, compress, layer_bits, plan
from fewbit.compress.recipe import AS_IT_WAS, read_recipe
from fewbit.measure.dummy import (
    decode_bytes,
    decode_flops,
    dummy_checkpoint,
    eight_bit_share,
    prefill_flops,
    stored_bits,
)
from helpers import make_model

CPU = torch.device("cpu")
HIDDEN, WIDTH, LAYERS, VOCAB, EXPERTS = 4096, 14336, 32, 32000, 8
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": VOCAB, "hidden_size": HIDDEN,
    "intermediate_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 32, "num_key_value_heads": 8,
    "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32768, "rope_theta": 1e6, "tie_word_embeddings": False, "sliding_window": None,
}  # fmt: skip
EXPERT = LAYERS * 3 * HIDDEN * WIDTH  # weights of one, in all layers
REST = LAYERS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * 1024)  # of attention
HEAD = VOCAB * HIDDEN


def mixtral(top_k: int = 2, **more):
    return dummy_checkpoint(MIXTRAL | {"num_experts_per_tok": top_k} | more, AS_IT_WAS, CPU)


def test_a_batch_reads_the_experts_that_its_tokens_choose():
    for batch, experts in ((1, 2.0), (2, 8 * (1 - 0.75**2)), (512, 8.0)):
        weights, _ = decode_bytes(mixtral(), batch, 100)
        assert weights == pytest.approx(2 * (REST + HEAD + experts * EXPERT))  # bfloat16
    assert decode_bytes(mixtral(8), 1, 100)[0] == pytest.approx(2 * (REST + HEAD + 8 * EXPERT))


def test_a_token_computes_with_the_experts_that_it_chooses():
    attention = LAYERS * 4 * 32 * 128 * 50
    for top_k in (2, 8):
        one = 2 * (REST + HEAD + top_k * EXPERT)
        assert decode_flops(mixtral(top_k), 3, 50) == pytest.approx(3 * (one + attention))
        linears, _ = prefill_flops(mixtral(top_k), 10, 4)
        assert linears == pytest.approx(10 * one - 6 * 2 * HEAD)


def test_a_shared_expert_is_read_whole():
    config = MIXTRAL | {
        "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "num_experts": 8, "num_hidden_layers": 1,
        "moe_intermediate_size": 512, "shared_expert_intermediate_size": 1024, "norm_topk_prob": False,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False,
    }  # fmt: skip
    checkpoint = dummy_checkpoint(config, AS_IT_WAS, CPU)
    experts = 3 * HIDDEN * (2 * 512 + 1024)  # two, and the shared one
    assert decode_bytes(checkpoint, 1, 1)[0] == pytest.approx(2 * (REST / LAYERS + HEAD + experts))


def test_the_share_with_quantized_inputs_is_of_all_linears_but_the_head():
    shape = MIXTRAL | {"num_hidden_layers": 2}
    assert eight_bit_share(dummy_checkpoint(shape, AS_IT_WAS, CPU)) == 0
    assert eight_bit_share(dummy_checkpoint(shape, read_recipe("int4"), CPU)) == 0
    whole = dummy_checkpoint(shape, read_recipe("fp8"), CPU)
    assert eight_bit_share(whole) == 1
    for name in [name for name in whole.quant if name.startswith("layers.0.")]:
        del whole.quant[name]
    assert eight_bit_share(whole) == pytest.approx(0.5)


def test_bits_are_those_of_all_linears_of_the_layers(tmp_path):
    half = tmp_path / "half.yaml"
    half.write_text("rules:\n  - {match: layers.*.mlp.*, weight: int8_row}\n")
    model = open_checkpoint(make_model(tmp_path / "model"))
    small = compress(model, plan(model, read_recipe(str(half))), tmp_path / "small", device="cpu")
    made = open_checkpoint(tmp_path / "small")
    linears = [x for x in made.spec.linears() if x.name != "lm_head"]
    whole = sum(x.out_features * x.in_features for x in linears)
    mlp = sum(x.out_features * x.in_features for x in linears if ".mlp." in x.name)
    expected = (mlp * bits_per_weight(made) + (whole - mlp) * 16) / whole
    assert 8 < bits_per_weight(made) < 9
    assert layer_bits(made) == small.verified.layer_bits == pytest.approx(expected)
    dummy = dummy_checkpoint(made.config, read_recipe(str(half)), CPU)
    assert stored_bits(dummy) == pytest.approx(expected, rel=0.02)

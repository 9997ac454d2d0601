"""Where scales can be moved in each family: what a layer computes stays the same, and nothing else is touched."""

from __future__ import annotations

import pytest
import torch

from fewbit.checkpoint import open_checkpoint
from fewbit.compress.fold import fold, input_groups
from fewbit.compress.stats import Block
from fewbit.model import DecoderLayer, DenseAttend, KVCodec, Linear, Loader
from fewbit.model.rope import Rotary
from fewbit.numerics.format import FORMATS
from fewbit.numerics.quantspec import QuantSpec
from fewbit.ops.linear import LinearWeights
from fewbit.ops.linear.dense import Dense
from fewbit.spec.decoder import leaf_of
from fewbit.spec.families import families
from helpers import make_model

CPU = torch.device("cpu")
NOT_LINEAR = {"gpt2", "gpt_bigcode", "gpt_neox", "falcon", "mpt", "starcoder2", "nemotron", "gpt_oss"}
"""Families in which the input of down is not linear in the output of up."""


def block_of(family: str, path) -> Block:
    checkpoint = open_checkpoint(make_model(path, family, torch.float32, with_tokenizer=False))
    loader, shapes = Loader(checkpoint, CPU), checkpoint.spec.layer_linears(0)
    weights = {shape.name: loader.weights(shape) for shape in shapes}
    return Block(
        0,
        checkpoint.spec.layers[0],
        dict.fromkeys(weights, QuantSpec(FORMATS["int8_row"])),
        {name: w.weight for name, w in weights.items()},
        loader.norms(0),
        biases={name: w.bias for name, w in weights.items() if w.bias is not None},
    )


def run(block: Block) -> torch.Tensor:
    linears = {
        leaf_of(name): Linear(Dense(), LinearWeights(QuantSpec(), w, block.biases.get(name)), torch.float32)
        for name, w in block.weights.items()
    }
    layer = DecoderLayer(0, block.layer, linears, block.norms)
    x = torch.randn(30, block.weights["layers.0.attn.q"].shape[1], generator=torch.Generator().manual_seed(1))
    return layer(x, Rotary(torch.arange(30), torch.float32), DenseAttend([KVCodec(torch.float32)], 30))


@pytest.mark.parametrize("family", families())
def test_a_fold_keeps_what_a_layer_computes(family, tmp_path):
    block = block_of(family, tmp_path)
    before, random = run(block), torch.Generator().manual_seed(3)
    moved = {name: weight.clone() for name, weight in block.weights.items()}
    for group in input_groups(block):
        width = block.weights[group.consumers[0]].shape[1]
        fold(block, group, group.tie(torch.rand(width, generator=random) * 4 + 0.2))
    after = run(block)
    assert (after - before).norm() / before.norm() < 2e-6
    for name in {consumer for group in input_groups(block) for consumer in group.consumers}:
        assert not torch.equal(block.weights[name], moved[name]), name


@pytest.mark.parametrize("family", families())
def test_what_can_be_scaled_is_known(family, tmp_path):
    block = block_of(family, tmp_path)
    reached = {consumer for group in input_groups(block) for consumer in group.consumers}
    left = {leaf_of(name).rpartition(".")[2] for name in block.weights.keys() - reached}
    if family == "olmo2":  # no norm stands before what reads the residual stream
        assert left == {"q", "k", "v", "gate", "up"}
    else:
        assert left == ({"down"} if family in NOT_LINEAR else set())

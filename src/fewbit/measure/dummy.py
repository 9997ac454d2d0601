"""Models of well-known shapes with random weights scaled like real ones, made on the device: speed needs no others."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.checkpoint import Checkpoint
from fewbit.checkpoint.checkpoint import Tensors
from fewbit.compress.recipe import Recipe
from fewbit.errors import UnsupportedError, nearest_name
from fewbit.measure.facts import file_bits
from fewbit.numerics.element import Element
from fewbit.numerics.format import Format
from fewbit.numerics.qtensor import QTensor, block_size
from fewbit.numerics.quantspec import KVSpec, QuantSpec
from fewbit.spec.decoder import DecoderSpec, LinearShape, MoE
from fewbit.spec.families import family_of
from fewbit.spec.hfconfig import HFConfig

STD = 0.02
"""Standard deviation of the weights, about that of trained ones."""

_LLAMA3 = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "head_dim": 128,
    "num_key_value_heads": 8, "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 8192,
    "rope_theta": 500000.0, "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
}  # fmt: skip

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "llama3-8b": _LLAMA3
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama3-70b": _LLAMA3
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "llama3.2-1b": _LLAMA3
    | {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "head_dim": 64, "tie_word_embeddings": True, "max_position_embeddings": 131072,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "qwen3-8b": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936, "head_dim": 128,
        "num_key_value_heads": 8, "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 40960,
        "rope_theta": 1000000.0, "tie_word_embeddings": False, "attention_bias": False, "hidden_size": 4096,
        "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32, "use_sliding_window": False,
    },
}  # fmt: skip


def shape_named(name: str) -> dict[str, Any]:
    """The config.json of a built-in shape.

    Raises:
        UnsupportedError: no such shape.
    """
    if name not in SHAPES:
        raise UnsupportedError(f"unknown shape '{name}'; {nearest_name(name, SHAPES)}")
    return dict(SHAPES[name])


def dummy_checkpoint(
    config: Mapping[str, Any], recipe: Recipe, device: torch.device, layers: int | None = None
) -> Checkpoint:
    """A checkpoint whose tensors are made when they are asked for, the same each time.

    Args:
        config: a config.json.
        recipe: how it is quantized.
        device: where tensors are made.
        layers: only so many.
    """
    family = family_of(config)
    spec = family.read(HFConfig(dict(config)))
    if layers is not None:
        spec = replace(spec, layers=spec.layers[:layers])
    quant = recipe.resolve(spec)
    kv: Mapping[int, KVSpec] = dict.fromkeys(range(len(spec.layers)), recipe.kv) if recipe.kv else {}
    spec = replace(spec, tied=spec.tied and "lm_head" not in quant)
    tensors = Tensors()

    def add(name: str, make: Callable[[torch.Generator], Tensor | QTensor]) -> None:
        def load(where: torch.device) -> Tensor | QTensor:
            seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "little")
            return make(torch.Generator(device).manual_seed(seed)).to(where)

        tensors.add(name, load, torch.bfloat16, 0)

    for name, shape in spec.tensors().items():
        linear = name.removesuffix(".weight")
        kind = quant.get(linear, QuantSpec())
        if len(shape) == 1:  # norms around one, biases around zero
            middle = float(name.endswith(".weight"))
            add(name, lambda g, s=shape, m=middle: (_normal(s, g) * 0.1 + m).bfloat16())  # type: ignore[misc]
        elif kind.weight is None:
            add(name, lambda g, s=shape: (_normal(s, g) * STD).bfloat16())  # type: ignore[misc]
        else:
            add(name, lambda g, s=shape, f=kind.weight: _quantized(s, f, g))  # type: ignore[misc]
        if kind.calibrated:
            scale = 2.0**-9 if kind.input_scale == "outer" else 0.02
            add(f"{linear}.input_scale", lambda g, s=scale: torch.tensor(s, device=g.device))  # type: ignore[misc]
        if kind.lowrank:
            for leaf, factor in kind.lowrank_shapes(*shape).items():
                add(f"{linear}.{leaf}", lambda g, s=factor: (_normal(s, g) * STD).bfloat16())  # type: ignore[misc]
    for index in kv:
        for which in "kv":
            add(f"layers.{index}.attn.{which}_scale", lambda g: torch.tensor(0.03, device=g.device))
    return Checkpoint(
        Path("dummy"), Path("dummy"), (),
        "random weights", family, spec, dict(config), torch.bfloat16, quant, kv, tensors
    )  # fmt: skip


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


def _quantized(shape: tuple[int, ...], fmt: Format, generator: torch.Generator) -> QTensor:
    """Normal codes under scales within a factor of two: nothing is searched, so that 70 billion take seconds."""
    spread = fmt.element.max / 3.5  # three and a half standard deviations fit
    codes = fmt.element.encode(_normal(shape, generator) * spread)
    rows, columns = block_size(fmt, shape)
    blocks = -(-shape[0] // rows), -(-shape[1] // columns)
    outer = torch.tensor(2.0**-9, device=generator.device) if fmt.outer else None
    scale = torch.exp2(torch.rand(blocks, generator=generator, device=generator.device) - 0.5) * (STD / spread)
    if outer is not None:
        scale = scale / outer
    stored = fmt.scale.encode(scale) if isinstance(fmt.scale, Element) else scale.to(fmt.scale)
    zero = None
    if fmt.zero:
        zero = torch.randint(-2, 3, blocks, generator=generator, device=generator.device, dtype=torch.int8)
    return QTensor(fmt, codes, stored, outer, zero)


def _chosen(spec: DecoderSpec, name: str) -> float:
    """The share of tokens that go through a linear: of an expert's top_k / experts, of any other's all."""
    mlp = spec.layers[int(name.split(".")[1])].mlp if ".mlp.experts." in name else None
    return mlp.top_k / mlp.experts if isinstance(mlp, MoE) else 1.0


def decode_bytes(checkpoint: Checkpoint, batch: float, context: float) -> tuple[float, float]:
    """Bytes that a decode step must read: weights with the head, and K and V of `batch` sequences of `context`.

    An expert is read where one token or more of the batch chose it, each token for itself and every expert as often.
    """
    spec, weights = checkpoint.spec, 0.0
    for linear in spec.linears():
        kind, columns = checkpoint.quant.get(linear.name, QuantSpec()), linear.in_features
        numbers = linear.out_features * columns
        read = 1 - (1 - _chosen(spec, linear.name)) ** batch
        weights += read * numbers * file_bits(kind, numbers, columns, checkpoint.dtype) / 8
    kv = 0.0
    for index, layer in enumerate(spec.layers):
        a, stored = layer.attention, checkpoint.kv.get(index)
        size = 2 if stored is None else stored.k.element.bits / 8
        kv += 2 * a.kv_heads * a.head_dim * size * min(context, a.window or math.inf) * batch
    return weights, kv


def stored_bits(checkpoint: Checkpoint) -> float:
    """Bits per weight of all linears of the layers by their formats, as `layer_bits` has them of files."""
    bits = numbers = 0.0
    for linear in checkpoint.spec.linears():
        if linear.name != "lm_head":
            count, kind = linear.out_features * linear.in_features, checkpoint.quant.get(linear.name, QuantSpec())
            numbers, bits = numbers + count, bits + count * file_bits(kind, count, linear.in_features, checkpoint.dtype)
    return bits / numbers


def decode_flops(checkpoint: Checkpoint, batch: int, context: float) -> float:
    """Floating-point operations of a decode step of `batch` sequences of `context` tokens."""
    linears = prefill_flops(checkpoint, 1)[0]
    heads = (layer.attention for layer in checkpoint.spec.layers)
    return batch * (linears + sum(4.0 * a.heads * a.head_dim * min(context, a.window or math.inf) for a in heads))


def prefill_flops(checkpoint: Checkpoint, tokens: int, heads: int = 1) -> tuple[float, float]:
    """Floating-point operations of one prompt: linears (the head for `heads` positions), and causal attention."""
    spec = checkpoint.spec
    linears = sum(tokens * _flops(spec, x) if x.name != "lm_head" else heads * _flops(spec, x) for x in spec.linears())

    def pairs(window: int | None) -> float:
        seen = min(window or tokens, tokens)  # by a token late enough
        return seen * (seen + 1) / 2 + (tokens - seen) * seen

    attention = (y.attention for y in spec.layers)
    return linears, sum(4.0 * a.heads * a.head_dim * pairs(a.window) for a in attention)


def eight_bit_share(checkpoint: Checkpoint) -> float:
    """The share of a prompt's operations in linears, without the head, whose inputs are quantized."""
    spec, quant = checkpoint.spec, checkpoint.quant
    layers = [x for x in spec.linears() if x.name != "lm_head"]
    eight = [x for x in layers if x.name in quant and quant[x.name].input is not None]
    return sum(_flops(spec, x) for x in eight) / sum(_flops(spec, x) for x in layers)


def _flops(spec: DecoderSpec, linear: LinearShape) -> float:
    """Operations of a linear for a token, the mean over tokens where it is an expert's."""
    return 2.0 * linear.out_features * linear.in_features * _chosen(spec, linear.name)

"""Which scales can be moved between a linear and what makes its input, by the spec; and the moving.

A vector s multiplies the columns of all linears that read one input and divides what produces that input: the norm
before q, k and v or before gate and up (before all of them, where they run beside each other on one input); the rows of
v before o; the rows of up before down, where there is a gate. The function of the block
stays the same, but for the rounding of what is stored. Linears of one input also share their outer scale. Where nobody
knows what makes an input (`Loose`), the input itself is multiplied by the reciprocal: a prescale. A linear of a decoder
whose input nothing can scale (the residual stream itself, an activation that is not linear) is left as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from fewbit.compress.stats import Block, Stats
from fewbit.numerics.quantspec import QuantSpec
from fewbit.numerics.reference import outer_scale
from fewbit.spec.decoder import MLP, Layer, LinearShape, by_input


@dataclass
class Loose(Block):
    """Linears of a module of unknown structure: each reads an input of its own, and nothing can absorb a scale.

    Attributes:
        prescales: what the input of a linear is to be multiplied by, [in], by linear.
    """

    prescales: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def linear(cls, name: str, weight: Tensor, quant: QuantSpec, stats: Stats | None, dtype: torch.dtype) -> Loose:
        """A block of one linear; `dtype` is what its prescale is stored in."""
        known = {} if stats is None else {name: stats}
        return cls(0, cast("Layer", None), {name: quant}, {name: weight}, {}, dtype, stats=known)  # it has no layer


@dataclass(frozen=True)
class InputGroup:
    """Linears that read one input, and what makes that input.

    Attributes:
        consumers: canonical names of the linears.
        norm: last name of the norm that makes the input; or
        linear: canonical name of the linear whose rows scale it; neither: nobody knows what makes it.
        heads: query heads that share a row of `linear` (1: every input channel has a row of its own).
        width: rows of one head.
    """

    consumers: tuple[str, ...]
    norm: str = ""
    linear: str = ""
    heads: int = 1
    width: int = 1

    def tie(self, x: Tensor) -> Tensor:
        """The largest of x [in] over channels that one row of the producer makes, for each channel."""
        if self.heads == 1:
            return x
        rows = x.view(-1, self.heads, self.width)  # [kv heads, heads of one, D]
        return rows.amax(1, keepdim=True).expand_as(rows).reshape(-1)

    def rows(self, x: Tensor) -> Tensor:
        """Of a tied vector [in], the part for each row of `linear`."""
        return x.view(-1, self.heads, self.width)[:, 0].reshape(-1)


def input_groups(block: Block) -> list[InputGroup]:
    """The groups of a block in the order in which they run, those in which a linear will be quantized."""
    if isinstance(block, Loose):
        return [InputGroup((name,)) for name in block.quant]
    layer, a, p = block.layer, block.layer.attention, f"layers.{block.index}"
    qkv = [f"{p}.attn.{which}" for which in "qkv"]
    reading = [f"{m}.{which}" for m, mlp in block.mlps.items() for which in ("gate", "up")[0 if mlp.gated else 1 :]]
    if layer.one_input:
        qkv, reading = qkv + reading, []
    groups = [
        InputGroup(tuple(qkv), norm="pre_attn" if layer.pre_attn else ""),
        InputGroup((f"{p}.attn.o",), linear=f"{p}.attn.v", heads=a.heads // a.kv_heads, width=a.head_dim),
        InputGroup(tuple(reading), norm="pre_mlp" if layer.pre_mlp else ""),
        *(InputGroup((f"{m}.down",), linear=f"{m}.up" if _linear_in_up(mlp) else "") for m, mlp in block.mlps.items()),
    ]
    groups = [group for group in groups if group.norm or group.linear]  # nothing absorbs a scale of the others
    return [group for group in groups if any(name in block.quant for name in group.consumers)]


def _linear_in_up(mlp: MLP) -> bool:
    """Whether the input of down doubles if the output of up does."""
    return mlp.gated and mlp.limit is None


def quantized(group: InputGroup, block: Block) -> list[str]:
    """The consumers that will be quantized."""
    return [name for name in group.consumers if name in block.quant]


def shared_outers(
    weights: Mapping[str, Tensor], quant: Mapping[str, QuantSpec], scale: Tensor | float = 1.0
) -> dict[str, Tensor]:
    """One outer scale a format for linears that read one input, by linear: who joins q, k and v needs it equal.

    scale: [in], what the columns will be multiplied by.
    """
    outers: dict[str, Tensor] = {}
    for fmt in {q.weight for n, q in quant.items() if n in weights and q.weight is not None and q.weight.outer}:
        names = [name for name in weights if name in quant and quant[name].weight == fmt]
        amax = torch.stack([(weights[name].abs().amax(0).float() * scale).amax() for name in names]).amax()
        outers |= dict.fromkeys(names, outer_scale(amax, fmt))
    return outers


def outers_of(shapes: Sequence[LinearShape], block: Block) -> dict[str, Tensor]:
    """The outer scales of a block's linears, shared by those that read the same input."""
    found: dict[str, Tensor] = {}
    for group in by_input(shapes):
        found |= shared_outers({shape.name: block.weights[shape.name] for shape in group}, block.quant)
    return found


def fold(block: Block, group: InputGroup, scale: Tensor) -> None:
    """Multiply the consumers' columns by `scale` [in] and divide the producer by it, in place.

    A norm or a prescale is stored in the model's dtype: it is rounded to it first, and the consumers get what it was
    really divided by. The statistics of the consumers' input follow, and the largest magnitudes of V where v is the
    producer.

    Raises:
        ValueError: a scale is not a positive number, or not the same for channels that one row makes.
    """
    scale = scale.float()
    if not (torch.isfinite(scale).all() and (scale > 0).all()):
        raise ValueError("a folded scale must be positive")
    if not torch.equal(group.tie(scale), scale):
        raise ValueError("channels that one row of the producer makes need one scale")
    if isinstance(block, Loose):
        (name,) = group.consumers
        before = block.prescales.get(name, torch.ones_like(scale))
        block.prescales[name] = (before / scale).to(block.dtype).float()
        scale = before / block.prescales[name]
    elif group.norm:
        plus = 1.0 if block.layer.norms[group.norm].plus_one else 0.0
        before = block.norms[group.norm].float() + plus
        stored = (before / scale - plus).to(block.dtype).float()
        after = stored + plus
        block.norms[group.norm] = stored.to(block.norms[group.norm].dtype)
        scale = torch.where((before != 0) & (after != 0), before / after, scale)
        if (bias := f"{group.norm}.bias") in block.norms:
            block.norms[bias] = block.norms[bias] / scale
        if group.norm == "pre_mlp":  # these read the same input
            for name in {"router", "shared_gate"} & block.norms.keys():
                block.norms[name] = block.norms[name] * scale  # float32: rounded when it is stored
    else:
        rows = group.rows(scale)
        block.weights[group.linear] = block.weights[group.linear].float() / rows[:, None]
        if group.linear in block.biases:
            block.biases[group.linear] = block.biases[group.linear].float() / rows
        if block.v_amax is not None and group.linear.endswith(".attn.v"):
            block.v_amax = block.v_amax / rows
    for name in group.consumers:
        block.weights[name] = block.weights[name] * scale  # float32, as the scale is
    for stats in _each(block, group.consumers):
        stats.scaled(scale)


def _each(block: Block, names: Sequence[str]) -> list[Stats]:
    """The statistics of linears, those that several share once."""
    return list({id(s): s for name in names if (s := block.stats.get(name)) is not None}.values())

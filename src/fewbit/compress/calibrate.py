"""What data tell about one layer: statistics of inputs, K and V, and how far calibrated scales reach."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from fewbit.compress.calibrators import Histogram
from fewbit.compress.recipe import Calibration
from fewbit.compress.stats import Block, Recorder, Stats
from fewbit.compress.stream import Stream
from fewbit.compress.techniques import Needs
from fewbit.errors import CheckpointError
from fewbit.model import DecoderLayer, KVCodec
from fewbit.numerics.format import ALL
from fewbit.numerics.quantspec import KVSpec
from fewbit.ops.device import release_memory
from fewbit.spec.decoder import LinearShape, MoE, leaf_of

FLOOR = 32
"""Tokens that an expert has to see for statistics of its own."""


def observe(
    block: Block, shapes: Sequence[LinearShape], layer: DecoderLayer, data: Stream, codecs: list[KVCodec],
    needs: Collection[Needs],
) -> None:  # fmt: skip
    """One pass of the data over the float layer: fills the statistics of `block`.

    Raises:
        CheckpointError: an input holds NaN or infinity.
    """
    plain = dict(layer.linears)
    shared: dict[str, Stats] = {}
    for shape in shapes:
        quant = block.quant.get(shape.name)
        if quant is None or not (quant.calibrated or set(needs) - {"none"}):
            continue
        group = shape.shares_input or shape.name
        if group not in shared:
            shared[group] = Stats.empty(shape.in_features, data.device, needs)
            leaf = leaf_of(shape.name)
            layer.linears[leaf] = Recorder(plain[leaf], shared[group])
        block.stats[shape.name] = shared[group]
    attend = data.watch(layer, codecs)
    layer.linears = plain
    release_memory()
    _agree(block, data)
    if isinstance(block.layer.mlp, MoE):
        _help_experts(block)
    block.k_amax, block.v_amax = attend.k_amax[block.index], attend.v_amax[block.index]
    for name, amax in (("K", block.k_amax), ("V", block.v_amax)):
        data.ranks.largest(amax)
        if not torch.isfinite(amax).all():
            raise CheckpointError(f"{name} of layer {block.index} holds NaN or infinity on the calibration data")


def _help_experts(block: Block) -> None:
    """Count the tokens of each expert, and give those that saw fewer than `FLOOR` something to be rounded by.

    gate and up then count what all experts together saw, which is the input of any; down is rounded by its weights
    alone, under an input scale that reaches as far as the others'.
    """
    for which in (("gate", "up"), ("down",)):
        experts = [m for m in block.mlps if not m.endswith(".shared")]
        of = {m: [n for n in (f"{m}.{w}" for w in which) if n in block.stats] for m in experts}
        own = {m: block.stats[names[0]] for m, names in of.items() if names}
        if not own:
            continue
        block.tokens |= {m: stats.tokens for m, stats in own.items()}
        few = [m for m, stats in own.items() if stats.tokens < FLOOR]
        if not few:
            continue
        together = None if which == ("down",) else Stats.sum(list(own.values()))
        reach = max(float(stats.amax.max()) for stats in own.values())
        for m in few:
            block.scarce.update(of[m])
            block.stats |= dict.fromkeys(of[m], own[m].blank(reach) if together is None else together.copy())


def observe_head(
    block: Block, data: Stream, normal: Callable[[Tensor], Tensor], c: Calibration, needs: Collection[Needs]
) -> None:
    """What `observe` and `set_reach` do, for the head: its input is the state after the final norm, `normal`."""
    name, quant = next(iter(block.quant.items()))
    stats = block.stats[name] = Stats.empty(block.weights[name].shape[1], data.device, needs)
    seen = Histogram(1, data.device)
    reaches = quant.input is not None and quant.input_scale == "static" and c.method != "max"
    for states in data.pieces():
        x = normal(states)
        stats.see(x)
        if reaches:
            seen.see(x)
    _agree(block, data)
    if reaches:
        assert quant.input is not None
        data.ranks.count(seen)
        block.reach[name] = seen.reach(quant.input, c.method, c.percentile)[0]


def _agree(block: Block, data: Stream) -> None:
    """Make the statistics of a block those of all processes, and look at them."""
    for stats in {id(s): s for s in block.stats.values()}.values():
        data.ranks.add(stats)
    for name, stats in block.stats.items():
        # of several processes the largest drops NaN, a sum keeps it
        if not (torch.isfinite(stats.amax).all() and torch.isfinite(stats.total).all()):
            raise CheckpointError(f"the input of {name} holds NaN or infinity on the calibration data")


def set_reach(
    block: Block, shapes: Sequence[LinearShape], layer: DecoderLayer, data: Stream, codecs: list[KVCodec],
    kv: KVSpec | None, c: Calibration,
) -> None:  # fmt: skip
    """A second pass, over what techniques made of the layer: how far the scales reach that data decide."""
    inputs: dict[str, Histogram] = {}
    groups = {}
    for shape in shapes:
        quant = block.quant.get(shape.name)
        if quant is None or quant.input_scale != "static" or shape.name in block.scarce:
            continue
        groups[shape.name] = group = shape.shares_input or shape.name
        if group not in inputs:
            inputs[group] = Histogram(1, data.device)
            leaf = leaf_of(shape.name)
            layer.linears[leaf] = Recorder(layer.linears[leaf], inputs[group])
    heads = block.layer.attention.kv_heads
    stored = {"k": kv.k, "v": kv.v} if kv else {}
    cache = {n: Histogram(1 if f.block == (ALL, ALL) else heads, data.device) for n, f in stored.items()}
    if not inputs and not cache:
        return
    data.watch(layer, codecs, cache)
    for histogram in (*inputs.values(), *cache.values()):
        data.ranks.count(histogram)
    for name, group in groups.items():
        fmt = block.quant[name].input
        assert fmt is not None
        block.reach[name] = inputs[group].reach(fmt, c.method, c.percentile)[0]
    for name, fmt in stored.items():
        block.reach[name] = cache[name].reach(fmt, c.method, c.percentile)

"""What data tell about one layer: statistics of inputs, K and V, and how far calibrated scales reach."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

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
from fewbit.spec.decoder import LinearShape


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
            leaf = shape.name.rpartition(".")[2]
            layer.linears[leaf] = Recorder(plain[leaf], shared[group])
        block.stats[shape.name] = shared[group]
    attend = data.watch(layer, codecs)
    layer.linears = plain
    release_memory()
    for stats in shared.values():
        data.ranks.add(stats)
    for name, stats in block.stats.items():
        if not torch.isfinite(stats.amax).all():
            raise CheckpointError(f"the input of {name} holds NaN or infinity on the calibration data")
    block.k_amax, block.v_amax = attend.k_amax[block.index], attend.v_amax[block.index]
    data.ranks.largest(block.k_amax)
    data.ranks.largest(block.v_amax)


def set_reach(
    block: Block, shapes: Sequence[LinearShape], layer: DecoderLayer, data: Stream, codecs: list[KVCodec],
    kv: KVSpec | None, c: Calibration,
) -> None:  # fmt: skip
    """A second pass, over what techniques made of the layer: how far the scales reach that data decide."""
    inputs: dict[str, Histogram] = {}
    groups = {}
    for shape in shapes:
        quant = block.quant.get(shape.name)
        if quant is None or quant.input_scale != "static":
            continue
        groups[shape.name] = group = shape.shares_input or shape.name
        if group not in inputs:
            inputs[group] = Histogram(1, data.device)
            leaf = shape.name.rpartition(".")[2]
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

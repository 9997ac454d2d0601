"""A slice of a model through the engine's own kernels against the definition: what is timed must be right first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from fewbit.compress.recipe import Recipe
from fewbit.engine.batch import Batch, Draw, Piece
from fewbit.engine.config import EngineOptions, resolve
from fewbit.engine.gpu import SIZES, GpuRunner
from fewbit.engine.types import SamplingParams
from fewbit.errors import UnsupportedError
from fewbit.measure.dummy import dummy_checkpoint
from fewbit.model.attend import DenseAttend
from fewbit.model.fused import FusedDecoder
from fewbit.model.load import Loader

STEPS = 16
COMPARED = 4
"""Sequences that differ from each other; a larger batch repeats them."""


@torch.inference_mode()
def compare_slice(
    loader: Loader, decoder: FusedDecoder, config: Mapping[str, Any], recipe: Recipe, batch: int
) -> tuple[float, float]:
    """Decode `STEPS` tokens of `batch` sequences with two layers of a model; the reference computes the same.

    Args:
        loader: of the model.
        decoder: the model, whose first two layers, embedding and head are used.
        config: its config.json.
        recipe: its numerics.
        batch: sequences at a time, as they will be timed (at most the largest graph's).

    Returns:
        The relative difference of the logits, and how often both would choose the same token.

    Raises:
        UnsupportedError: they are not the same function: nothing is worth timing.
    """
    device, batch = decoder.device, min(batch, SIZES[-1])
    small = dummy_checkpoint(config, recipe, device, layers=2)
    two = FusedDecoder(
        small.spec, decoder.embed_weight, decoder.layers[:2], decoder.final_norm, decoder.head, decoder.codecs[:2]
    )
    options = EngineOptions(
        device=str(device), max_batch=batch, max_model_len=128, num_blocks=batch * 2, prefix_cache=False,
        max_batch_tokens=8192 + batch,
    )  # fmt: skip
    runner = GpuRunner(two, resolve(options, spec=two.spec, token_bytes=1, free_bytes=1 << 40))
    generator = torch.Generator().manual_seed(1)
    before, kinds = 77, min(batch, COMPARED)
    said = torch.randint(0, small.spec.vocab, (kinds, before + STEPS), generator=generator).tolist()
    params = SamplingParams(max_tokens=STEPS, temperature=0.0)
    rows = [(f"s{i}", said[i % kinds], [2 * i, 2 * i + 1]) for i in range(batch)]

    def draw(tokens: list[int]) -> Draw:
        return Draw(params, 0, tokens, before)

    plain = Loader(small, device, "reference").decoder()
    theirs = []
    for tokens in said:
        ids = torch.tensor(tokens, device=device)
        hidden = plain.hidden(ids, torch.arange(len(ids), device=device), DenseAttend(plain.codecs, len(ids)))
        theirs.append(plain.logits(hidden[before:]))
    expected, kind = torch.stack(theirs), torch.arange(batch, device=device) % kinds  # [kinds, steps, vocab]
    for start in range(0, batch, 64):  # prompts
        pieces = [Piece(name, t[:before], 0, blocks, draw(t)) for name, t, blocks in rows[start : start + 64]]
        runner.collect(runner.launch(Batch(pieces)))
    off = size = same = 0.0
    for i in range(STEPS):
        step = [Piece(name, [t[before + i]], before + i, blocks, draw(t)) for name, t, blocks in rows]
        runner.collect(runner.launch(Batch(step)))
        ours, wanted = runner.step.logits[:batch], expected[kind, i]
        off += float((ours - wanted).square().sum(dtype=torch.float64))
        size += float(wanted.square().sum(dtype=torch.float64))
        same += float((ours.argmax(-1) == wanted.argmax(-1)).float().mean())
    difference = math.sqrt(off / size)
    agreement = same / STEPS
    # rounding of activations turns the noise of bfloat16 into whole steps of a code, layer after layer: with steps of
    # 4 bits the definition itself moves by 0.2 to 0.3 when its embedding is rounded once; two unrelated answers by 1.4
    bits = min((q.input.element.bits for q in small.quant.values() if q.input is not None), default=16)
    limit = 0.7 if bits <= 4 else 0.25 if bits <= 8 else 0.1 if small.kv else 0.04
    if not difference < limit:
        raise UnsupportedError(
            f"the engine's logits differ from the reference's by {difference:.3f} (relative, limit {limit}) over "
            f"{STEPS} steps of a two-layer slice: a fault of a kernel; nothing was timed"
        )
    return difference, agreement

"""Opening what was written and looking at it: the proof that a compression ended well."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.checkpoint import Checkpoint
from fewbit.compress.stream import Stream
from fewbit.errors import CheckpointError
from fewbit.model import KVCodec, Loader
from fewbit.model.decoder import finish_logits
from fewbit.numerics.qtensor import QTensor
from fewbit.ops.device import release_memory
from fewbit.ops.linear import LinearWeights


@dataclass(frozen=True)
class Verified:
    """What the files were found to hold.

    Attributes:
        scales: how many scales were looked at, all of them finite and not zero.
        tokens: on how many held-out tokens the logits were equal bit for bit.
        bits_per_weight: bits of codes, scales, zeros, prescales and low-rank branches of the quantized linears, for
            each of their weights.
        layer_bits: the same of all linears of the layers, those that stayed as they were included.
        weight_bytes: all tensors together.
    """

    scales: int
    tokens: int
    bits_per_weight: float
    layer_bits: float
    weight_bytes: int


def verify(
    written: Checkpoint,
    windows: Sequence[Sequence[int]],
    logits: Tensor,
    device: torch.device,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Verified:
    """Check a written checkpoint against the model it was made from, one layer at a time.

    Args:
        written: the files, opened.
        windows: held-out token ids.
        logits: what the model in memory made of them, float32 [tokens, vocab].
        device: where to run it.
        progress: see `fewbit.compress.run.Progress`.

    Raises:
        CheckpointError: a scale is zero or not finite, or a logit differs.
    """
    loader = Loader(written, device)
    spec = written.spec
    scales = 0

    def look(name: str, scale: Tensor | None) -> None:
        nonlocal scales
        if scale is None:
            return
        if not (torch.isfinite(scale).all() and (scale != 0).all()):
            raise CheckpointError(f"a scale of '{name}' is zero or not finite in the written files; nothing was kept")
        scales += scale.numel()

    def look_at_linear(name: str, w: LinearWeights) -> None:
        look(f"{name}.weight", w.weight.scales() if isinstance(w.weight, QTensor) else None)
        look(f"{name}.input_scale", w.input_scale)

    stream = Stream(windows, loader.embed(), loader.dtype)
    codecs: list[KVCodec] = []
    for index in range(len(spec.layers)):
        progress("check", index, len(spec.layers))
        codecs.append(codec := loader.codec(index))
        look(f"layers.{index}.attn.k_scale", codec.k_scale)
        look(f"layers.{index}.attn.v_scale", codec.v_scale)
        stream.through(loader.layer(index, look_at_linear), codecs)
        release_memory()
    found = finish_logits(loader.head(look_at_linear)(loader.final_norm()(stream.states())), spec)
    if not torch.equal(found, logits):
        different = (found != logits).any(-1).sum().item()
        raise CheckpointError(
            f"the written files do not give back the model: logits of {different} of {len(logits)} held-out tokens "
            f"differ, by up to {(found - logits).abs().max().item():.3g}; nothing was kept"
        )
    stored = sum(map(written.tensors.nbytes, written.tensors))
    return Verified(scales, len(logits), bits_per_weight(written), layer_bits(written), stored)


def layer_bits(checkpoint: Checkpoint) -> float:
    """True bits per weight of all linears of the layers, those that stay as they were included: what models compare by.

    The head is left out: a tied one is the embedding, and costs a small model more than all of its layers save.
    """
    return bits_per_weight(checkpoint, {x.name for x in checkpoint.spec.linears() if x.name != "lm_head"})


def bits_per_weight(checkpoint: Checkpoint, linears: Collection[str] = ()) -> float:
    """True bits per weight, by the bytes in the files: of `linears`; of the quantized ones, or of all where none is."""
    bits = weights = 0
    names = linears or checkpoint.quant or {linear.name for linear in checkpoint.spec.linears()}
    for linear in checkpoint.spec.linears():
        if linear.name in names and f"{linear.name}.weight" in checkpoint.tensors:
            weights += linear.out_features * linear.in_features
            for leaf in ("weight", "prescale", "lowrank_a", "lowrank_b"):
                if f"{linear.name}.{leaf}" in checkpoint.tensors:
                    bits += 8 * checkpoint.tensors.nbytes(f"{linear.name}.{leaf}")
    return bits / weights

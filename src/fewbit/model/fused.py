"""The forward on an NVIDIA GPU: the same function as `decoder.Decoder`, with linears joined and row-wise work fused.

q, k, v are one product, gate and up another; each RMSNorm reads the residual once, adds, normalizes and rounds; the
residual stays bfloat16 as in the definition. `step.DecodeStep` is the same once more for one token a sequence.

Legend: T tokens, d = hidden, h = heads, kv = key/value heads, D = head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fewbit.model import rope
from fewbit.model.attend import Attend, KVCodec
from fewbit.ops.linear.gpu import FEW, Codes, GpuLinear, Rounding
from fewbit.ops.rows.rows import add_norm, gated, rotate, rounded
from fewbit.spec.decoder import Attention, DecoderSpec, Layer, Rope


class FusedLayer:
    """One layer.

    Args:
        index: its place in the model.
        layer: its shape.
        linears: its products ``qkv``, ``o``, ``gate_up`` and ``down``; gate and up rows interleaved.
        norms: as in `decoder.DecoderLayer`.
    """

    def __init__(self, index: int, layer: Layer, linears: dict[str, GpuLinear], norms: dict[str, Tensor]) -> None:
        self.index, self.layer, self.norms = index, layer, norms
        self.qkv, self.o, self.gate_up, self.down = (linears[name] for name in ("qkv", "o", "gate_up", "down"))


class FusedDecoder:
    """A whole model on one GPU; see `decoder.Decoder` for the attributes."""

    exact = True  # a C compiler has no part in it

    def __init__(
        self,
        spec: DecoderSpec,
        embed: Tensor,
        layers: Sequence[FusedLayer],
        final_norm: Tensor,
        head: GpuLinear,
        codecs: Sequence[KVCodec],
    ) -> None:
        self.spec, self.layers, self.codecs, self.dtype = spec, tuple(layers), tuple(codecs), embed.dtype
        self.embed_weight, self.final_norm, self.head = embed, final_norm, head

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed_weight.device

    def linears(self) -> Iterator[GpuLinear]:
        """Every product."""
        for layer in self.layers:
            yield from (layer.qkv, layer.o, layer.gate_up, layer.down)
        yield self.head

    @torch.inference_mode()
    def hidden(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """The state after the final norm, [T, d], for int64 tokens and positions [T]."""
        count = len(tokens)
        res = self.embed_weight[tokens].to(self.dtype)  # [T, d]
        angles: dict[tuple[Rope, int], tuple[Tensor, Tensor]] = {}
        x: Tensor | None = None
        for layer in self.layers:
            a, norms, kinds = layer.layer.attention, layer.norms, layer.layer.norms
            n = add_norm(x, res, norms["pre_attn"], kinds["pre_attn"].eps, *layer.qkv.wants(count))
            qkv = layer.qkv.product(n)  # [T, (h + 2 kv) D]
            key = a.rope, a.head_dim
            if key not in angles:
                angles[key] = cosines(*key, positions)
            eps = a.qk_norm.eps if a.qk_norm else 0.0
            rotate(qkv, *angles[key], a.heads, a.kv_heads, a.head_dim, norms.get("q_norm"), norms.get("k_norm"), eps)
            seen = attend(layer.index, *split(qkv, a), a).flatten(-2)  # [T, h D]
            y = layer.o.product(_rounded(seen, *layer.o.wants(count)))
            n = add_norm(y, res, norms["pre_mlp"], kinds["pre_mlp"].eps, *layer.gate_up.wants(count))
            x = layer.down.product(gated(layer.gate_up.product(n), *layer.down.wants(count)))
        out = add_norm(x, res, self.final_norm, self.spec.final_norm.eps, None)
        assert isinstance(out, Tensor)
        return out

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[n, d] to float32 [n, vocab]."""
        pieces = [
            self.head.product(_rounded(piece, *self.head.wants(len(piece))), torch.float32)
            for piece in hidden.split(FEW)
        ]
        return torch.cat(pieces)


def _rounded(x: Tensor, rounding: Rounding | None, dtype: torch.dtype | None) -> Tensor | Codes:
    return x if rounding is None else rounded(x, rounding, dtype)


def split(qkv: Tensor, a: Attention) -> tuple[Tensor, Tensor, Tensor]:
    """The q [T, h, D] and k, v [T, kv, D] of qkv, views of qkv [T, (h + 2 kv) D]."""
    heads = qkv.unflatten(-1, (-1, a.head_dim))
    return heads[:, : a.heads], heads[:, a.heads : a.heads + a.kv_heads], heads[:, a.heads + a.kv_heads :]


def cosines(position: Rope, head_dim: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of int64 positions [T], float32 [T, D / 2] each."""
    frequency, sharpen = rope.frequencies(position, head_dim, positions.device)
    angle = positions.float()[:, None] * frequency
    return angle.cos() * sharpen, angle.sin() * sharpen

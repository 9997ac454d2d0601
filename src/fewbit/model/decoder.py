"""The one forward. It reads a `DecoderSpec`; it never asks which family it is, nor who is calling.

Legend: T tokens of one or more sequences laid end to end, d = hidden, h = heads, kv = key/value heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbit.model import rope
from fewbit.model.attend import Attend, KVCodec
from fewbit.ops.linear.dense import same_alone
from fewbit.spec.decoder import MLP, DecoderSpec, Layer, Norm

LinearOp = Callable[[Tensor], Tensor]
"""[T, in] to [T, out]: a kernel with its weights, or whatever a compressor puts in its place."""

_PIECE = 1 << 14


def _alike_anywhere(act: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`act` whose result for a number does not depend on where in a tensor that number lies.

    On a CPU torch takes whole vectors of numbers by one code and what is left at the end of a thread's share by
    another, which differ in the last bit. Rows filled up to whole vectors, in pieces too small to be shared out, leave
    nothing at the end: a token then gets the same numbers alone, in a chunk and in a batch.
    """

    def run(x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return act(x)
        width = x.shape[-1]
        flat = (F.pad(x, (0, more)) if (more := -width % 64) else x).reshape(-1)
        return torch.cat([act(piece) for piece in flat.split(_PIECE)]).view(*x.shape[:-1], -1)[..., :width]

    return run


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": _alike_anywhere(F.silu),
    "gelu": _alike_anywhere(F.gelu),
    "gelu_tanh": _alike_anywhere(lambda x: F.gelu(x, approximate="tanh")),
    "relu": F.relu,
}


def rms_norm(x: Tensor, norm: Norm, weight: Tensor) -> Tensor:
    """Normalize over the last axis, in float32 whatever the dtype of `x`."""
    wide = x.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
    return normal.to(x.dtype) * weight


class DecoderLayer:
    """One layer: attention and MLP around the residual stream.

    Args:
        index: its place in the model.
        layer: its shape.
        linears: the linears by their name in the layer: q, k, v, o, gate, up, down, or experts.0.gate and so on.
        norms: norm weights by name: pre_attn, pre_mlp, and q_norm, k_norm where the layer has them; of a mixture also
            the router [experts, d], which no format rounds either.
    """

    def __init__(self, index: int, layer: Layer, linears: Mapping[str, LinearOp], norms: Mapping[str, Tensor]) -> None:
        self.index, self.layer = index, layer
        self.linears, self.norms = dict(linears), dict(norms)

    def __call__(self, x: Tensor, rotary: rope.Rotary, attend: Attend) -> Tensor:
        """[T, d] to [T, d]."""
        layer = self.layer
        cos, sin = rotary(layer.attention.position, layer.attention.head_dim)
        x = x + self.attention(rms_norm(x, layer.pre_attn, self.norms["pre_attn"]), cos, sin, attend)
        return x + self.mlp(rms_norm(x, layer.pre_mlp, self.norms["pre_mlp"]))

    def attention(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """Attention over a normalized [T, d]."""
        a = self.layer.attention
        q, k, v = (self.linears[n](x).unflatten(-1, (-1, a.head_dim)) for n in "qkv")  # [T, h or kv, head_dim]
        if a.qk_norm:
            q, k = rms_norm(q, a.qk_norm, self.norms["q_norm"]), rms_norm(k, a.qk_norm, self.norms["k_norm"])
        q, k = rope.rotate(q, cos, sin), rope.rotate(k, cos, sin)
        return self.linears["o"](attend(self.index, q, k, v, a).flatten(-2))

    def mlp(self, x: Tensor) -> Tensor:
        """Gated MLP, or the mixture of them, over a normalized [T, d]."""
        m = self.layer.mlp
        if isinstance(m, MLP):
            return self._gated(x, "")
        scores = same_alone(x, self.norms["router"]).float().softmax(-1)  # [T, experts]
        best, chosen = scores.topk(m.top_k, -1)  # [T, k]
        if m.renormalize:
            best = best / best.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for expert in range(m.experts):  # one after another: a token's sum is the same whoever else is there
            rows, place = torch.where(chosen == expert)
            if len(rows):
                y = self._gated(x[rows], f"experts.{expert}.")
                out.index_add_(0, rows, y * best[rows, place, None].to(y.dtype))
        return out

    def _gated(self, x: Tensor, prefix: str) -> Tensor:
        gate, up, down = (self.linears[f"{prefix}{name}"] for name in ("gate", "up", "down"))
        return down(ACTIVATIONS[self.layer.mlp.act](gate(x)) * up(x))


class Decoder:
    """A whole model on one device.

    Attributes:
        spec: its shape.
        device: where it lives.
        dtype: dtype of activations.
        codecs: how each layer's K and V are stored.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        embed: Tensor,
        layers: Sequence[DecoderLayer],
        final_norm: Tensor,
        head: LinearOp,
        codecs: Sequence[KVCodec],
        dtype: torch.dtype,
    ) -> None:
        self.spec, self.layers, self.codecs, self.dtype = spec, tuple(layers), tuple(codecs), dtype
        self.embed_weight, self.final_norm, self.head = embed, final_norm, head

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed_weight.device

    def embed(self, tokens: Tensor) -> Tensor:
        """Int64 [T] to [T, d]."""
        return self.embed_weight[tokens].to(self.dtype)

    @torch.inference_mode()
    def hidden(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """The state after the final norm, [T, d], for int64 tokens and positions [T]."""
        x = self.embed(tokens)
        rotary = rope.Rotary(positions, x.dtype)
        for layer in self.layers:
            x = layer(x, rotary, attend)
        return rms_norm(x, self.spec.final_norm, self.final_norm)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[n, d] to float32 [n, vocab]."""
        return self.head(hidden).float()

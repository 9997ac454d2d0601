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
from fewbit.spec.decoder import MLP, DecoderSpec, Layer, MoE, Norm, Rope

LinearOp = Callable[[Tensor], Tensor]
"""[T, in] to [T, out]: a kernel with its weights, or whatever a compressor puts in its place."""

LayerOp = Callable[[Tensor, rope.Rotary, Attend], Tensor]
"""A layer, or neighbouring ones: [T, d] to [T, d]."""

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


_tanh, _sigmoid = _alike_anywhere(torch.tanh), _alike_anywhere(torch.sigmoid)
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": _alike_anywhere(F.silu),
    "gelu": _alike_anywhere(F.gelu),
    "gelu_tanh": _alike_anywhere(lambda x: F.gelu(x, approximate="tanh")),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "swish1702": _alike_anywhere(lambda x: x * torch.sigmoid(x * 1.702)),
}


def normalize(x: Tensor, norm: Norm, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Normalize over the last axis, in float32 whatever the dtype of `x`."""
    wide = x.float()
    if norm.kind == "layer":
        wide = wide - wide.mean(-1, keepdim=True)
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
    if norm == Norm(norm.eps):
        return normal.to(x.dtype) * weight
    normal = normal * (weight.float() + 1 if norm.plus_one else weight.float())
    return (normal if bias is None else normal + bias.float()).to(x.dtype)


class Normalize:
    """`normalize` with its weights."""

    def __init__(self, norm: Norm, weight: Tensor, bias: Tensor | None = None) -> None:
        self.norm, self.weight, self.bias = norm, weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        """[..., d] to [..., d]."""
        return normalize(x, self.norm, self.weight, self.bias)


class Embedding:
    """Tokens to the state before the first layer.

    Args:
        weight: [vocab, d].
        scale: what its rows are multiplied by, once rounded to their dtype as all implementations do.
        table: [positions, d], added by position; None: nothing is.
    """

    def __init__(self, weight: Tensor, scale: float = 1.0, table: Tensor | None = None) -> None:
        self.weight, self.table = weight, table
        self.scale = torch.tensor(scale, dtype=weight.dtype).item()

    def __call__(self, tokens: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """Int64 tokens and positions [T] to [T, d]."""
        x = self.weight[tokens].to(dtype)
        if self.scale != 1.0:
            x = x * self.scale
        return x if self.table is None else x + self.table[positions].to(dtype)


def finish_logits(logits: Tensor, spec: DecoderSpec) -> Tensor:
    """What the head made, as float32 logits."""
    cap = spec.logit_softcap
    return logits.float() if cap is None else cap * _tanh(logits.float() / cap)


class DecoderLayer:
    """One layer: attention and MLP around the residual stream.

    Args:
        index: its place in the model.
        layer: its shape.
        linears: the linears by their name in the layer: q, k, v, o, gate, up, down, or experts.0.gate and so on.
        norms: what else it has, by `fewbit.spec.decoder.key_of`: weights (and biases) of norms, the router [experts, d]
            of a mixture, sinks. No format rounds these.
    """

    def __init__(self, index: int, layer: Layer, linears: Mapping[str, LinearOp], norms: Mapping[str, Tensor]) -> None:
        self.index, self.layer = index, layer
        self.linears, self.norms = dict(linears), dict(norms)

    def __call__(self, x: Tensor, rotary: rope.Rotary, attend: Attend) -> Tensor:
        """[T, d] to [T, d]."""
        layer = self.layer
        before = self._norm("pre_attn", x)
        seen = self._norm("post_attn", self.attention(before, rotary, attend))
        if layer.one_input:
            return x + seen + self.mlp(before)
        if layer.parallel:
            return x + seen + self.mlp(self._norm("pre_mlp", x))
        x = x + seen
        return x + self._norm("post_mlp", self.mlp(self._norm("pre_mlp", x)))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        norm = self.layer.norms.get(name)
        return normalize(x, norm, self.norms[name], self.norms.get(f"{name}.bias")) if norm else x

    def attention(self, x: Tensor, rotary: rope.Rotary, attend: Attend) -> Tensor:
        """Attention over a normalized [T, d]."""
        a = self.layer.attention
        q, k, v = (self.linears[n](x) for n in "qkv")  # [T, h or kv * head_dim]
        if a.qk_norm and a.qk_norm_all:
            q, k = self._qk_norm(q, k, a.qk_norm)
        q, k, v = (y.unflatten(-1, (-1, a.head_dim)) for y in (q, k, v))
        if a.qk_norm and not a.qk_norm_all:
            q, k = self._qk_norm(q, k, a.qk_norm)
        if isinstance(a.position, Rope):
            cos, sin = rotary(a.position, a.head_dim)
            q, k = (rope.rotate(y, cos, sin, a.position.interleaved) for y in (q, k))
        return self.linears["o"](attend(self.index, q, k, v, a, self.norms.get("sinks")).flatten(-2))

    def _qk_norm(self, q: Tensor, k: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        return normalize(q, norm, self.norms["q_norm"]), normalize(k, norm, self.norms["k_norm"])

    def mlp(self, x: Tensor) -> Tensor:
        """MLP, or the mixture of them, over a normalized [T, d]."""
        m = self.layer.mlp
        if isinstance(m, MLP):
            return self._one_mlp(x, m, "")
        scores = same_alone(x, self.norms["router"], self.norms.get("router.bias")).float().softmax(-1)  # [T, experts]
        best, chosen = scores.topk(m.top_k, -1)  # [T, k]
        if m.renormalize:
            best = best / best.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for expert in range(m.experts):  # one after another: a token's sum is the same whoever else is there
            rows, place = torch.where(chosen == expert)
            if len(rows):
                y = self._one_mlp(x[rows], m.expert, f"experts.{expert}.")
                out.index_add_(0, rows, y * best[rows, place, None].to(y.dtype))
        return out if m.shared is None else out + self._shared(x, m)

    def _shared(self, x: Tensor, m: MoE) -> Tensor:
        assert m.shared is not None
        y = self._one_mlp(x, m.shared, "shared.")
        return y * _sigmoid(same_alone(x, self.norms["shared_gate"])) if m.shared_gate else y

    def _one_mlp(self, x: Tensor, m: MLP, prefix: str) -> Tensor:
        act, up, down = ACTIVATIONS[m.act], self.linears[f"{prefix}up"], self.linears[f"{prefix}down"]
        if not m.gated:
            return down(act(up(x)))
        gate, plain = self.linears[f"{prefix}gate"](x), up(x)
        if m.limit is not None:
            gate, plain = gate.clamp(max=m.limit), plain.clamp(-m.limit, m.limit) + 1
        return down(act(gate) * plain)


class Decoder:
    """A whole model on one device.

    Attributes:
        spec: its shape.
        device: where it lives.
        dtype: dtype of activations.
        codecs: how each layer's K and V are stored.
        exact: its numbers do not depend on a compiler's being there; attention keeps to that, too.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        embed: Embedding,
        layers: Sequence[LayerOp],
        final_norm: LinearOp,
        head: LinearOp,
        codecs: Sequence[KVCodec],
        dtype: torch.dtype,
        exact: bool = True,
    ) -> None:
        self.exact = exact
        self.spec, self.layers, self.codecs, self.dtype = spec, tuple(layers), tuple(codecs), dtype
        self.embed, self.final_norm, self.head = embed, final_norm, head

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed.weight.device

    @torch.inference_mode()
    def hidden(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """The state after the final norm, [T, d], for int64 tokens and positions [T]."""
        x = self.embed(tokens, positions, self.dtype)
        rotary = rope.Rotary(positions, x.dtype)
        for layer in self.layers:
            x = layer(x, rotary, attend)
        return self.final_norm(x)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[n, d] to float32 [n, vocab]."""
        return finish_logits(self.head(hidden), self.spec)

"""A decoder layer on a CPU: what `decoder.DecoderLayer` computes, in two calls of C and one of attention."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fewbit.model import rope
from fewbit.model.attend import Attend
from fewbit.ops.cpu.layer import Halves
from fewbit.ops.linear.cpu import Prepared
from fewbit.spec.decoder import Layer, Rope


class CpuLayer:
    """One layer; arguments as of `DecoderLayer`, its linears as `Cpu.prepare` gave them.

    Which layers can: `fewbit.model.load.Loader.cpu_why_not`.
    """

    def __init__(self, index: int, layer: Layer, linears: Mapping[str, Prepared], norms: Mapping[str, Tensor]) -> None:
        assert isinstance(layer.attention.position, Rope)
        assert layer.pre_attn
        assert layer.pre_mlp
        self.index, self.layer = index, layer
        self._position, self._a = layer.attention.position, layer.attention
        qk_eps = self._a.qk_norm.eps if self._a.qk_norm else 0.0
        self._halves = Halves(linears, norms, (layer.pre_attn.eps, layer.pre_mlp.eps, qk_eps), self._a.head_dim)

    def __call__(self, x: Tensor, rotary: rope.Rotary, attend: Attend) -> Tensor:
        """[T, d] to [T, d], float32."""
        q, k, v = self._halves.before(x, *rotary(self._position, self._a.head_dim))
        return self._halves.after(x, attend(self.index, q, k, v, self._a))

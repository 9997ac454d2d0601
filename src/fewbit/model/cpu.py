"""Decoder layers on a CPU, in C: what `decoder.DecoderLayer` computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from fewbit.model import rope
from fewbit.model.attend import Attend, InPages
from fewbit.ops.cpu.layer import Halves, Stack
from fewbit.ops.linear.cpu import Prepared
from fewbit.spec.decoder import Layer, Rope


class CpuLayer:
    """One layer, in two calls and one of attention; arguments as of `DecoderLayer`, linears as `Cpu.prepare` gave them.

    Which layers can: `fewbit.model.load.Loader.cpu_why_not`.
    """

    def __init__(self, index: int, layer: Layer, linears: Mapping[str, Prepared], norms: Mapping[str, Tensor]) -> None:
        assert isinstance(layer.attention.position, Rope)
        assert layer.pre_attn
        assert layer.pre_mlp
        self.index, self.layer = index, layer
        self._position, self._a = layer.attention.position, layer.attention
        qk_eps = self._a.qk_norm.eps if self._a.qk_norm else 0.0
        self.halves = Halves(linears, norms, (layer.pre_attn.eps, layer.pre_mlp.eps, qk_eps), self._a.head_dim)

    def angles(self, rotary: rope.Rotary) -> tuple[Tensor, Tensor]:
        """Cosines and sines of its positions, each [T, 1, head_dim]."""
        return rotary(self._position, self._a.head_dim)

    def __call__(self, x: Tensor, rotary: rope.Rotary, attend: Attend) -> Tensor:
        """[T, d] to [T, d], float32."""
        q, k, v = self.halves.before(x, *self.angles(rotary))
        return self.halves.after(x, attend(self.index, q, k, v, self._a))


class CpuLayers:
    """Layers one after another, all in one call where K and V lie in pages, else layer by layer."""

    def __init__(self, layers: Sequence[CpuLayer]) -> None:
        self.layers = tuple(layers)
        self._stack = Stack([layer.halves for layer in layers])

    def __call__(self, x: Tensor, rotary: rope.Rotary, attend: Attend) -> Tensor:
        """[T, d] to [T, d], float32."""
        if isinstance(attend, InPages) and (paged := attend.in_pages([layer.index for layer in self.layers])):
            return self._stack(x, [layer.angles(rotary) for layer in self.layers], *paged)
        for layer in self.layers:
            x = layer(x, rotary, attend)
        return x

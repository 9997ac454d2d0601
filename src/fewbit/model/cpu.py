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
        self._a = layer.attention
        self.turned = layer.attention.position, layer.attention.head_dim  # what cosines and sines depend on
        qk_eps = self._a.qk_norm.eps if self._a.qk_norm else 0.0
        self.halves = Halves(linears, norms, (layer.pre_attn.eps, layer.pre_mlp.eps, qk_eps), self._a.head_dim)

    def __call__(self, x: Tensor, rotary: rope.Rotary, attend: Attend) -> Tensor:
        """[T, d] to [T, d], float32."""
        q, k, v = self.halves.before(x, *rotary(*self.turned))
        return self.halves.after(x, attend(self.index, q, k, v, self._a))


class CpuLayers:
    """Layers one after another, all in one call where K and V lie in pages, else layer by layer."""

    def __init__(self, layers: Sequence[CpuLayer]) -> None:
        self.layers = tuple(layers)
        self._stack = Stack([layer.halves for layer in layers])
        self._indices = [layer.index for layer in layers]
        kinds = list(dict.fromkeys(layer.turned for layer in layers))
        self._kinds, self._kind_of = kinds, [kinds.index(layer.turned) for layer in layers]

    def __call__(self, x: Tensor, rotary: rope.Rotary, attend: Attend) -> Tensor:
        """[T, d] to [T, d], float32."""
        if isinstance(attend, InPages) and (paged := attend.in_pages(self._indices)):
            angles = [rotary(*kind) for kind in self._kinds]
            return self._stack(x, [angles[kind] for kind in self._kind_of], *paged)
        for layer in self.layers:
            x = layer(x, rotary, attend)
        return x

"""The tensors of a model as another format wants them: most as they are, some rounded anew."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fewbit.checkpoint.checkpoint import Checkpoint
from fewbit.numerics.element import Element
from fewbit.numerics.format import ALL, Format
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.quantspec import KVSpec, QuantSpec
from fewbit.numerics.reference import amax_scale, input_scale, outer_scale, quantize

if TYPE_CHECKING:
    from fewbit.spec.decoder import LinearShape

_OF_LINEARS = ("input_scale", "prescale", "lowrank_a", "lowrank_b")


class Rounding:
    """The tensors of `source` under the numerics `quant` and `kv`, by canonical name, made anew on every call.

    Args:
        source: the model.
        quant: QuantSpec by linear, as wanted.
        kv: KVSpec by layer, as wanted.
        rounded: linears that are rounded anew; the others say the same as in the source.
        together: linears that need one scale, or outer scale, of the whole weight.
        inputs: linears that need one calibrated scale of their input.
    """

    def __init__(
        self,
        source: Checkpoint,
        quant: Mapping[str, QuantSpec],
        kv: Mapping[int, KVSpec],
        rounded: Collection[str],
        together: Collection[tuple[str, ...]] = (),
        inputs: Collection[tuple[str, ...]] = (),
    ) -> None:
        self.source, self.quant, self.kv, self.rounded = source, quant, kv, rounded
        self._together = {name: group for group in together for name in group}
        self._inputs = {name: group for group in inputs for name in group}
        self._scales: dict[tuple[str, ...], Tensor] = {}
        self._groups: dict[str, list[LinearShape]] = {}
        for linear in source.spec.linears():
            self._groups.setdefault(linear.shares_input or linear.name, []).append(linear)
        self._group_of = {linear.name: group for group in self._groups.values() for linear in group}

    def names(self) -> Iterator[str]:
        """Canonical names of all tensors, in the order of a forward pass."""
        for name in self.source.tensors:
            owner, _, leaf = name.rpartition(".")
            quant = self.quant.get(owner)
            if leaf in _OF_LINEARS and quant is not None:
                wanted = {"input_scale": quant.calibrated, "prescale": quant.prescale}.get(leaf, bool(quant.lowrank))
                if not wanted:
                    continue
            if leaf == "wide_scale" and (quant is None or owner in self.rounded):
                continue
            yield name

    def is_new(self, name: str) -> bool:
        """Whether a tensor is not the source's."""
        owner, _, leaf = name.rpartition(".")
        if leaf in ("k_scale", "v_scale"):
            layer = int(owner.split(".")[1])
            return self.kv[layer] != self.source.kv[layer]
        if leaf == "input_scale":
            return owner in self._inputs or (
                owner in self.rounded and self.quant[owner].input != self.source.quant[owner].input
            )
        return leaf == "weight" and (owner in self._together or self._reweighed(owner))

    def _reweighed(self, owner: str) -> bool:
        """Whether the weight of a linear is rounded anew, not only its input."""
        if owner not in self.rounded:
            return False
        was, wanted = self.source.quant[owner], self.quant[owner]
        return (was.weight, was.prescale, was.lowrank) != (wanted.weight, wanted.prescale, wanted.lowrank)

    def tensor(self, name: str) -> Tensor | QTensor:
        """One tensor as it is wanted."""
        owner, _, leaf = name.rpartition(".")
        if leaf in ("k_scale", "v_scale"):
            return self._kv_scale(int(owner.split(".")[1]), name)
        if owner not in self.quant or leaf not in ("weight", "input_scale"):
            return self.source.tensors[name]
        if leaf == "input_scale":
            group = self._inputs.get(owner, (owner,))
            return torch.stack([self._input_scale(member) for member in group]).amax(0)
        if owner in self._together:
            return self._round_together(owner, self._together[owner])
        return self._alone(owner)

    def _alone(self, owner: str) -> QTensor:
        """The weight of a linear that shares nothing."""
        if self._reweighed(owner):
            return self._round(owner)
        tensor, wanted = self.source.tensors[f"{owner}.weight"], self.quant[owner].weight
        assert isinstance(tensor, QTensor)
        assert wanted is not None
        scale = tensor.scale if isinstance(wanted.scale, Element) else tensor.scale.to(wanted.scale)
        return replace(tensor, format=wanted, scale=scale)

    def _value(self, owner: str) -> Tensor:
        """What a linear multiplies its input by, all scales and branches counted: float32 [out, in]."""
        tensor, was = self.source.tensors[f"{owner}.weight"], self.source.quant[owner]
        value = tensor.dequantize() if isinstance(tensor, QTensor) else tensor.float()
        if was.prescale and not self.quant[owner].prescale:
            value = value * self.source.tensors.dense(f"{owner}.prescale").float()
        if was.lowrank and not self.quant[owner].lowrank:
            a, b = (self.source.tensors.dense(f"{owner}.lowrank_{x}").float() for x in "ab")
            value = value + b @ a
        return value

    def _round(self, owner: str) -> QTensor:
        fmt = self.quant[owner].weight
        assert fmt is not None
        outer = None
        if fmt.outer:  # one for all that read the same input
            amax = torch.stack([self._value(x.name).abs().amax() for x in self._siblings(owner)]).amax()
            outer = outer_scale(amax, fmt)
        return quantize(self._value(owner), fmt, outer=outer)

    def _round_together(self, owner: str, group: tuple[str, ...]) -> QTensor:
        """A weight under the largest scale of its group; the one that has it keeps its codes."""
        alone = self._alone(owner)
        if group not in self._scales:
            self._scales = {group: torch.stack([whole_scale(self._alone(member)) for member in group]).amax(0)}
        scale = self._scales[group]
        if torch.equal(whole_scale(alone), scale):
            return alone
        if alone.format.outer:
            return quantize(self._value(owner), alone.format, outer=scale)
        return quantize(self._value(owner), alone.format, scale=scale)

    def _siblings(self, owner: str) -> list[LinearShape]:
        """The linears rounded to the same numerics that read the same input, itself among them."""
        same = self.quant[owner].weight
        return [x for x in self._group_of[owner] if self._reweighed(x.name) and self.quant[x.name].weight == same]

    def _input_scale(self, owner: str) -> Tensor:
        was, wanted = self.source.quant[owner].input, self.quant[owner].input
        scale = self.source.tensors.dense(f"{owner}.input_scale")
        if was == wanted:
            return scale
        assert was is not None
        assert wanted is not None
        return input_scale(scale * _reach(was), wanted)

    def _kv_scale(self, layer: int, name: str) -> Tensor:
        which = name[-len("k_scale")]
        was, wanted = (getattr(kv[layer], which) for kv in (self.source.kv, self.kv))
        scale = self.source.tensors.dense(name)
        if was == wanted:
            return scale
        amax = scale.float() * _reach(was)
        heads = self.source.spec.layers[layer].attention.kv_heads
        amax = amax.amax() if wanted.block == (ALL, ALL) else amax.expand(heads)
        return amax_scale(amax, wanted)


def whole_scale(q: QTensor) -> Tensor:
    """The scale of a whole weight: the outer one, or the only one."""
    if q.outer is not None:
        return q.outer
    assert q.scale.numel() == 1
    return q.scale


def _reach(fmt: Format) -> float:
    """The largest magnitude under a calibrated scale of 1; see `amax_scale` and `outer_scale`."""
    element = fmt.element
    if fmt.outer:
        assert isinstance(fmt.scale, Element)
        return element.max * fmt.scale.max
    return (element.max - element.min) / 2 if element.integer else element.max

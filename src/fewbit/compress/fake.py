"""Fake quantizers: layers that compute with rounded weights and inputs, and learn as if nothing was rounded.

A `FakeLinear` or `FakeConv2d` keeps its float weight as the parameter that it was. Every forward pass rounds it under
scales that were chosen once, and the input as the QuantSpec says. The gradient goes straight through the rounding, also
where a number was clipped (Y. Bengio, N. Léonard, A. Courville, arXiv:1308.3432). Which layers become fake quantizers,
and with which scales, is `module.py`'s business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbit.numerics.qtensor import QTensor, uncoded
from fewbit.numerics.quantspec import QuantSpec
from fewbit.numerics.reference import round_to
from fewbit.ops.linear.problem import round_input

BUFFERS = ("weight_scale", "weight_outer", "weight_zero", "input_scale", "prescale")
"""What a fake quantizer holds beside its weight; those that its formats do not have are None."""


class _StraightThrough(torch.autograd.Function):
    """``rounding(x)``, whose gradient is taken to be that of ``x``."""

    @staticmethod
    def forward(x: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
        return rounding(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def straight_through(x: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """``rounding(x)``, bit for bit; gradients pass as if nothing had been done to `x`."""
    rounded: Tensor = _StraightThrough.apply(x, rounding)  # type: ignore[no-untyped-call]
    return rounded


class FakeQuant(nn.Module):
    """What fake quantizers of all kinds of layers have in common.

    Attributes:
        quant: the numerics.
        origin: name and text of the recipe that made it.
        weight: the float weight, under which name and shape it always was.
        weight_scale, weight_outer, weight_zero: as in `QTensor`, of the weight as [out, in].
        input_scale: float32 [], the calibrated scale of the input, or the outer one of block-scaled inputs.
        prescale: [in], what the input is multiplied by before it is rounded; the weight's columns are divided by it.
    """

    quant: QuantSpec
    origin: tuple[str, str]
    weight: Tensor
    weight_scale: Tensor
    weight_outer: Tensor | None
    weight_zero: Tensor | None
    input_scale: Tensor | None
    prescale: Tensor | None

    def scales(self) -> QTensor:
        """The weight's scales, without codes."""
        assert self.quant.weight is not None
        return uncoded(self.quant.weight, self.weight_scale, self.weight_outer, self.weight_zero)

    def quantized(self) -> QTensor:
        """The weight as codes and scales, [out, in]."""
        return self._round(matrix(self).detach())

    def rounded_weight(self) -> Tensor:
        """The weight that the product sees, in its own shape and dtype; gradients go to the float weight."""
        return straight_through(self.weight, lambda w: self._round(w.flatten(1)).dequantize(w.dtype).view_as(w))

    def rounded_input(self, x: Tensor) -> Tensor:
        """The input that the product sees, [..., in]."""
        if self.prescale is not None:
            x = x * self.prescale.to(x.dtype)
        if self.quant.input is None:
            return x
        return straight_through(x, lambda x: round_input(x, self.quant, self.input_scale, None))

    def extra_repr(self) -> str:
        """The layer's own, and the numerics."""
        return f"{super().extra_repr()}, {self.quant}{', prescaled inputs' if self.quant.prescale else ''}"

    def _round(self, weight: Tensor) -> QTensor:
        return round_to(weight.float(), self.scales())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FakeQuant:
        """Moves to another device or dtype; scales keep the dtype that the format gives them."""
        kept = {name: self._buffers[name] for name in BUFFERS}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in kept.items():
            self._buffers[name] = None if tensor is None else tensor.to(self.weight.device)
        return self


class FakeLinear(FakeQuant, nn.Linear):
    """A linear layer with a fake quantizer."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return F.linear(self.rounded_input(input), self.rounded_weight(), self.bias)


class FakeConv2d(FakeQuant, nn.Conv2d):
    """A convolution with a fake quantizer: a linear layer over patches of the image, its weight [out, in * kh * kw]."""

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] or [C, H, W] to the same with other C, H and W."""
        if self.prescale is None and (self.quant.input is None or self.quant.input_scale == "static"):
            # one number rounds all alike, wherever in a patch it stands: no patches are needed
            done: Tensor = self._conv_forward(self.rounded_input(input), self.rounded_weight(), self.bias)
            return done
        image = input if input.ndim == 4 else input[None]
        rows = self.rounded_input(patches(self, image))  # [N, L, groups, columns]
        weight = self.rounded_weight().flatten(1).unflatten(0, (self.groups, -1))
        out: Tensor = torch.einsum("nlgc,goc->ngol", rows, weight).flatten(1, 2)
        if self.bias is not None:
            out = out + self.bias[:, None]
        out = out.unflatten(-1, _places(self, image))
        return out if input.ndim == 4 else out[0]


KINDS: dict[type[nn.Module], type[FakeQuant]] = {nn.Linear: FakeLinear, nn.Conv2d: FakeConv2d}
"""Layers that can be quantized, exactly these classes: what a subclass computes with its weight is not known."""


def install(
    layer: nn.Module, quant: QuantSpec, origin: tuple[str, str], buffers: dict[str, Tensor | None]
) -> FakeQuant:
    """Turn `layer`, where it is, into a fake quantizer.

    It stays the same object with the same parameters: who holds it, its hooks and its optimizer stay right.

    Args:
        layer: a layer of a class in `KINDS`.
        quant: its numerics.
        origin: name and text of the recipe.
        buffers: those of `BUFFERS` that it has.
    """
    layer.__class__ = KINDS[type(layer)]
    assert isinstance(layer, FakeQuant)
    layer.quant = replace(quant, prescale=buffers.get("prescale") is not None)
    layer.origin = origin
    for name in BUFFERS:
        layer.register_buffer(name, buffers.get(name))
    # modules that pass raw weights of their layers to a fused kernel (nn.TransformerEncoderLayer) leave it at calling
    # the layers if these have hooks
    layer.register_forward_pre_hook(_nothing)
    return layer


def layers(module: nn.Module) -> dict[str, nn.Module]:
    """The layers that could be quantized, and those that are, by their names in the module."""
    kinds = (*KINDS, *KINDS.values())
    return {name: m for name, m in module.named_modules() if type(m) in kinds}


def _nothing(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
    """A hook that does nothing."""


def matrix(layer: nn.Module) -> Tensor:
    """The weight of a layer as [out, in]."""
    assert isinstance(layer.weight, Tensor)
    return layer.weight.flatten(1)


def rows_of(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer multiplies its weight [out, in] by when it is given `x`: [..., in]."""
    if isinstance(layer, nn.Conv2d):
        return patches(layer, x if x.ndim == 4 else x[None])
    return x


def patches(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The patches of [N, C, H, W] that a convolution sees: [N, L, groups, in / groups * kh * kw], L places."""
    unfolded = F.unfold(_padded(conv, x), conv.kernel_size, conv.dilation, 0, conv.stride)
    found: Tensor = unfolded.unflatten(1, (conv.groups, -1)).permute(0, 3, 1, 2)
    return found


def _padded(conv: nn.Conv2d, x: Tensor) -> Tensor:
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(x, conv._reversed_padding_repeated_twice, mode)


def _places(conv: nn.Conv2d, x: Tensor) -> tuple[int, int]:
    """Height and width of what comes out."""
    padding = conv._reversed_padding_repeated_twice  # left, right, top, bottom
    size = (x.shape[-2] + padding[2] + padding[3], x.shape[-1] + padding[0] + padding[1])
    spans = [d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    height, width = ((s - span) // step + 1 for s, span, step in zip(size, spans, conv.stride, strict=True))
    return height, width


def pattern_of(name: str) -> str:
    """``model.layers.3.mlp.up_proj`` to ``model.layers.*.mlp.up_proj``."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def quantizers(module: nn.Module) -> str:
    """A table of a module's layers and their quantizers, numbers in names as ``*``: one line for those that are alike.

    Beside the numerics it gives how many layers there are and the range of their weight and input scales, outer scales
    included. A scale times the largest number of its format (127.5 for INT8, 448 for FP8 (E4M3)) is a magnitude.
    """
    groups: dict[tuple[str, ...], list[nn.Module]] = {}
    for name, layer in layers(module).items():
        kind = (
            (str(layer.quant.weight), _input_words(layer.quant)) if isinstance(layer, FakeQuant) else ("as it was", "")
        )
        groups.setdefault((pattern_of(name) or "(the module)", *kind), []).append(layer)
    rows = [["layers", "count", "weights", "weight scales", "inputs", "input scales"]]
    for (pattern, weight, given), alike in groups.items():
        fakes = [layer for layer in alike if isinstance(layer, FakeQuant)]
        scales = [layer.scales().scales() for layer in fakes]
        inputs = [layer.input_scale for layer in fakes if layer.input_scale is not None]
        rows.append([pattern, str(len(alike)), weight, _range(scales), given, _range(inputs)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _input_words(quant: QuantSpec) -> str:
    words = "as they come" if quant.input is None else f"{quant.input} ({quant.input_scale})"
    return f"prescaled, {words}" if quant.prescale else words


def _range(scales: Sequence[Tensor]) -> str:
    if not scales:
        return ""
    low, high = min(float(s.amin()) for s in scales), max(float(s.amax()) for s in scales)
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"

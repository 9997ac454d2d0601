"""Decoder layers in C, in halves around an attention or whole, all in one call: `layer.h` says what is computed."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fewbit.ops.attention.cpu import PagedLayer, Spans
from fewbit.ops.cpu.build import Library, library
from fewbit.ops.linear.cpu import Prepared

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")


class _Layer(ctypes.Structure):
    """`Layer` of layer.h."""

    _fields_ = (
        ("linears", ctypes.c_void_p * len(LINEARS)),
        *((name, ctypes.c_void_p) for name in ("pre_attn", "pre_mlp", "q_norm", "k_norm")),
        *((name, ctypes.c_float) for name in ("attn_eps", "mlp_eps", "qk_eps")),
        ("head_dim", ctypes.c_int32),
    )


class Normalize:
    """An RMSNorm.

    Args:
        weight: [d].
        eps: what is added to the mean of squares.
        variant: the instruction set; None: the best that this processor has.
    """

    def __init__(self, weight: Tensor, eps: float, variant: str | None = None) -> None:
        built = library()
        assert isinstance(built, Library)
        self._call, self._weight, self._eps = built.call("normalize", variant), weight.float().contiguous(), eps

    def __call__(self, x: Tensor) -> Tensor:
        """[T, d] to [T, d], float32."""
        x = x.contiguous()
        y = torch.empty_like(x)
        self._call(x.data_ptr(), *x.shape, self._weight.data_ptr(), self._eps, y.data_ptr())
        return y


class Halves:
    """A layer with plain RMSNorms before attention and MLP, rotary positions over half heads, and a gated SiLU.

    Args:
        linears: what `Cpu.prepare` gave for each of `LINEARS`.
        norms: weights of ``pre_attn`` and ``pre_mlp`` [d], and of ``q_norm`` and ``k_norm`` [head_dim] if there.
        eps: of ``pre_attn``, ``pre_mlp``, and of the norm of q and k.
        head_dim: channels of a head.
        variant: the instruction set; None: the best that this processor has.
    """

    def __init__(
        self,
        linears: Mapping[str, Prepared],
        norms: Mapping[str, Tensor],
        eps: tuple[float, float, float],
        head_dim: int,
        variant: str | None = None,
    ) -> None:
        built = library()
        assert isinstance(built, Library)
        self._before, self._after = (built.call(name, variant) for name in ("before", "after"))
        self._head_dim = head_dim
        self._rows = [linears[name].linear.n for name in LINEARS]
        norms = {name: weight.float().contiguous() for name, weight in norms.items()}
        pointers = (norms[n].data_ptr() if n in norms else None for n in ("pre_attn", "pre_mlp", "q_norm", "k_norm"))
        addresses = (ctypes.c_void_p * len(LINEARS))(*(linears[name].address for name in LINEARS))
        self._layer = _Layer(addresses, *pointers, *eps, head_dim)
        self.address = ctypes.addressof(self._layer)
        self._held = dict(linears), norms  # what it points to

    def before(self, x: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v [T, heads, head_dim] of x [T, d], float32; angles [T, 1, head_dim]."""
        x, t, dim = x.contiguous(), len(x), self._head_dim
        q, k, v = (x.new_empty(t, rows // dim, dim) for rows in self._rows[:3])
        self._run(self._before, *(tensor.data_ptr() for tensor in (x, cosines, sines, q, k, v)), t)
        return q, k, v

    def after(self, x: Tensor, seen: Tensor) -> Tensor:
        """The layer's output [T, d], of its input and of what attention saw [T, heads, head_dim], float32."""
        x, seen = x.contiguous(), seen.contiguous()  # names keep a copy alive until C has read it
        y = torch.empty_like(x)
        self._run(self._after, x.data_ptr(), seen.data_ptr(), y.data_ptr(), len(x))
        return y

    def _run(self, call: Callable[..., int], *arguments: int) -> None:
        if call(self.address, *arguments, torch.get_num_threads()):
            raise MemoryError(f"no memory for a layer over {arguments[-1]} tokens")


class Stack:
    """Layers one after another, each with its attention over pages between its halves: one call of C.

    Args:
        layers: their halves.
        variant: the instruction set; None: the best that this processor has.
    """

    def __init__(self, layers: Sequence[Halves], variant: str | None = None) -> None:
        built = library()
        assert isinstance(built, Library)
        self._call = built.call("layers", variant)
        self._layers = (ctypes.c_void_p * len(layers))(*(layer.address for layer in layers))
        self._held = list(layers)  # what it points to

    def __call__(
        self, x: Tensor, angles: Sequence[tuple[Tensor, Tensor]], attentions: Sequence[PagedLayer], spans: Spans
    ) -> Tensor:
        """[T, d] to [T, d], float32; of each layer cosines and sines [T, 1, head_dim] and its attention."""
        y, pointers = x.clone(memory_format=torch.contiguous_format), ctypes.c_void_p * len(self._layers)
        cosines, sines = (pointers(*(t.data_ptr() for t in each)) for each in zip(*angles, strict=True))
        paged = pointers(*(attention.address for attention in attentions))
        arguments = self._layers, paged, cosines, sines, len(self._layers), spans.address, y.data_ptr()
        if self._call(*arguments, torch.get_num_threads()):
            raise MemoryError(f"no memory for a step of {len(x)} tokens")
        return y

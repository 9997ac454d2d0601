"""The seam between the forward and where K and V live.

The decoder hands q, k and v of a layer to an `Attend` and gets the attention's output. `DenseAttend` keeps nothing
(calibration, evaluation); the engine brings a paged one. Both store K and V through a `KVCodec`, so a quantized cache
means the same numbers everywhere.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fewbit.numerics.format import Format
from fewbit.numerics.pack import pack_nibbles, unpack_nibbles
from fewbit.numerics.quantspec import KVSpec
from fewbit.ops.attention import attention
from fewbit.ops.attention.cpu import PagedLayer, Spans
from fewbit.spec.decoder import Attention


class Attend(Protocol):
    """What a decoder layer calls.

    q: [tokens, heads, head_dim]; k, v: [tokens, kv_heads, head_dim], rotated; sinks: [heads], of layers that have some.
    """

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, a: Attention, sinks: Tensor | None = None
    ) -> Tensor:
        """Attention output, [tokens, heads, head_dim]."""
        ...


class InPages(Attend):
    """An `Attend` over pages, which layers in C read by themselves."""

    @abstractmethod
    def in_pages(self, layers: Sequence[int]) -> tuple[Sequence[PagedLayer], Spans] | None:
        """The attention of some layers, and the step; None: C does not know that of one of them."""


@dataclass(frozen=True)
class KVCodec:
    """How one layer's K and V are stored.

    Attributes:
        dtype: what an unquantized cache keeps (the checkpoint's dtype).
        spec: the formats of a quantized cache, else None.
        k_scale, v_scale: float32, [] or [kv_heads].
    """

    dtype: torch.dtype
    spec: KVSpec | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    @property
    def stored_dtype(self) -> torch.dtype:
        """What the cache tensors are made of: raw codes (uint8) if quantized."""
        return torch.uint8 if self.spec else self.dtype

    def stored_width(self, head_dim: int) -> int:
        """How many of them a head takes: codes of four bits lie two in a byte."""
        return head_dim // 2 if self.spec and self.spec.k.element.bits == 4 else head_dim

    def store(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """K and V [tokens, kv_heads, head_dim] as the cache keeps them."""
        if self.spec is None:
            return k.to(self.dtype), v.to(self.dtype)
        assert self.k_scale is not None
        assert self.v_scale is not None
        return _encode(k, self.spec.k, self.k_scale), _encode(v, self.spec.v, self.v_scale)

    def load(self, k: Tensor, v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Stored K and V as numbers of `dtype`."""
        if self.spec is None:
            return k.to(dtype), v.to(dtype)
        assert self.k_scale is not None
        assert self.v_scale is not None
        return _decode(k, self.spec.k, self.k_scale, dtype), _decode(v, self.spec.v, self.v_scale, dtype)


def _encode(x: Tensor, fmt: Format, scale: Tensor) -> Tensor:
    codes = fmt.element.encode(x.float() / scale[..., None])
    return pack_nibbles(codes) if fmt.element.bits == 4 else codes


def _decode(codes: Tensor, fmt: Format, scale: Tensor, dtype: torch.dtype) -> Tensor:
    codes = unpack_nibbles(codes) if fmt.element.bits == 4 else codes
    return (fmt.element.decode(codes) * scale[..., None]).to(dtype)


class DenseAttend:
    """Attention within sequences of one length, laid end to end; nothing is kept.

    K and V still pass through the codec of their layer, as they would through a cache.
    """

    def __init__(self, codecs: Sequence[KVCodec], length: int) -> None:
        self.codecs, self.length = codecs, length

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, a: Attention, sinks: Tensor | None = None
    ) -> Tensor:
        """See `Attend`."""
        codec = self.codecs[layer]
        k, v = codec.load(*codec.store(k, v), q.dtype)
        q, k, v = (x.unflatten(0, (-1, self.length)) for x in (q, k, v))
        return attention(q, k, v, a, sinks=sinks).flatten(0, 1)

"""K and V in blocks: the device memory of the cache, and the `Attend` that writes to it and reads from it.

K and V pass through the cache also within the chunk that is being computed: what attention sees of a token is what
the cache stores of it, whichever step it came in. That is what makes the answer independent of chunk sizes.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.engine.batch import Batch
from fewbit.model.attend import InPages, KVCodec
from fewbit.ops.attention import KEYS, attention
from fewbit.ops.attention.cpu import PagedLayer, Spans, why_not
from fewbit.spec.decoder import Attention, DecoderSpec

log = logging.getLogger(__name__)


class KVCache:
    """K and V of every layer: [num_blocks * block_size, kv_heads, stored_width], in what the layer's codec stores.

    Attributes:
        paged: of each layer its attention in C; None: torch does it.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        codecs: Sequence[KVCodec],
        num_blocks: int,
        block_size: int,
        device: torch.device,
        exact: bool = True,
    ) -> None:
        """`exact`: attention is torch's, with or without a compiler."""
        self.codecs, self.block_size = codecs, block_size
        self.k: list[Tensor] = []
        self.v: list[Tensor] = []
        self.paged: list[PagedLayer | None] = []
        for layer, codec in zip(spec.layers, codecs, strict=True):
            width = codec.stored_width(layer.attention.head_dim)
            shape = (num_blocks * block_size, layer.attention.kv_heads, width)
            # never filled: a slot is read only after it was written, and a CPU gives pages only when they are touched
            self.k.append(torch.empty(shape, dtype=codec.stored_dtype, device=device))
            self.v.append(torch.empty(shape, dtype=codec.stored_dtype, device=device))
            reason = "exact" if exact or device.type != "cpu" else why_not(layer.attention, codec)
            if reason is None:
                self.paged.append(PagedLayer(layer.attention, codec, self.k[-1], self.v[-1], block_size))
            else:
                log.debug("attention of layer %d in torch: %s", len(self.paged), reason)
                self.paged.append(None)

    @property
    def bytes(self) -> int:
        """Bytes that are really allocated."""
        return sum(t.numel() * t.element_size() for t in self.k + self.v)


def token_bytes(spec: DecoderSpec, codecs: Sequence[KVCodec]) -> int:
    """Bytes of K and V of one token in a `KVCache`, all layers together."""
    return sum(
        2 * layer.attention.kv_heads * codec.stored_width(layer.attention.head_dim) * codec.stored_dtype.itemsize
        for layer, codec in zip(spec.layers, codecs, strict=True)
    )


@dataclass(frozen=True)
class _Span:
    """One sequence of the step: its rows of q, and where its K and V are."""

    rows: slice
    first: int  # position of the first row
    end: int  # tokens stored once this step's are
    blocks: Tensor  # its table, int64 on the device
    start: int | None  # first slot, if its blocks are neighbours: a view does then, nothing is copied


class PagedAttend(InPages):
    """The `Attend` of one step."""

    def __init__(self, cache: KVCache, batch: Batch, slots: Tensor, tables: Tensor) -> None:
        """Prepare a step.

        Args:
            cache: where K and V are.
            batch: the step.
            slots: int64 [batch.tokens], where the K and V of each token go; on the device.
            tables: int64, the block tables of all pieces end to end; on the device.
        """
        self.cache, self.batch, self.slots, self.tables = cache, batch, slots, tables

    def in_pages(self, layers: Sequence[int]) -> tuple[list[PagedLayer], Spans] | None:
        """See `fewbit.model.attend.InPages`."""
        paged = [found for layer in layers if (found := self.cache.paged[layer]) is not None]
        return (paged, self._paged_spans) if len(paged) == len(layers) else None

    @functools.cached_property
    def _paged_spans(self) -> Spans:
        """What attention in C wants to know of the step."""
        rows, row, table = [], 0, 0
        for piece in self.batch.pieces:
            rows.append((row, len(piece.tokens), piece.first, table))
            row += len(piece.tokens)
            table += len(piece.blocks)
        return Spans(rows, self.slots, self.tables)

    @functools.cached_property
    def _spans(self) -> list[_Span]:
        spans, row, at = [], 0, 0
        for piece in self.batch.pieces:
            count, blocks = len(piece.tokens), piece.blocks
            neighbours = all(b - a == 1 for a, b in itertools.pairwise(blocks))
            start = blocks[0] * self.cache.block_size if neighbours else None
            table = self.tables[at : at + len(blocks)]
            spans.append(_Span(slice(row, row + count), piece.first, piece.end, table, start))
            row += count
            at += len(blocks)
        return spans

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, a: Attention, sinks: Tensor | None = None
    ) -> Tensor:
        """See `fewbit.model.attend.Attend`."""
        if (paged := self.cache.paged[layer]) is not None:
            return paged(q, k, v, self._paged_spans, sinks)
        codec, cache_k, cache_v = self.cache.codecs[layer], self.cache.k[layer], self.cache.v[layer]
        stored_k, stored_v = codec.store(k, v)
        cache_k.index_copy_(0, self.slots, stored_k)
        cache_v.index_copy_(0, self.slots, stored_v)
        out = torch.empty_like(q)
        for span in self._spans:
            # a window lets go of what lies before it, in whole blocks that are whole pieces of keys too: the pieces
            # in which a kernel adds up must not shift
            oldest = max(0, span.first - a.window + 1) if a.window else 0
            step = math.lcm(KEYS, self.cache.block_size)
            block = oldest // step * step // self.cache.block_size
            past = self._read(cache_k, span, block), self._read(cache_v, span, block)
            keys, values = codec.load(*past, q.dtype)
            first = span.first - block * self.cache.block_size
            out[span.rows] = attention(q[span.rows], keys, values, a, first, sinks)
        return out

    def _read(self, cache: Tensor, span: _Span, block: int) -> Tensor:
        """K or V of a sequence from block `block` of its table on: [tokens, kv_heads, head_dim]."""
        size = self.cache.block_size
        if span.start is not None:
            return cache[span.start + block * size : span.start + span.end]
        gathered = cache.view(-1, size, *cache.shape[1:]).index_select(0, span.blocks[block:]).flatten(0, 1)
        return gathered[: span.end - block * size]

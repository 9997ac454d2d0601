"""Attention over pages of K and V on a CPU, in C: `ops/cpu/attention.h` says what is computed."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fewbit.numerics.element import E4M3, INT8
from fewbit.ops.cpu.build import Library, library
from fewbit.spec.decoder import Alibi, Attention

_CHANNELS = 256  # of a head
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_ELEMENTS = (INT8, E4M3)
_SHARE = 1 << 16  # products of a call that are worth waking the other threads for


class _Cache(ctypes.Structure):
    """`Cache` of attention.h."""

    _fields_ = (("stored", ctypes.c_void_p), ("scale", ctypes.c_void_p), ("kind", ctypes.c_int64))


class _Attention(ctypes.Structure):
    """`Attention` of attention.h."""

    _fields_ = (
        *((name, _Cache) for name in ("k", "v")),
        *((name, ctypes.c_int64) for name in ("heads", "kv_heads", "head_dim", "page", "window")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    )


class _Step(ctypes.Structure):
    """`Step` of attention.h."""

    _fields_ = (
        ("spans", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("count", "tokens")),
        *((name, ctypes.c_void_p) for name in ("slots", "tables")),
    )


class Spans:
    """The sequences of a step, made once for all layers.

    Args:
        rows: of each sequence its first row, how many rows, the position of the first, and where in `tables` its block
            table begins; the rows of one follow those of the one before, and there is at least one.
        slots: int64 [tokens], where the K and V of each row go.
        tables: int64, block tables.
    """

    def __init__(self, rows: Sequence[tuple[int, int, int, int]], slots: Tensor, tables: Tensor) -> None:
        numbers = [number for row in rows for number in row]
        flat = (ctypes.c_int64 * len(numbers))(*numbers)
        self._step = _Step(ctypes.addressof(flat), len(rows), len(slots), slots.data_ptr(), tables.data_ptr())
        self._held = flat, slots, tables  # what it points to
        self.address = ctypes.addressof(self._step)
        self.pairs = sum(count * (first + count) for _, count, first, _ in rows)  # of a query and a key, at most


def why_not(a: Attention, codec: Any) -> str | None:
    """None: `PagedLayer` can do it; else the reason, for a user to read.

    Args:
        a: the layer's attention.
        codec: its `KVCodec`.
    """
    if isinstance(a.position, Alibi):
        return "knows no biases by distance"
    if a.head_dim > _CHANNELS:
        return f"knows heads of at most {_CHANNELS} channels, not {a.head_dim}"
    if codec.spec is None and codec.dtype not in _DTYPES:
        return f"knows no K and V in {codec.dtype}"
    if codec.spec and any(kv.element not in _ELEMENTS for kv in (codec.spec.k, codec.spec.v)):
        return f"knows K and V in INT8 and FP8 (E4M3), not {codec.spec}"
    built = library()
    return built if isinstance(built, str) else None


class PagedLayer:
    """The attention of one layer over its part of a cache; `why_not` has been asked.

    Args:
        a: its shape.
        codec: its `KVCodec`.
        k: its cache [slots, kv_heads, head_dim], as the codec stores it.
        v: likewise.
        page: slots of a page.
        variant: the instruction set; None: the best that this processor has.
    """

    def __init__(self, a: Attention, codec: Any, k: Tensor, v: Tensor, page: int, variant: str | None = None) -> None:
        built = library()
        assert isinstance(built, Library)
        self._call = built.call("attend", variant)
        caches = []
        self._held: list[Tensor] = [k, v]  # what it points to
        kv, scales = codec.spec, (codec.k_scale, codec.v_scale)
        for stored, fmt, scale in zip((k, v), (kv and kv.k, kv and kv.v), scales, strict=True):
            if fmt is None:
                caches.append(_Cache(stored.data_ptr(), None, _DTYPES.index(stored.dtype)))
                continue
            wide = scale.float().expand(a.kv_heads).contiguous()
            self._held.append(wide)
            caches.append(_Cache(stored.data_ptr(), wide.data_ptr(), len(_DTYPES) + _ELEMENTS.index(fmt.element)))
        shape = a.heads, a.kv_heads, a.head_dim, page, a.window or 0
        self._struct = _Attention(*caches, *shape, a.scale, a.softcap or 0.0)
        self.address = ctypes.addressof(self._struct)
        self._each = a.heads * a.head_dim

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans, sinks: Tensor | None = None) -> Tensor:
        """Store k and v [tokens, kv_heads, head_dim], then attend with q [tokens, heads, head_dim], all float32.

        Args:
            q: rotated.
            k: rotated.
            v: values.
            spans: the step.
            sinks: float32 [heads], scores that take part in the softmax and bring no value.
        """
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out = torch.empty_like(q)
        # all of torch's threads or none: OpenMP ends and starts threads when a team is not as large as the last
        threads = torch.get_num_threads() if spans.pairs * self._each >= _SHARE else 1
        self._call(
            self.address, spans.address, None if sinks is None else sinks.data_ptr(),
            q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), threads,
        )  # fmt: skip
        return out

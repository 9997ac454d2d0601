"""Decode attention over pages as a call; see `triton_decode` for the kernel."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fewbit.ops.device import HOPPER_SHARED, shared_memory
from fewbit.ops.linear.gpu import pieces_of
from fewbit.ops.linear.tiles import tuned
from fewbit.spec.decoder import Attention

if TYPE_CHECKING:
    from collections.abc import Mapping

PROGRAMS = 264
"""Two for each multiprocessor of an H100: how finely the sequences of a small batch are cut."""


def splits_of(rows: int, kv_heads: int) -> int:
    """In how many pieces each sequence is cut."""
    wanted = max(1, PROGRAMS // (rows * kv_heads))
    return min(16, 1 << (wanted.bit_length() - 1))


def cut_of(rows: int, a: Attention, kv: str, page: int, gpu: str = "", shared: int = HOPPER_SHARED) -> dict[str, Any]:
    """How the work of `rows` sequences is cut and launched.

    Args:
        rows: how many.
        a: the shape.
        kv: the element of the cache, or ``none``.
        page: tokens of a page.
        gpu: the name of the GPU.
        shared: bytes of shared memory that a program of it may have.
    """
    if found := tuned(gpu, f"attention {kv} {a.heads}x{a.kv_heads}x{a.head_dim} {page} {rows}"):
        return found
    splits = splits_of(rows, a.kv_heads)
    stage = 2 * page * a.head_dim * (2 if kv == "none" else 1)  # a page of K and one of V
    stages = max(1, min(3, (shared - (16 << 10)) // stage))
    early = {"PDL": 2, "PREFETCH": 1} if splits > 1 else {"PDL": 0, "PREFETCH": 0}
    return {"SPLITS": splits, "STAGES": stages, "num_warps": 4} | early


def stored_as(codec: Any) -> str:
    """The element of a cache, or ``none``: bfloat16."""
    return codec.spec.k.element.name if codec.spec else "none"


def decode_attention(
    qkv: Tensor, out: Tensor, k: Tensor, v: Tensor, codec: Any, table: Tensor, lengths: Tensor, a: Attention, page: int,
    scratch: tuple[Tensor, Tensor, Tensor], *, write: tuple[Tensor, Tensor, Mapping[str, Tensor]] | None = None,
    clear: Tensor | None = None, rounding: Any = None, tops: Tensor | None = None, ahead: Tensor | None = None,
    pdl: bool = False, cut: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Attention of one new token a sequence.

    Args:
        qkv: [m, (heads + 2 kv_heads) * head_dim]; `write`: raw float32; else bfloat16, rotated and stored already.
        out: [m, heads * head_dim], or its codes under `rounding`.
        k: pages of this layer.
        v: likewise; see the kernel for the layouts.
        codec: its `KVCodec`.
        table: int32 [m, pages].
        lengths: int32 [m], the new token included; 0: no sequence.
        a: the shape.
        page: tokens of a page.
        scratch: parts, statistics and counters (zero) for sequences that are cut.
        write: cosines and sines by position and the layer's norms: rotate q and k, and store the new K and V.
        clear: set to zero by the way.
        rounding: of the next linear, under a scale that is known before.
        tops: raised to the largest magnitudes of `out`, [m, 16] of the stats of `triton_epilogue`.
        ahead: see `GpuLinear.few`.
        pdl: likewise.
        cut: see `cut_of`.
    """
    from fewbit.ops.attention.triton_decode import decode_attention as kernel

    m = len(lengths)
    kv = stored_as(codec)
    cut = dict(cut or cut_of(m, a, kv, page, shared=shared_memory(qkv.device)))
    cut["PDL"] = cut["PDL"] if pdl else 0
    if not pdl:  # the instruction is as old as dependent launches
        cut["PREFETCH"] = 0
    pieces = pieces_of(ahead, cut)
    cut["AHEAD"] = pieces > 0
    options: dict[str, Any] = {"launch_pdl": True} if cut["PDL"] else {}
    cos, sin, norms = write or (qkv, qkv, {})
    kernel[(a.kv_heads, cut["SPLITS"], m)](
        qkv, norms.get("q_norm", qkv), norms.get("k_norm", qkv), cos, sin, k, v,
        qkv if codec.spec is None else codec.k_scale, qkv if codec.spec is None else codec.v_scale,
        table, lengths, out, qkv if rounding is None else rounding.scale, *scratch,
        *(qkv if t is None else t for t in (clear, tops, ahead)),
        pieces,
        a.scale * math.log2(math.e), a.qk_norm.eps if a.qk_norm else 0.0, table.shape[1], a.window or 0, qkv.stride(0),
        H=a.heads, HK=a.kv_heads, D=a.head_dim, PAGE=page, KV=kv, WRITE=write is not None,
        QK_NORM=write is not None and a.qk_norm is not None, WINDOW=a.window is not None,
        CODE=rounding.code if rounding is not None else "none", TOPS=tops is not None, CLEAR=clear is not None,
        PTX=qkv.is_cuda, **cut, **options,
    )  # fmt: skip

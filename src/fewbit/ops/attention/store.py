"""Writing K and V of many tokens into their pages, as a call; see `triton_store` for the kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def store_pages(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, codec: Any, parts: Tensor, page: int) -> None:
    """Store k, v [T, kv_heads, head_dim] (any row stride) as `codec` says and leave in them what was stored.

    Args:
        k: bfloat16.
        v: bfloat16.
        k_pages: pages of the layer.
        v_pages: likewise; see `triton_store` for the layouts.
        codec: its `KVCodec`.
        parts: int32 [n, 4]: page, first row, first slot in the page, count.
        page: tokens of a page.
    """
    from fewbit.ops.attention.triton_store import store_pages as kernel

    heads, head_dim = k.shape[1:]
    if codec.spec is not None:  # codes as plain bytes
        k_pages, v_pages = k_pages.view(torch.int8), v_pages.view(torch.int8)
    kernel[(len(parts), heads)](
        k, v, k_pages, v_pages, k if codec.spec is None else codec.k_scale, v if codec.spec is None else codec.v_scale,
        parts, k.stride(0), v.stride(0), HK=heads, D=head_dim, PAGE=page,
        KV=codec.spec.k.element.name if codec.spec else "none", num_warps=4,
    )  # fmt: skip

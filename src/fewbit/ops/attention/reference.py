"""Attention in plain torch: right on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbit.spec.decoder import Attention


def attention(q: Tensor, k: Tensor, v: Tensor, a: Attention, first: int = 0) -> Tensor:
    """Causal grouped-query attention of one sequence.

    Args:
        q: [t, heads, head_dim], the queries of positions `first` .. `first + t - 1`.
        k: [s, kv_heads, head_dim], the keys of positions 0 .. s - 1, with s = first + t.
        v: the values, likewise.
        a: the shape, scale and window.
        first: position of the first query.

    Returns:
        [t, heads, head_dim], dtype of q.
    """
    t, s = q.shape[0], k.shape[0]
    mask = None
    if t > 1 or a.window:
        back = torch.arange(first, first + t, device=q.device)[:, None] - torch.arange(s, device=q.device)  # [t, s]
        mask = back >= 0
        if a.window:
            mask &= back < a.window
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # [heads, tokens, head_dim]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=a.scale, enable_gqa=a.heads != a.kv_heads)
    return out.transpose(0, 1)

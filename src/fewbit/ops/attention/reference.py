"""Attention in plain torch: right on any device, and on a CPU the same to the last bit however a sequence is cut."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbit.spec.decoder import Attention

KEYS, _QUERIES = 512, 4
"""On a CPU keys are filled up to a multiple of 512 (torch's kernel walks over them in such pieces) and queries to one
of 4 (smaller products add in another order): a query then meets the same sums alone, in a chunk and in the whole."""


def attention(q: Tensor, k: Tensor, v: Tensor, a: Attention, first: int = 0) -> Tensor:
    """Causal grouped-query attention within sequences of one length.

    Args:
        q: [..., t, heads, head_dim], the queries of positions `first` .. `first + t - 1`.
        k: [..., s, kv_heads, head_dim], the keys of positions 0 .. s - 1, with s = first + t.
        v: the values, likewise.
        a: the shape, scale and window.
        first: position of the first query.

    Returns:
        [..., t, heads, head_dim], dtype of q.
    """
    shape, t, s = q.shape, q.shape[-3], k.shape[-3]
    positions = torch.arange(first, first + t, device=q.device)
    if q.device.type == "cpu":
        if more := -t % _QUERIES:
            q = torch.cat((q, q[..., -1:, :, :].expand(*q.shape[:-3], more, -1, -1)), -3)
            positions = torch.cat((positions, positions[-1:].expand(more)))
        k, v = (F.pad(x, (0, 0, 0, 0, 0, -s % KEYS)) for x in (k, v))
    back = positions[:, None] - torch.arange(k.shape[-3], device=q.device)  # [t, s]
    mask = back >= 0
    if a.window:
        mask &= back < a.window
    # torch's fast path wants [batch, heads, tokens, head_dim]
    q, k, v = (x.reshape(-1, *x.shape[-3:]).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=a.scale, enable_gqa=a.heads != a.kv_heads)
    return out.transpose(1, 2)[:, :t].reshape(shape)

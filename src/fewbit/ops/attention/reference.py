"""Attention in plain torch: right on any device, and on a CPU the same to the last bit however a sequence is cut."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbit.spec.decoder import Alibi, Attention

KEYS, _QUERIES = 512, 4
"""On a CPU keys are filled up to a multiple of 512 (torch's kernel walks over them in such pieces) and queries to one
of 4 (smaller products add in another order): a query then meets the same sums alone, in a chunk and in the whole."""


def attention(q: Tensor, k: Tensor, v: Tensor, a: Attention, first: int = 0, sinks: Tensor | None = None) -> Tensor:
    """Causal grouped-query attention within sequences of one length.

    Args:
        q: [..., t, heads, head_dim], the queries of positions `first` .. `first + t - 1`.
        k: [..., s, kv_heads, head_dim], the keys of positions 0 .. s - 1, with s = first + t.
        v: the values, likewise.
        a: the shape, scale and window.
        first: position of the first query.
        sinks: [heads], scores that take part in the softmax and bring no value.

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
    bias = mask if not isinstance(a.position, Alibi) else _alibi(back, a, a.position).masked_fill(~mask, -math.inf)
    if a.softcap is None and sinks is None:
        bias = bias.to(q.dtype) if bias.is_floating_point() else bias
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=a.scale, enable_gqa=a.heads != a.kv_heads)
    else:
        out = _explicit(q, k, v, a, mask, sinks)
    return out.transpose(1, 2)[:, :t].reshape(shape)


def slopes(heads: int, max_bias: float) -> Tensor:
    """How much one token of distance counts in each head, float32 [heads] (arXiv:2108.12409, section 3)."""
    whole = 1 << (heads - 1).bit_length()  # the next power of two, of which the odd ones come first
    found = 2.0 ** (-torch.arange(1, whole + 1, dtype=torch.float32) * max_bias / whole)
    return found if whole == heads else torch.cat((found[1::2], found[::2]))[:heads]


def _alibi(back: Tensor, a: Attention, position: Alibi) -> Tensor:
    """What is added to the scores of each head for tokens `back` [t, s] before: float32 [heads, t, s]."""
    slope = slopes(a.heads, position.max_bias).to(back.device)[:, None, None]
    if position.scaled:  # by the key's own position, which a softmax does not tell from its distance but for rounding
        keys = torch.arange(back.shape[-1], device=back.device)
        return (slope.bfloat16() * keys.bfloat16()).float() * a.scale + torch.zeros_like(back, dtype=torch.float32)
    return slope * -back


def _explicit(q: Tensor, k: Tensor, v: Tensor, a: Attention, mask: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax with capped scores and sinks: keys by pieces of `KEYS`, added up one after another."""
    group = a.heads // a.kv_heads
    k, v = (x.float().repeat_interleave(group, 1) for x in (k, v))
    scores = []
    for keys, there in zip(k.split(KEYS, 2), mask.split(KEYS, 1), strict=True):
        piece = q.float() @ keys.transpose(-1, -2) * a.scale  # [batch, heads, t, KEYS]
        if a.softcap is not None:
            piece = a.softcap * torch.tanh(piece / a.softcap)
        scores.append(piece.masked_fill(~there, -math.inf))
    top = torch.stack([piece.amax(-1) for piece in scores]).amax(0)[..., None]  # [batch, heads, t, 1]
    if sinks is not None:
        top = torch.maximum(top, sinks.float()[:, None, None])
    total = torch.zeros_like(top) if sinks is None else torch.exp(sinks.float()[:, None, None] - top)
    out = torch.zeros_like(q, dtype=torch.float32)
    for piece, values in zip(scores, v.split(KEYS, 2), strict=True):
        weight = torch.exp(piece - top)
        total = total + weight.sum(-1, keepdim=True)
        out = out + weight @ values
    return (out / total).to(q.dtype)

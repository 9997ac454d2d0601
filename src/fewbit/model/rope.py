"""Rotary positions (arXiv:2104.09864) with the scalings that long-context models use."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from fewbit.spec.decoder import LinearScaling, Llama3Scaling, LongScaling, Rope, YarnScaling


def frequencies(rope: Rope, head_dim: int, device: torch.device) -> tuple[Tensor, float]:
    """Angle per position of each pair that is turned, float32, and what cos and sin are multiplied by."""
    # every step asks; on a GPU they are made anew, since a graph may own them
    return (_kept if device.type == "cpu" else _made)(rope, head_dim, device)


def _made(rope: Rope, head_dim: int, device: torch.device) -> tuple[Tensor, float]:
    head_dim = rope.width(head_dim)
    pair = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    plain = 1.0 / rope.theta**pair
    s = rope.scaling
    if s is None:
        return plain, 1.0
    if isinstance(s, LinearScaling):
        return plain / s.factor, 1.0
    if isinstance(s, Llama3Scaling):
        wavelength = 2 * math.pi / plain
        longest, shortest = s.original_context / s.low_freq_factor, s.original_context / s.high_freq_factor
        ramp = (s.original_context / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
        blended = (1 - ramp) * plain / s.factor + ramp * plain
        slow = torch.where(wavelength > longest, plain / s.factor, blended)
        return torch.where(wavelength < shortest, plain, slow), 1.0
    if isinstance(s, LongScaling):
        return plain / torch.tensor(s.factors, device=device), s.attention_factor
    assert isinstance(s, YarnScaling)
    return _yarn(rope, s, plain, head_dim)


_kept = functools.lru_cache(maxsize=256)(torch.inference_mode(False)(_made))  # for whoever asks, in any mode


def _yarn(rope: Rope, s: YarnScaling, plain: Tensor, head_dim: int) -> tuple[Tensor, float]:
    """YaRN, arXiv:2309.00071 sections 3.2 to 3.4."""

    def pair_turning(rotations: float) -> float:
        """Index of the pair that turns `rotations` times within the original context."""
        return head_dim * math.log(s.original_context / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = pair_turning(s.beta_fast), pair_turning(s.beta_slow)
    low, high = (math.floor(first), math.ceil(last)) if s.truncate else (first, last)
    low, high = max(low, 0), min(high, head_dim - 1)
    index = torch.arange(head_dim // 2, dtype=torch.float32, device=plain.device)
    keep = 1 - ((index - low) / max(high - low, 0.001)).clamp(0, 1)
    sharpen = s.attention_factor if s.attention_factor is not None else 0.1 * math.log(s.factor) + 1.0
    return plain / s.factor * (1 - keep) + plain * keep, sharpen


class Rotary:
    """Cosines and sines for the int64 positions [T] of one step, made once for each kind of rope."""

    def __init__(self, positions: Tensor, dtype: torch.dtype) -> None:
        self.positions, self.dtype = positions, dtype
        self._made: dict[tuple[Rope, int], tuple[Tensor, Tensor]] = {}

    def __call__(self, rope: Rope, head_dim: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each [T, 1, channels that are turned]."""
        key = rope, head_dim
        if key not in self._made:
            frequency, sharpen = frequencies(rope, head_dim, self.positions.device)
            angle = self.positions.float()[:, None] * frequency
            both = angle.repeat_interleave(2, -1) if rope.interleaved else torch.cat((angle, angle), -1)
            angle = both[:, None]
            cos, sin = (x if sharpen == 1.0 else x * sharpen for x in (angle.cos(), angle.sin()))
            self._made[key] = cos.to(self.dtype), sin.to(self.dtype)
        return self._made[key]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Turn pairs of the first channels of each head of x [tokens, heads, head_dim], as many as `cos` has."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    if interleaved:
        across = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        across = torch.cat((-b, a), -1)
    turned = turned * cos + across * sin
    return turned if not rest.shape[-1] else torch.cat((turned, rest), -1)

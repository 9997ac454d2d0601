"""Rotary positions (arXiv:2104.09864) with the scalings that long-context models use."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fewbit.spec.decoder import LinearScaling, Llama3Scaling, Rope, YarnScaling


def frequencies(rope: Rope, head_dim: int, device: torch.device) -> tuple[Tensor, float]:
    """Angle per position of each pair, float32 [head_dim / 2], and what cos and sin are multiplied by."""
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
    assert isinstance(s, YarnScaling)
    return _yarn(rope, s, plain, head_dim)


def _yarn(rope: Rope, s: YarnScaling, plain: Tensor, head_dim: int) -> tuple[Tensor, float]:
    """YaRN, arXiv:2309.00071 sections 3.2 to 3.4."""

    def pair_turning(rotations: float) -> float:
        """Index of the pair that turns `rotations` times within the original context."""
        return head_dim * math.log(s.original_context / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = max(math.floor(pair_turning(s.beta_fast)), 0)
    high = min(math.ceil(pair_turning(s.beta_slow)), head_dim - 1)
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
        """Cosines and sines, each [T, 1, head_dim]."""
        key = rope, head_dim
        if key not in self._made:
            frequency, sharpen = frequencies(rope, head_dim, self.positions.device)
            angle = self.positions.float()[:, None] * frequency
            angle = torch.cat((angle, angle), -1)[:, None]
            self._made[key] = (angle.cos() * sharpen).to(self.dtype), (angle.sin() * sharpen).to(self.dtype)
        return self._made[key]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of each head of x [tokens, heads, head_dim] against each other."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin

"""The low-rank branches beside linears that run as one product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbit.ops.linear.layouts import interleave
from fewbit.ops.linear.problem import LinearWeights


@dataclass(frozen=True)
class Branch:
    """``(x @ a.T) @ b.T``, added to a product of the same x.

    Attributes:
        a: [R, K], those of the linears one below the other; R is a power of two.
        b: [N, R], zero where a row of N has nothing to do with a row of `a`.
    """

    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[0]


def branch_of(pieces: Sequence[LinearWeights], gated: bool, dtype: torch.dtype) -> Branch | None:
    """The branches of linears one below the other as one; `gated`: their rows are interleaved. None: they have none."""
    if all(piece.lowrank is None for piece in pieces):
        return None
    a = torch.cat([piece.lowrank[0].to(dtype) for piece in pieces if piece.lowrank])
    nothing = [a.new_zeros(piece.weight.shape[0], 0) for piece in pieces]
    b = torch.block_diag(*(p.lowrank[1].to(dtype) if p.lowrank else no for p, no in zip(pieces, nothing, strict=True)))
    more = max(16, 1 << (len(a) - 1).bit_length()) - len(a)  # what a program can cover
    a, b = F.pad(a, (0, 0, 0, more)), F.pad(b, (0, more))
    return Branch(a.contiguous(), (interleave(b) if gated else b).contiguous())

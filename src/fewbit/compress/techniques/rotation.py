"""Rotation: outliers are spread over all channels by turning the space in which the residual stream lives.

S. Ashkboos, A. Mohtashami, M. Croci, B. Li, P. Cameron, M. Jaggi, D. Alistarh, T. Hoefler, J. Hensman, "QuaRot:
Outlier-Free 4-Bit Inference in Rotated LLMs", arXiv:2404.00456; the part that needs no work at run time. RMSNorm does
not see a rotation once its weight has moved into the linears that follow. So an orthogonal Q on the residual stream
goes into the embedding, into what writes to the stream (``Qᵀ W``) and what reads it (``W Q``), the head too; another
one on the D channels of a head goes into the rows of v and the columns of o. What the model computes stays the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewbit.checkpoint import Checkpoint
from fewbit.checkpoint.checkpoint import Tensors
from fewbit.compress.techniques import Needs
from fewbit.errors import RecipeError, UnsupportedError
from fewbit.spec.decoder import DecoderSpec, MoE, Norm


@dataclass(frozen=True)
class Settings:
    """What a recipe may set.

    Attributes:
        heads: whether v and o are rotated within each head as well.
        seed: of the signs.
    """

    heads: bool = True
    seed: int = 0
    needs: ClassVar[Needs] = "none"

    def __post_init__(self) -> None:
        """Check the settings."""
        if not isinstance(self.heads, bool):
            raise RecipeError(f"rotation: heads is {self.heads!r}; expected true or false")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or self.seed < 0:
            raise RecipeError(f"rotation: seed is {self.seed!r}; expected a whole number of at least 0")

    def model(self, checkpoint: Checkpoint) -> Checkpoint:
        """The same model in rotated coordinates, its tensors turned when they are read, in the dtype they had.

        The head is a tensor of its own afterwards: it is turned as the embedding is, but has taken in the final norm.
        """
        _check(checkpoint.spec)
        spec = replace(checkpoint.spec, tied=False)
        source, made = checkpoint.tensors, Tensors()
        on = functools.cache(orthogonal(spec.hidden, self.seed).to)  # the matrix, once a device

        def add(name: str, turn: Callable[[Tensor], Tensor], given: str = "") -> None:
            """Tensor `name` is what `turn` makes of `given` (or of itself), float64."""
            given = given or name
            dtype = source.dtype(given)

            def load(device: torch.device) -> Tensor:
                return turn(source.dense(given, device).double()).to(dtype)

            made.add(name, load, dtype, source.nbytes(given))

        def reads(w: Tensor, norm: str = "") -> Tensor:
            """Weight of a linear that reads the stream, and takes in the norm before it."""
            w = w * source.dense(f"{norm}.weight", w.device).double() if norm else w
            return w @ on(w.device)

        def writes(w: Tensor) -> Tensor:
            """Weight or bias of a linear that adds to the stream."""
            return on(w.device).T @ w

        add("embed.weight", reads)
        for i, layer in enumerate(spec.layers):
            p, a = f"layers.{i}", layer.attention
            turn = _within(orthogonal(a.head_dim, self.seed + 1), self.heads)
            mlps = list(layer.mlps(i))
            readers = {f"{p}.pre_attn": [f"{p}.attn.q", f"{p}.attn.k"]}
            readers[f"{p}.pre_mlp"] = [f"{m}.{which}" for m in mlps for which in ("gate", "up")]
            if isinstance(layer.mlp, MoE):
                readers[f"{p}.pre_mlp"].append(f"{p}.mlp.router")
            for before, names in readers.items():
                for name in names:
                    add(f"{name}.weight", lambda w, n=before: reads(w, n))  # type: ignore[misc]
                add(f"{before}.weight", torch.ones_like)
            add(f"{p}.attn.v.weight", lambda w, n=f"{p}.pre_attn", t=turn: t(reads(w, n), 0))  # type: ignore[misc]
            add(f"{p}.attn.o.weight", lambda w, t=turn: writes(t(w, 1)))  # type: ignore[misc]
            for m in mlps:
                add(f"{m}.down.weight", writes)
            turned: dict[str, Any] = {f"{p}.attn.v.bias": lambda b, t=turn: t(b, 0)}
            turned |= dict.fromkeys([f"{p}.attn.o.bias", *(f"{m}.down.bias" for m in mlps)], writes)
            for name in spec.layer_tensors(i):
                if name not in made:  # biases, and norms of q and k, which see no rotation
                    add(name, turned.get(name, lambda t: t))
        add("final_norm.weight", torch.ones_like)
        head = "embed.weight" if checkpoint.spec.tied else "lm_head.weight"
        add("lm_head.weight", lambda w: reads(w, "final_norm"), head)
        return replace(checkpoint, spec=spec, tensors=made)


def _check(spec: DecoderSpec) -> None:
    """Raise unless all that touches the residual stream is linear but for RMSNorms, one before each linear."""
    plain = spec.final_norm == Norm(spec.final_norm.eps) and not spec.learned_positions and not spec.unit_head
    for layer in spec.layers:
        two = layer.norms.keys() == {"pre_attn", "pre_mlp"} and not layer.parallel
        plain &= two and all(norm == Norm(norm.eps) for norm in layer.norms.values())
        plain &= all(mlp.gated for mlp in layer.mlps(0).values())
        plain &= not (isinstance(layer.mlp, MoE) and layer.mlp.shared)
    if not plain:
        raise UnsupportedError(
            "rotation: it needs layers of two plain RMSNorms, one before attention and one before a gated MLP; this "
            "model has others"
        )


def _within(r: Tensor, wanted: bool) -> Callable[[Tensor, int], Tensor]:
    """Rotates each run of D rows (``Rᵀ W``) or columns (``W R``) of a matrix, or of a vector."""

    def turn(w: Tensor, dim: int) -> Tensor:
        if not wanted:
            return w
        turned: Tensor = w.unflatten(dim, (-1, len(r))).movedim(dim + 1, -1) @ r.to(w.device)
        return turned.movedim(-1, dim + 1).flatten(dim, dim + 1)

    return turn


def orthogonal(size: int, seed: int) -> Tensor:
    """An orthogonal matrix that mixes every channel with every other, float64 [size, size].

    A Hadamard matrix (Sylvester's) with random signs; for a size that is no power of two its Kronecker product with a
    random orthogonal matrix of the odd factor.
    """
    g = torch.Generator().manual_seed(seed)
    even = size & -size  # the largest power of two that divides it
    q, r = torch.linalg.qr(torch.randn(size // even, size // even, generator=g, dtype=torch.float64))
    made = q * r.diagonal().sign()
    for _ in range(even.bit_length() - 1):
        made = torch.cat([torch.cat([made, made], 1), torch.cat([made, -made], 1)]) / 2**0.5
    signs = torch.randint(0, 2, (size,), generator=g) * 2.0 - 1
    found: Tensor = signs[:, None] * made
    return found

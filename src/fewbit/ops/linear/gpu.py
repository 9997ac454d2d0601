"""Linear layers on an NVIDIA GPU: what the skinny kernels and the library products have in common.

A linear knows two ways. `few`: up to `FEW` tokens, one Triton kernel that reads every weight once and ends as the
decode step wants it (`triton_epilogue`). `many`: a library product, for prompts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewbit.numerics.format import ALL
from fewbit.ops.device import gpu_name, has_triton, shared_memory
from fewbit.ops.linear.branch import branch_of
from fewbit.ops.linear.problem import LinearProblem, LinearWeights
from fewbit.ops.linear.tiles import Tile, key, tile

FEW = 128
"""Most tokens of a skinny product."""

Ends = tuple[Any, ...]
Common = dict[str, Any]


@dataclass(frozen=True)
class Rounding:
    """How a linear's input is rounded: ``e4m3`` or ``int8`` codes, under one scale or (None) one a token.

    Or ``nvfp4`` or ``mxfp4``: in blocks, whose own scales are in the numbers; `scale` is the one over all of them.
    """

    code: str
    scale: Tensor | None = None  # float32 []

    @property
    def blocks(self) -> bool:
        """Whether it takes whole blocks of a row to round a number."""
        return self.code in ("nvfp4", "mxfp4")

    @property
    def dynamic(self) -> bool:
        """Whether the scale needs the whole row."""
        return self.scale is None

    @property
    def dtype(self) -> torch.dtype:
        """What the codes are stored in."""
        if self.blocks:
            return torch.bfloat16
        return torch.float8_e4m3fn if self.code == "e4m3" else torch.int8


@dataclass(frozen=True)
class Codes:
    """A rounded input: codes [T, K] and their scale, float32 [] or [T]."""

    x: Tensor
    scale: Tensor

    def rows(self) -> Tensor:
        """The scale of each row, [T]."""
        return self.scale.expand(self.x.shape[0]).contiguous()


@dataclass(frozen=True)
class Folded:
    """An RMSNorm folded into a product: its input is ``residual * g``, its result is scaled by the inverse RMS.

    Attributes:
        stats: of the residual, see `triton_epilogue`.
        clear: the stats of the other norm, cleared by the way.
        eps: of the norm.
    """

    stats: Tensor
    clear: Tensor
    eps: float


@dataclass(frozen=True)
class Residual:
    """Where a product is added: res float32 [M, N]; the next norm's weight g [N]; int32 counters, zero."""

    res: Tensor
    g: Tensor
    count: Tensor


class GpuLinear(ABC):
    """Prepared weights of one linear, or of several that read the same input and lie one below the other.

    Attributes:
        n, k: rows and columns.
        rounding: how the input is rounded; None: it stays bfloat16.
        branch: what is added beside, of the input as it comes; or None.
        kind: see `tiles.tile`.
        act: dtype of activations: bfloat16.
    """

    kind: str

    def __init__(self, pieces: Sequence[LinearWeights], gated: bool) -> None:
        self.n = sum(piece.weight.shape[0] for piece in pieces)
        self.k = pieces[0].weight.shape[1]
        device = device_of(pieces[0])
        self.gpu, self.shared = gpu_name(device), shared_memory(device)
        self.on_gpu = device.type == "cuda"  # else Triton's interpreter runs the kernels, which has no bfloat16
        self.act = torch.bfloat16 if self.on_gpu else torch.float32
        self.rounding = _rounding(pieces[0])
        self.bias = _bias(pieces, gated, device)
        self.branch = branch_of(pieces, gated, self.act)
        self._none = torch.zeros(1, device=device)  # stands for arguments that a variant does not read

    @property
    def padded_k(self) -> int:
        """Columns as the kernels see them."""
        return self.k

    def tile(self, m: int, ending: str) -> Tile:
        """How the product is cut for `m` tokens."""
        return tile(self.kind_of(m), self.n, self.padded_k, self.rows_of(m), ending, self.gpu, self.shared)

    def key(self, m: int) -> str:
        """Where the table of tuned tiles has that of `m` tokens."""
        return key(self.kind_of(m), self.n, self.padded_k, self.rows_of(m))

    def rows_of(self, m: int) -> int:
        """As how many tokens the product of `m` is cut."""
        return m

    def kind_of(self, m: int) -> str:
        """What the product of `m` tokens was tuned as."""
        return self.kind

    @property
    def dynamic(self) -> bool:
        """Whether the input is rounded under a scale that needs the whole row."""
        return self.rounding is not None and self.rounding.dynamic

    def rounds_itself(self, m: int) -> bool:
        """Whether `few` rounds its input on the way; else it wants codes (if it has a `rounding`)."""
        return bool(self.tile(m, "store")["gemv"])

    @property
    def few_dtype(self) -> torch.dtype:
        """What `few` wants codes stored in."""
        return self.rounding.dtype if self.rounding else self.act

    def few(
        self, x: Tensor | Codes, out: Tensor, *, ending: str = "store", norm: Folded | None = None,
        residual: Residual | None = None, out_rounding: Rounding | None = None, tops: Tensor | None = None,
        stats: Tensor | None = None, out_tops: bool = False, ahead: Tensor | None = None, pdl: bool = False,
        shrunk: Tensor | None = None,
    ) -> None:  # fmt: skip
        """The product of up to `FEW` tokens.

        Args:
            x: [M, K] bfloat16, or codes where `rounds_itself` says no.
            out: see `triton_epilogue`; with ``add`` float32 [M, N] that is zero before.
            ending: ``store``, ``add``, ``silu`` or ``residual``.
            norm: fold an RMSNorm in.
            residual: for ``residual``.
            out_rounding: for ``silu``: store codes under its scale.
            tops: float32 [1, 16], magnitudes that hold the largest of x: where `rounds_itself`, under a scale a row.
            stats: where the ending leaves those of `out`, see `triton_epilogue`; for ``residual``, or with `out_tops`.
            out_tops: also the magnitudes.
            ahead: uint8, the weights of a later product, to bring as much of them to the cache by the way as the tile
                says (compute capability 9.0 and later).
            pdl: may start before the kernel before is complete (compute capability 9.0 and later).
            shrunk: where there is a `branch`, float32 [M, R]: its ``x @ a.T``, x normalized.
        """
        rows, scale = (x.x, x.scale) if isinstance(x, Codes) else (x, None)
        assert stats is not None or not (residual or out_tops)
        cut, none = self.tile(len(rows), ending), self._none
        start = cut.get("PDL", 1) if pdl else 0
        before, clear, eps = (norm.stats, norm.clear, norm.eps) if norm else (none, none, 0.0)
        res, g, count = (residual.res, residual.g, residual.count) if residual else (none, none, none)
        out_scale = none if out_rounding is None or out_rounding.scale is None else out_rounding.scale
        bias, after, next_ = (none if t is None else t for t in (self.bias, stats, ahead))
        pieces = pieces_of(ahead, cut)
        given, expand = (none, none) if self.branch is None else (shrunk, self.branch.b)
        ends = bias, given, expand, before, out, out_scale, res, g, after, count, clear, next_, pieces
        if ending == "add":  # what several programs add to cannot be stored
            ending = "atomic" if cut.get("SPLIT", 1) > 1 else "store"
        common = {
            "BN": cut["BN"], "BIAS": self.bias is not None, "RANK": self.branch.rank if self.branch else 0,
            "OUT": ending, "NORM": norm is not None,
            "OUT_CODE": out_rounding.code if out_rounding else "none", "TOPS": out_tops,
            "AHEAD": pieces > 0, "PDL": start, "PTX": self.on_gpu,
            "num_warps": cut["num_warps"], "eps": eps, **({"launch_pdl": True} if start else {}),
            **({"maxnreg": cut["maxnreg"]} if "maxnreg" in cut else {}),
        }  # fmt: skip
        self._launch(cut, rows, scale, none if tops is None else tops, ends, common)

    @abstractmethod
    def _launch(self, cut: Tile, x: Tensor, scale: Tensor | None, tops: Tensor, ends: Ends, common: Common) -> None:
        """Launch the kernel that `cut` is for: x [M, K] bfloat16, or codes in units of `scale` [] or [M].

        `ends` and `common`: what all kernels take alike, in their order and by name.
        """

    def rounds(self, scale: Tensor | None) -> tuple[dict[str, Any], Tensor]:
        """What a GEMV does to its input, which holds codes in units of `scale` (None: numbers): constants, a scale."""
        r = self.rounding if scale is None else None
        given = scale if scale is not None else r.scale if r is not None else None
        constants = {"CODE": r.code if r else "none", "DYNAMIC": r is not None and r.dynamic, "SX": scale is not None}
        return constants, self._none if given is None else given

    def _grid(self, cut: Tile, m: int) -> tuple[int, ...]:
        programs = -(-self.n // cut["BN"])
        return (programs,) if cut["gemv"] else (programs, cut["SPLIT"], -(-m // cut["BM"]))

    @property
    @abstractmethod
    def memory(self) -> Tensor:
        """The weights as plain bytes, in the order in which the programs read them."""

    @abstractmethod
    def many(self, x: Tensor | Codes) -> Tensor:
        """[T, K] to bfloat16 [T, N] for many tokens: bfloat16, or codes if there is a `rounding`."""

    def wants(self, tokens: int) -> tuple[Rounding | None, torch.dtype | None]:
        """How `product` wants its input of so many tokens rounded, and what the codes are stored in.

        Not at all where a `branch` reads the input too.
        """
        return (None, None) if self.branch else self.coded(tokens)

    def coded(self, tokens: int) -> tuple[Rounding | None, torch.dtype | None]:
        """How `few`, or of more tokens `many`, wants its input rounded, and what the codes are stored in."""
        if self.rounding is None or (tokens <= FEW and self.rounds_itself(tokens)):
            return None, None
        return self.rounding, self.few_dtype if tokens <= FEW else None

    def product(self, x: Tensor | Codes, dtype: torch.dtype | None = None) -> Tensor:
        """[T, K] as `wants` says, to [T, N] of `dtype` (None: that of activations), by way of it if there are many."""
        shrunk: Tensor | None = None
        if self.branch is not None:
            from fewbit.ops.rows.rows import rounded

            assert isinstance(x, Tensor)
            shrunk = x @ self.branch.a.t()
            rounding, stored = self.coded(len(x))
            x = x if rounding is None else rounded(x, rounding, stored)
        rows = x.x if isinstance(x, Codes) else x
        if rows.shape[0] > FEW:
            out = self.many(x)
            if self.branch is not None and shrunk is not None:
                out = torch.addmm(out, shrunk, self.branch.b.t())
            return out.to(dtype or self.act)
        out = torch.empty(rows.shape[0], self.n, dtype=dtype or self.act, device=rows.device)
        dynamic = self.dynamic and not isinstance(x, Codes)
        tops = rows.abs().amax(1, keepdim=True).float().repeat(1, 16) if dynamic else None
        self.few(x, out, tops=tops, shrunk=None if shrunk is None else shrunk.float())
        return out


def units(scale: Tensor | None) -> str:
    """Of which kind the scale of codes is, as the kernels are told: ``none``, ``one`` or ``rows``."""
    return "none" if scale is None else "one" if scale.ndim == 0 else "rows"


def pieces_of(ahead: Tensor | None, cut: Tile) -> int:
    """Of the memory `ahead`, how many pieces of 8 KiB a kernel brings to the cache: ``AHEAD`` MiB, if so many are."""
    return 0 if ahead is None else min(cut.get("AHEAD", 0) << 20, ahead.numel()) >> 13


class GpuKernel(ABC):
    """A `LinearKernel` whose prepared weights are a `GpuLinear`."""

    name: str
    device: str | None = "cuda"
    decodes = False
    """Whether prompts need a scratch for decoded weights."""

    def why_not(self, problem: LinearProblem) -> str | None:
        """See `LinearKernel.why_not`."""
        if problem.device.kind != "cuda":
            return "needs an NVIDIA GPU"
        if problem.device.capability < (8, 0):
            return f"needs compute capability 8.0, this GPU has {version(problem.device.capability)}"
        if not has_triton():
            return "the package triton is not installed"
        if problem.dtype != torch.bfloat16:
            return f"computes in bfloat16, the model in {str(problem.dtype).removeprefix('torch.')}"
        if problem.quant.prescale:
            return "cannot multiply inputs by a stored vector"
        if problem.quant.weight and problem.quant.weight.act_order:
            return "needs groups in the order of their columns"
        return self.declines(problem)

    @abstractmethod
    def declines(self, problem: LinearProblem) -> str | None:
        """The part of `why_not` that is this kernel's own."""

    def remark(self, problem: LinearProblem) -> str | None:
        """See `LinearKernel.remark`."""
        return None

    @abstractmethod
    def weight_bytes(self, problem: LinearProblem) -> int:
        """See `LinearKernel.weight_bytes`."""

    @abstractmethod
    def join(self, pieces: Sequence[LinearWeights], gated: bool = False) -> GpuLinear:
        """Prepare linears that read the same input as one; `gated`: gate above up, for the ending ``silu``."""

    def prepare(self, weights: LinearWeights, dtype: torch.dtype) -> GpuLinear:
        """See `LinearKernel.prepare`."""
        return self.join([weights])

    def run(self, x: Tensor, prepared: GpuLinear) -> Tensor:
        """See `LinearKernel.run`."""
        from fewbit.ops.rows.rows import rounded

        rows = x.reshape(-1, x.shape[-1]).contiguous()
        rounding, dtype = prepared.wants(len(rows))
        out = prepared.product(rows if rounding is None else rounded(rows, rounding, dtype))
        return out.view(*x.shape[:-1], -1)


def device_of(weights: LinearWeights) -> torch.device:
    """Where weights are."""
    weight = weights.weight
    return weight.device if isinstance(weight, Tensor) else weight.codes.device


def input_why_not(problem: LinearProblem, element: str) -> str | None:
    """None if the kernels can round inputs so: ``element`` codes, one scale a token or one calibrated."""
    fmt, how = problem.quant.input, problem.quant.input_scale
    if fmt is None:
        return None
    whole_row = fmt.block[1] == ALL
    if fmt.element.name != element or not whole_row or (how == "dynamic" and fmt.block[0] != 1) or how == "outer":
        return f"cannot round inputs to {fmt} ({how})"
    if element == "e4m3" and problem.device.capability < (8, 9):
        return f"FP8 needs compute capability 8.9, this GPU has {version(problem.device.capability)}"
    return None


def _rounding(weights: LinearWeights) -> Rounding | None:
    fmt = weights.quant.input
    if fmt is None:
        return None
    scale = weights.input_scale if weights.quant.calibrated else None
    if fmt.grouped:
        over_all = torch.ones((), device=device_of(weights)) if scale is None else scale.float().reshape(())
        return Rounding("nvfp4" if fmt.outer else "mxfp4", over_all)
    return Rounding(fmt.element.name, None if scale is None else scale.float().reshape(()))


def _bias(pieces: Sequence[LinearWeights], gated: bool, device: torch.device) -> Tensor | None:
    from fewbit.ops.linear.layouts import interleave

    if all(piece.bias is None for piece in pieces):
        return None
    zero = [torch.zeros(p.weight.shape[0], device=device) if p.bias is None else p.bias.float() for p in pieces]
    bias = torch.cat(zero)
    return interleave(bias) if gated else bias


def version(capability: tuple[int, int]) -> str:
    """A compute capability in words."""
    return f"{capability[0]}.{capability[1]}"

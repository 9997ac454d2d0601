"""16- and 8-bit weights on an NVIDIA GPU: BF16, FP8 and INT8, with inputs as they are or rounded alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbit.numerics.qtensor import QTensor
from fewbit.ops.linear.gpu import Codes, Common, Ends, GpuKernel, GpuLinear, input_why_not, units, version
from fewbit.ops.linear.layouts import interleave
from fewbit.ops.linear.problem import LinearProblem, LinearWeights
from fewbit.ops.linear.tiles import Tile

_STORAGE = {"e4m3": torch.float8_e4m3fn, "int8": torch.int8}


class Wide(GpuKernel):
    """Weights stay as they are stored: bfloat16, or one byte a weight with a scale a row."""

    name = "wide"

    def declines(self, problem: LinearProblem) -> str | None:
        """See `GpuKernel.declines`."""
        fmt = problem.quant.weight
        if problem.k % 64:
            return f"{problem.k} columns do not divide by 64"
        if fmt is None:
            return None if problem.quant.input is None else "cannot round inputs of unquantized weights"
        if fmt.element.name not in _STORAGE or fmt.grouped:
            return f"holds BF16, and FP8 or INT8 with a scale a row or a tensor, not {fmt}"
        if fmt.element.name == "e4m3" and problem.device.capability < (8, 9):
            return f"FP8 needs compute capability 8.9, this GPU has {version(problem.device.capability)}"
        if problem.quant.input is not None and (problem.n % 16 or problem.k % 16):
            return "the library's 8-bit product needs multiples of 16"
        return input_why_not(problem, fmt.element.name)

    def weight_bytes(self, problem: LinearProblem) -> int:
        """See `LinearKernel.weight_bytes`."""
        if problem.quant.weight is None:
            return problem.n * problem.k * 2
        return problem.n * (problem.k + 4)

    def join(self, pieces: Sequence[LinearWeights], gated: bool = False) -> GpuLinear:
        """See `GpuKernel.join`."""
        return _WideLinear(pieces, gated)


class _WideLinear(GpuLinear):
    def __init__(self, pieces: Sequence[LinearWeights], gated: bool) -> None:
        super().__init__(pieces, gated)
        parts = [p.weight for p in pieces if isinstance(p.weight, QTensor)]
        self.scale: Tensor | None = None  # float32 [N]
        self.uniform = False  # one scale for all rows
        if parts:
            storage = _STORAGE[parts[0].format.element.name]
            self.kind = "fp8" if storage == torch.float8_e4m3fn else "int8"
            weight = torch.cat([p.codes.view(storage).view(torch.uint8) for p in parts])
            scale = torch.cat([p.scales().reshape(-1, 1).expand(p.shape[0], 1).reshape(-1) for p in parts])
            self.uniform = bool((scale == scale[0]).all())
            if gated:
                weight, scale = interleave(weight), interleave(scale)
            self.weight, self.scale = weight.view(storage), scale.contiguous()
        else:
            self.kind = "bf16"
            plain = [p.weight for p in pieces if isinstance(p.weight, Tensor)]
            weight = torch.cat(plain) if len(plain) > 1 else plain[0]
            self.weight = interleave(weight) if gated else weight.contiguous()

    def _launch(self, cut: Tile, x: Tensor, scale: Tensor | None, tops: Tensor, ends: Ends, common: Common) -> None:
        from fewbit.ops.linear.triton_wide import int8_gemv, wide_gemm, wide_gemv

        m, grid, none = len(x), self._grid(cut, len(x)), self._none
        rows = none if self.scale is None else self.scale
        if not cut["gemv"]:
            wide_gemm[grid](
                x, self.weight, rows, none if scale is None else scale, *ends, m, self.n, self.k, BM=cut["BM"],
                BK=cut["BK"], SPLIT=cut["SPLIT"], STAGES=cut["STAGES"], SX=units(scale), SCALED=self.scale is not None,
                PREFETCH=cut["PREFETCH"], **common,
            )  # fmt: skip
            return
        rounding, given = self.rounds(scale)
        cuts = {"BK": cut["BK"], "NIT": cut["NIT"], "EVEN": self.k % cut["BK"] == 0}
        if rounding["CODE"] == "int8":
            int8_gemv[grid](
                x, self.weight.view(torch.int32), rows, given, tops, *ends, self.n, self.k,
                DYNAMIC=rounding["DYNAMIC"], **cuts, **common,
            )  # fmt: skip
        else:
            wide_gemv[grid](
                x, self.weight, rows, given, tops, *ends, self.n, self.k, SCALED=self.scale is not None,
                **rounding, **cuts, **common,
            )  # fmt: skip

    @property
    def memory(self) -> Tensor:
        """See `GpuLinear.memory`."""
        return self.weight.view(torch.uint8).view(-1)

    def many(self, x: Tensor | Codes) -> Tensor:
        """See `GpuLinear.many`."""
        bias = None if self.bias is None else self.bias.to(torch.bfloat16)
        if isinstance(x, Codes):
            assert self.scale is not None
            if self.weight.dtype == torch.int8:
                return _int8_product(x, self.weight, self.scale, bias)
            if self.uniform and x.scale.ndim == 0:
                a, b = x.scale, self.scale[0]
            else:
                a, b = x.rows()[:, None], self.scale[None]
            out = torch._scaled_mm(
                x.x, self.weight.t(), scale_a=a, scale_b=b, out_dtype=torch.bfloat16, use_fast_accum=True
            )
            return out if bias is None else out + bias
        if self.scale is None:
            return F.linear(x, self.weight, bias)
        # the codes are bfloat16 numbers as they are; what is left of a scale multiplies the result
        out = (F.linear(x, self.weight.to(torch.bfloat16)).float() * self.scale).to(torch.bfloat16)
        return out if bias is None else out + bias


def _int8_product(x: Codes, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    from fewbit.ops.rows.rows import scaled

    rows = x.x.shape[0]
    codes = x.x if rows > 16 else F.pad(x.x, (0, 0, 0, 17 - rows))  # the library wants more than 16 rows
    out = scaled(torch._int_mm(codes, weight.t())[:rows], x.scale, scale)
    return out if bias is None else out + bias

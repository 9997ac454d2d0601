"""4-bit weights on an NVIDIA GPU: INT4 in groups, and E2M1 in blocks (NVFP4, MXFP4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbit.numerics.element import Element
from fewbit.numerics.format import FORMATS, Format
from fewbit.numerics.qtensor import QTensor
from fewbit.ops.linear.gpu import FEW, Codes, Common, Ends, GpuKernel, GpuLinear, input_why_not, units
from fewbit.ops.linear.layouts import interleave, pack_block_scales, pack_scale_pairs, pack_tiles
from fewbit.ops.linear.problem import LinearProblem, LinearWeights
from fewbit.ops.linear.tiles import Tile


class Int4(GpuKernel):
    """INT4 in groups of 32, 64 or 128, with or without zeros. Inputs as they are, or E4M3 (one scale, or one a token).

    Prompts: the weight is decoded to a bfloat16 scratch for the library's product; under E4M3 inputs to an E4M3 scratch
    with a scale a row, which rounds it once more (what is largest in a row stays exact).
    """

    name = "int4"
    decodes = True

    def declines(self, problem: LinearProblem) -> str | None:
        """See `GpuKernel.declines`."""
        fmt = problem.quant.weight
        if fmt is None or fmt.element.name != "int4" or fmt.block[0] != 1 or fmt.block[1] not in (32, 64, 128):
            return f"holds INT4 in groups of 32, 64 or 128, not {fmt or 'unquantized weights'}"
        if fmt.scale not in (torch.bfloat16, torch.float16, torch.float32) or fmt.zero == "float":
            return f"holds scales in a float of 16 or 32 bits and whole zeros, not {fmt}"
        if problem.quant.input is not None and (problem.n % 16 or problem.k % 16):
            return "the library's FP8 product needs multiples of 16"
        return input_why_not(problem, "e4m3")

    def remark(self, problem: LinearProblem) -> str | None:
        """See `LinearKernel.remark`."""
        if problem.quant.input is None:
            return None
        return f"steps of more than {FEW} tokens multiply E4M3 copies of the weights, a scale a row: rounded once more"

    def weight_bytes(self, problem: LinearProblem) -> int:
        """See `LinearKernel.weight_bytes`."""
        fmt = problem.quant.weight
        assert fmt is not None
        group = fmt.scale_bits // 8 * (2 if _paired(fmt) else 1) + bool(fmt.zero)
        return problem.n * (problem.k // 2 + problem.k // fmt.block[1] * group)

    def join(self, pieces: Sequence[LinearWeights], gated: bool = False) -> GpuLinear:
        """See `GpuKernel.join`."""
        return _Int4Linear(pieces, gated)


class _FourLinear(GpuLinear):
    """What both have in common: tiles, and a scratch for prompts."""

    columns: int  # of a plane
    words: Tensor

    @property
    def padded_k(self) -> int:
        """Whole tiles."""
        return -(-self.k // (4 * self.columns)) * 4 * self.columns

    @property
    def blocks(self) -> int:
        """Tiles along K."""
        return self.padded_k // (4 * self.columns)

    def tile(self, m: int, ending: str) -> Tile:
        """See `GpuLinear.tile`; the reduction is cut in pieces of whole tiles."""
        cut = super().tile(m, ending)
        while not cut["gemv"] and self.blocks % cut["SPLIT"]:
            cut["SPLIT"] -= 1
        return cut

    @property
    def memory(self) -> Tensor:
        """See `GpuLinear.memory`."""
        return self.words.view(torch.uint8).view(-1)

    def _codes(self, pieces: Sequence[LinearWeights], flip: int, gated: bool) -> Tensor:
        codes = torch.cat([p.weight.codes for p in pieces]) ^ flip  # type: ignore[union-attr]
        return pack_tiles(interleave(codes) if gated else codes, self.columns)


class _Int4Linear(_FourLinear):
    kind = "int4"

    def __init__(self, pieces: Sequence[LinearWeights], gated: bool) -> None:
        super().__init__(pieces, gated)
        weights = [p.weight for p in pieces if isinstance(p.weight, QTensor)]
        group = weights[0].format.block[1]
        self.columns = 32 if group == 32 else 64
        self.per = 4 * self.columns // group
        order = interleave if gated else (lambda rows: rows)
        scale = order(torch.cat([w.scale for w in weights]))  # [N, groups]
        self.words = self._codes(pieces, 8, gated)  # two's complement to 0..15
        self.pairs = pack_scale_pairs(scale) if _paired(weights[0].format) else None
        # a scale of zero where there is no weight
        missing = self.padded_k // group - scale.shape[1], -self.n % 64
        self.scales = F.pad(scale, (0, missing[0], 0, missing[1])).t().contiguous()  # [groups, N64]
        self.zeros: Tensor | None = None
        if weights[0].zero is not None:
            zero = order(torch.cat([w.zero for w in weights if w.zero is not None]))
            self.zeros = F.pad(zero, (0, missing[0], 0, missing[1])).t().contiguous()
        # of the E4M3 scratch: the largest of 8 or, with zeros, 15 times a scale stays below 448
        fits = 32 if self.zeros is None else 16
        self.row = (scale.float().amax(1) / fits).clamp_min(1e-30) if self.rounding else None

    def rows_of(self, m: int) -> int:
        """The GEMV knows scales in pairs alone."""
        return m if self.pairs is not None else max(m, 2)

    def kind_of(self, m: int) -> str:
        """A GEMV that rounds its input is another."""
        return "w4a8" if self.rows_of(m) == 1 and self.rounding else "int4"

    @property
    def few_dtype(self) -> torch.dtype:
        """E4M3 numbers are bfloat16 numbers, which is what the weights become."""
        return self.act

    def _launch(self, cut: Tile, x: Tensor, scale: Tensor | None, tops: Tensor, ends: Ends, common: Common) -> None:
        from fewbit.ops.linear.triton_four import int4_gemm, int4_gemv

        m, grid, even = len(x), self._grid(cut, len(x)), self.k == self.padded_k
        if cut["gemv"]:
            rounding, given = self.rounds(scale)
            int4_gemv[grid](
                x.view(torch.int32), self.words.view(torch.int32), self.pairs, given, tops, *ends, self.n, self.k,
                KC=cut["KC"], NIT=cut["NIT"], EVEN=even, **rounding, **common,
            )  # fmt: skip
            return
        zeros, given = (self._none if t is None else t for t in (self.zeros, scale))
        int4_gemm[grid](
            x, self.words, self.scales, zeros, given, *ends, m, self.n, self.k, self.blocks, BM=cut["BM"],
            C=self.columns, PER=self.per, SPLIT=cut["SPLIT"], STAGES=cut["STAGES"], ASYM=self.zeros is not None,
            SX=units(scale), EVEN=even, PREFETCH=cut["PREFETCH"], **common,
        )  # fmt: skip

    def many(self, x: Tensor | Codes) -> Tensor:
        """See `GpuLinear.many`."""
        bias = None if self.bias is None else self.bias.to(torch.bfloat16)
        if isinstance(x, Codes):
            assert self.row is not None
            weight = self.decode(torch.float8_e4m3fn)
            out = torch._scaled_mm(
                x.x, weight.t(), scale_a=x.rows()[:, None], scale_b=self.row[None], out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )  # fmt: skip
            return out if bias is None else out + bias
        return F.linear(x, self.decode(torch.bfloat16), bias)

    def decode(self, dtype: torch.dtype) -> Tensor:
        """The weight [N, K] in a scratch that the next call uses again; E4M3: in units of `row`."""
        from fewbit.ops.linear.triton_four import int4_decode

        out = scratch(self.words.device, self.n * self.k, dtype).view(self.n, self.k)
        int4_decode[(-(-self.n // 64), self.blocks)](
            self.words, self.scales, self._none if self.zeros is None else self.zeros,
            self._none if self.row is None else self.row, out, self.n, self.k, self.blocks,
            C=self.columns, PER=self.per, ASYM=self.zeros is not None, ROWS=dtype == torch.float8_e4m3fn,
            PTX=self.on_gpu,
            num_warps=8,
        )  # fmt: skip
        return out


def _paired(fmt: Format) -> bool:
    """Whether the GEMV can take two neighbouring scales as one word."""
    return fmt.block[1] == 128 and fmt.zero is None and fmt.scale == torch.bfloat16


class Fp4(GpuKernel):
    """NVFP4 and MXFP4 weights. Inputs as they are, or rounded in blocks; no GPU before Blackwell multiplies those.

    All that is rounded so fits bfloat16. Prompts: decoded to a bfloat16 scratch for the library's product.
    """

    name = "fp4"
    decodes = True

    def declines(self, problem: LinearProblem) -> str | None:
        """See `GpuKernel.declines`."""
        fmt = problem.quant.weight
        if fmt is None or fmt.element.name != "e2m1" or fmt.block[0] != 1 or fmt.block[1] not in (16, 32):
            return f"holds NVFP4 and MXFP4, not {fmt or 'unquantized weights'}"
        given, how = problem.quant.input, problem.quant.input_scale
        blocks = given in (FORMATS["nvfp4"], FORMATS["mxfp4"])  # what their rounding is written for
        if given is not None and not (blocks and how == ("outer" if given.outer else "dynamic")):
            return f"cannot round inputs to {given} ({how})"
        return None

    def weight_bytes(self, problem: LinearProblem) -> int:
        """See `LinearKernel.weight_bytes`: half a byte a weight, a byte for 16."""
        return problem.n * (problem.k // 2 + problem.k // 16 + 4)

    def join(self, pieces: Sequence[LinearWeights], gated: bool = False) -> GpuLinear:
        """See `GpuKernel.join`."""
        return _Fp4Linear(pieces, gated)


class _Fp4Linear(_FourLinear):
    kind = "fp4"
    columns = 64

    def __init__(self, pieces: Sequence[LinearWeights], gated: bool) -> None:
        super().__init__(pieces, gated)
        weights = [p.weight for p in pieces if isinstance(p.weight, QTensor)]
        order = interleave if gated else (lambda rows: rows)
        stored = torch.cat([E.decode(w.scale) for w in weights if isinstance(E := w.format.scale, Element)])
        self.words = self._codes(pieces, 0, gated)
        self.scales, row = pack_block_scales(order(stored).repeat_interleave(weights[0].format.block[1] // 16, 1))
        outer = [row.new_ones(w.shape[0]) if w.outer is None else w.outer.float().expand(w.shape[0]) for w in weights]
        self.row = row * order(torch.cat(outer))  # float32 [N]

    @property
    def few_dtype(self) -> torch.dtype:
        """What a block's scale makes of E2M1 numbers are bfloat16 numbers."""
        return self.act

    def _launch(self, cut: Tile, x: Tensor, scale: Tensor | None, tops: Tensor, ends: Ends, common: Common) -> None:
        from fewbit.ops.linear.triton_four import fp4_gemm

        fp4_gemm[self._grid(cut, len(x))](
            x, self.words, self.scales, self.row, self._none if scale is None else scale, *ends, len(x), self.n, self.k,
            self.blocks, BM=cut["BM"], SPLIT=cut["SPLIT"], STAGES=cut["STAGES"], EVEN=self.k == self.padded_k,
            PREFETCH=cut["PREFETCH"], SX=units(scale), **common,
        )  # fmt: skip

    def many(self, x: Tensor | Codes) -> Tensor:
        """See `GpuLinear.many`."""
        bias = None if self.bias is None else self.bias.to(torch.bfloat16)
        if isinstance(x, Codes):
            out = (F.linear(x.x, self.decode()).float() * x.scale).to(torch.bfloat16)
            return out if bias is None else out + bias
        return F.linear(x, self.decode(), bias)

    def decode(self) -> Tensor:
        """The weight [N, K] in a scratch that the next call uses again."""
        from fewbit.ops.linear.triton_four import fp4_decode

        out = scratch(self.words.device, self.n * self.k, torch.bfloat16).view(self.n, self.k)
        fp4_decode[(-(-self.n // 64), self.blocks)](
            self.words, self.scales, self.row, out, self.n, self.k, self.blocks, PTX=self.on_gpu, num_warps=8
        )
        return out


_scratches: dict[torch.device, Tensor] = {}


def scratch(device: torch.device, numbers: int, dtype: torch.dtype) -> Tensor:
    """Uninitialized memory that all linears of a device share, one after the other."""
    size = numbers * dtype.itemsize
    held = _scratches.get(device)
    if held is None or held.numel() < size:
        _scratches[device] = held = torch.empty(size, dtype=torch.uint8, device=device)
    return held[:size].view(dtype)

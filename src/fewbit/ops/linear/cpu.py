"""Linears on a CPU, in C: `ops/cpu/linear.h` says what is computed, and how.

Integers and E2M1 are multiplied as integers. Where their QuantSpec leaves inputs as they are, the reference computes
the same with inputs in the format `rounding`.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbit.numerics.element import E2M1, E4M3, E8M0, INT8, Element
from fewbit.numerics.format import ALL, Format
from fewbit.numerics.qtensor import QTensor
from fewbit.ops.cpu.build import Library, library
from fewbit.ops.cpu.memory import zeros
from fewbit.ops.linear.problem import LinearProblem, LinearWeights

_ROWS = 16  # of a tile
_SPAN = 32  # inputs under a scale, unless the weights' groups are smaller
_BITS8, _BITS4, _E2M1, _BFLOAT16, _FLOAT32, _FLOAT8 = range(6)
_AS_IT_IS, _TO_INT8, _TO_E4M3, _TO_NVFP4, _TO_MXFP4 = range(5)
_HALF = {
    _BITS8: 128,
    _BITS4: 8,
    _E2M1: 12,
}  # what is added to a value (of E2M1, to twice the value), so that it is >= 0
_PIECE = 1 << 24  # weights packed at a time
_SHARE = 1 << 18  # products that are worth waking the other threads for


class Linear(ctypes.Structure):
    """`Linear` of linear.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "zeros", "row", "bias", "prescale")),
        *((name, ctypes.c_int64) for name in ("n", "k", "columns", "group", "span")),
        *((name, ctypes.c_int32) for name in ("kind", "zero", "scales_float", "rounding")),
        ("input_scale", ctypes.c_float),
    )


@dataclass(frozen=True)
class Prepared:
    """A linear in memory: `linear` is what C reads, `tensors` what it points to."""

    linear: Linear
    tensors: tuple[Tensor | None, ...]

    @property
    def address(self) -> int:
        """Of `linear`."""
        return ctypes.addressof(self.linear)


class Cpu:
    """Products of integers, and of floats.

    Integers: INT2 to INT8 and E2M1 weights with a scale a row or in groups, inputs as they are (which are rounded),
    INT8 under one scale, NVFP4 or MXFP4. Floats: E4M3 weights with a scale a row, inputs as they are or in E4M3;
    unquantized weights as they are stored.
    """

    name = "cpu"
    device: str | None = "cpu"

    def __init__(self, variant: str | None = None) -> None:
        """`variant`: the instruction set; None: the best that this processor has."""
        self._variant = variant

    def why_not(self, problem: LinearProblem) -> str | None:
        """See `LinearKernel.why_not`."""
        if problem.device.kind != "cpu":
            return "needs a CPU"
        if reason := _weight_why_not(problem.quant.weight) or _input_why_not(problem):
            return reason
        if problem.dtype != torch.float32:
            return f"computes in float32, the model in {str(problem.dtype).removeprefix('torch.')}"
        if problem.exact:  # with or without a compiler: what is made or judged so must not depend on one
            does = "adds up in an order of its own" if _keeps_inputs(problem) else "multiplies inputs as INT8"
            return f"{does}, and exact arithmetic was asked for"
        built = library()
        return built if isinstance(built, str) else None

    def remark(self, problem: LinearProblem) -> str | None:
        """See `LinearKernel.remark`."""
        if _keeps_inputs(problem):
            return None
        assert problem.quant.weight is not None
        return f"rounds inputs to INT8 in groups of {_span(problem.quant.weight)}; --exact leaves them as they are"

    def weight_bytes(self, problem: LinearProblem) -> int:
        """See `LinearKernel.weight_bytes`."""
        fmt, rows = problem.quant.weight, -(-problem.n // _ROWS) * _ROWS
        if fmt is None:
            return rows * (problem.k * (2 if problem.stored == torch.bfloat16 else 4) + 8)
        if fmt.element == E4M3:
            return rows * (problem.k + 8)
        columns = _columns(problem.k, fmt)
        groups = -(-columns // fmt.block[1]) if fmt.grouped else 0
        scale = 4 if fmt.scale in (torch.float32, torch.float16) else 2
        return rows * (columns * (4 if _kind(fmt) != _BITS8 else 8) // 8 + groups * (scale + bool(fmt.zero)) + 8)

    def prepare(self, weights: LinearWeights, dtype: torch.dtype) -> Prepared:
        """See `LinearKernel.prepare`."""
        w, quant = weights.weight, weights.quant
        n, k = w.shape
        bias = torch.zeros(n, dtype=torch.float32, device="cpu") if weights.bias is None else weights.bias.float()
        prescale = None if weights.prescale is None else weights.prescale.float().contiguous()
        if isinstance(w, Tensor):
            codes = _floats(w if w.dtype == torch.bfloat16 else w.float())
            kind = _BFLOAT16 if w.dtype == torch.bfloat16 else _FLOAT32
            tensors = codes, None, None, _by_tile(torch.ones_like(bias)[:, None]), _by_tile(bias[:, None]), prescale
            return _prepared(tensors, n, k, k, k, k, kind, 0, 0, _AS_IT_IS, 0.0)
        fmt = w.format
        given = float(weights.input_scale) if quant.calibrated and weights.input_scale is not None else 0.0
        if fmt.element == E4M3:
            # its NaN is no number for C: a row that has one is NaN by its scale
            row = w.scales().expand(n, 1).masked_fill((w.codes & 0x7F == 0x7F).any(1, keepdim=True), math.nan)
            tensors = _floats(w.codes), None, None, _by_tile(row), _by_tile(bias[:, None]), prescale
            to = _AS_IT_IS if quant.input is None else _TO_E4M3
            return _prepared(tensors, n, k, k, k, k, _FLOAT8, 0, 0, to, given)
        columns, kind = _columns(k, fmt), _kind(fmt)
        scales, row = _scales(w)
        zeros = None if w.zero is None else (w.zero.to(torch.int16) + _HALF[kind]).to(torch.uint8).expand(n, -1)
        by_row = (t if t is None else _by_tile(t) for t in (scales, zeros, row, bias[:, None]))
        return _prepared(
            (_packed(w, columns), *by_row, prescale), n, k, columns,
            fmt.block[1] if fmt.grouped else columns,
            _span(fmt) if quant.input is None or quant.input.grouped else columns,
            kind, _HALF[kind], scales is not None and scales.dtype == torch.float32,
            _rounding(quant.input), given,
        )  # fmt: skip

    def run(self, x: Tensor, prepared: Prepared) -> Tensor:
        """See `LinearKernel.run`."""
        built = library()
        assert isinstance(built, Library)
        x, w = x.contiguous(), prepared.linear
        out = torch.empty(*x.shape[:-1], w.n, dtype=x.dtype)
        rows = x.numel() // w.k
        # all of torch's threads or none: OpenMP ends and starts threads when a team is not as large as the last
        threads = torch.get_num_threads() if rows * w.n * w.k >= _SHARE else 1
        call = built.call("linear", self._variant)
        if rows and call(prepared.address, x.data_ptr(), out.data_ptr(), rows, threads):
            raise MemoryError(f"no memory for {rows} rounded inputs of {w.k}")
        return out


def _prepared(tensors: tuple[Tensor | None, ...], *numbers: float) -> Prepared:
    return Prepared(Linear(*(None if t is None else t.data_ptr() for t in tensors), *numbers), tensors)


def _keeps_inputs(problem: LinearProblem) -> bool:
    """Whether inputs are rounded to nothing but what the QuantSpec says."""
    weight = problem.quant.weight
    return problem.quant.input is not None or weight is None or weight.element == E4M3


def rounding(weight: Format) -> Format:
    """What inputs of integer products are rounded to that a QuantSpec leaves as they are: INT8 in groups."""
    return Format(f"int8_g{_span(weight)}_f32", INT8, (1, _span(weight)))


def _span(weight: Format) -> int:
    return math.gcd(weight.block[1], _SPAN) if weight.grouped else _SPAN


def _rounding(fmt: Format | None) -> int:
    if fmt is None or fmt.element == INT8:
        return _TO_INT8
    return _TO_NVFP4 if fmt.scale == E4M3 else _TO_MXFP4


def _columns(k: int, fmt: Format) -> int:
    return -(-k // _span(fmt)) * _span(fmt)


def _kind(fmt: Format) -> int:
    return _E2M1 if fmt.element == E2M1 else _BITS4 if fmt.element.bits <= 4 else _BITS8


def _weight_why_not(fmt: Format | None) -> str | None:
    if fmt is None:
        return None
    if not (fmt.element.integer or fmt.element in (E2M1, E4M3)):
        return f"holds integers, E2M1 and E4M3, not {fmt}"
    if fmt.element == E4M3:
        return f"holds E4M3 with one scale a row, not {fmt}" if fmt.grouped or fmt.block[0] not in (1, ALL) else None
    if fmt.block[0] != 1 and fmt.block != (ALL, ALL):
        return f"holds scales of rows and of groups in a row, not {fmt}"
    if fmt.act_order or fmt.zero == "float":
        return f"needs groups in the order of their columns and whole zeros, not {fmt}"
    if _span(fmt) % 8:
        return f"needs groups of whole eights, not {fmt}"
    known = (torch.float32, torch.float16, torch.bfloat16, E4M3, E8M0)
    return None if fmt.scale in known else f"cannot hold the scales of {fmt}"


def _input_why_not(problem: LinearProblem) -> str | None:
    fmt, how = problem.quant.input, problem.quant.input_scale
    if fmt is None:
        return None
    weight = problem.quant.weight
    if weight is None:
        return f"multiplies inputs in {fmt} with no unquantized weights"
    if (weight.element == E4M3) != (fmt.element == E4M3) or fmt.element not in (INT8, E2M1, E4M3):
        return f"multiplies no inputs in {fmt} with {weight}"
    if fmt.element == E2M1:
        known = (fmt.scale == E4M3 and how == "outer") or (fmt.scale == E8M0 and how == "dynamic")
        fits = fmt.block == (1, _span(weight)) and weight.grouped
        return None if known and fits else f"cannot round inputs to {fmt} ({how}) for {weight}"
    alone = how == "static" or (how == "dynamic" and fmt.block[0] == 1)  # a token's scale is its own
    if fmt.grouped or fmt.zero or fmt.scale != torch.float32 or not alone:
        return f"cannot round inputs to {fmt} ({how})"
    if fmt.element == INT8 and weight.grouped:
        return f"under inputs in {fmt} it needs weights with a scale a row, not {weight}"
    return None if problem.k <= 1 << 16 else f"adds up 65,536 products of a row in 32 bits, not {problem.k}"


def _by_tile(values: Tensor) -> Tensor:
    """[n, groups] to [n / 16, groups, 16], filled up with zeros."""
    tiles = F.pad(values, (0, 0, 0, -len(values) % _ROWS)).unflatten(0, (-1, _ROWS)).transpose(1, 2)
    return zeros(tiles.shape, values.dtype).copy_(tiles)


def _scales(w: QTensor) -> tuple[Tensor | None, Tensor]:
    """Scales of groups as the kernel reads them [n, groups], and of rows, float32 [n, 1]; both exact."""
    n, stored = w.shape[0], w.format.scale
    unit = 0.5 if w.format.element == E2M1 else 1.0  # codes are read as twice the value
    if not w.format.grouped:
        return None, w.scales().expand(n, 1) * unit
    row = torch.full((n, 1), unit, dtype=torch.float32, device="cpu") * (1.0 if w.outer is None else w.outer.float())
    if isinstance(stored, Element):  # few bits of mantissa: bfloat16 has them all
        return stored.decode(w.scale).bfloat16(), row
    return w.scale if stored == torch.bfloat16 else w.scale.float(), row


def _floats(w: Tensor) -> Tensor:
    """[n, k] as linear.h wants it: [tiles, k, 16]."""
    n, k = w.shape
    out = zeros((-(-n // _ROWS), k, _ROWS), w.dtype)
    whole = n // _ROWS
    out[:whole].copy_(w[: whole * _ROWS].unflatten(0, (-1, _ROWS)).transpose(1, 2))
    out[whole:, :, : n % _ROWS].copy_(w[whole * _ROWS :].T)
    return out


def _packed(w: QTensor, columns: int) -> Tensor:
    """Codes as linear.h wants them: uint8 [tiles, columns / 4, 16, 4], 4-bit ones [tiles, columns / 8, 16, 4]."""
    n, k = w.shape
    kind, bits = _kind(w.format), w.format.element.bits
    tiles, step = -(-n // _ROWS), max(1, _PIECE // k // _ROWS)
    out = zeros((tiles, columns // (4 if kind == _BITS8 else 8), _ROWS, 4), torch.uint8)
    for target, codes in zip(out.split(step), w.codes.split(step * _ROWS), strict=True):
        if kind != _E2M1:  # two's complement of `bits` bits, to what is never negative
            codes = (codes ^ (1 << (bits - 1))) + (_HALF[kind] - (1 << (bits - 1)))
        codes = F.pad(codes, (0, columns - k, 0, -len(codes) % _ROWS)).unflatten(0, (-1, _ROWS))
        if kind == _BITS8:
            target.copy_(codes.unflatten(2, (-1, 4)).transpose(1, 2))
        else:
            pair = codes.unflatten(2, (-1, 2, 4)).transpose(1, 2)  # [tiles, columns / 8, 16, 2, 4]
            torch.bitwise_or(pair[..., 0, :], pair[..., 1, :] << 4, out=target)
    return out

"""Element sets: which numbers a code of a few bits stands for, and how a number is rounded to one of them.

Codes are raw bit patterns, one to a ``uint8``; packing several into a byte is `pack.py`'s business.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Element:
    """A set of numbers with a code each.

    Attributes:
        name: the field's name for it, such as ``e4m3``.
        bits: width of a code.
        values: the value of each of the ``2**bits`` codes, in code order. NaN and infinity stand where a code means
            them: reading keeps them, rounding never makes them (it saturates at the largest finite value).
        native: a torch dtype with the same codes, used where it is faster than the table.
    """

    name: str
    bits: int
    values: tuple[float, ...] = field(repr=False)
    native: torch.dtype | None = field(default=None, compare=False)

    @functools.cached_property
    def max(self) -> float:
        """The largest finite value."""
        return max(v for v in self.values if math.isfinite(v))

    @functools.cached_property
    def min(self) -> float:
        """The smallest finite value (positive for e8m0)."""
        return min(v for v in self.values if math.isfinite(v))

    @functools.cached_property
    def digits(self) -> tuple[int, int]:
        """Of a small float: bits of its mantissa, exponent of its smallest normal number."""
        smallest = min(v for v in self.values if v > 0)  # the first subnormal: one step
        steps = [b - a for a, b in itertools.pairwise(v for v in self.values if math.isfinite(v) and v >= 0)]
        mantissa = (1 + sum(1 for step in steps if step == smallest)).bit_length() - 2
        return mantissa, math.frexp(smallest)[1] - 1 + mantissa

    @property
    def integer(self) -> bool:
        """Whether the values are the whole numbers of two's complement."""
        return self.name.startswith("int")

    def decode(self, codes: Tensor) -> Tensor:
        """Values of codes, float32, same shape."""
        if self.native is not None:
            return codes.view(self.native).float()
        if self.integer:
            half = 1 << (self.bits - 1)
            return ((codes ^ half).to(torch.int16) - half).float()
        return _table(self, codes.device)[codes.int()]

    def encode(self, x: Tensor) -> Tensor:
        """Codes (uint8) of the nearest values to `x`: ties to the even code, saturating, the sign of zero kept.

        `x` is float32 and finite; the caller has looked (a NaN has no nearest value).
        """
        if self.integer:
            rounded = x.round().clamp_(self.min, self.max).to(torch.int8).view(torch.uint8)
            return rounded if self.bits == 8 else rounded.bitwise_and_((1 << self.bits) - 1)
        if self.native is not None and self.native != torch.float8_e8m0fnu:
            return x.clamp(self.min, self.max).to(self.native).view(torch.uint8)
        magnitude = x if self._ascending else x.abs()
        code = torch.zeros_like(x, dtype=torch.uint8)
        for below, middle in enumerate(self._middles):
            # codes count up with the value, so the even neighbour of a tie is known by its place
            code += magnitude >= middle if below % 2 else magnitude > middle
        if not self._ascending:
            code |= torch.signbit(x).to(torch.uint8) << (self.bits - 1)
        return code

    @functools.cached_property
    def _ascending(self) -> bool:
        """Whether codes count up with the value from the lowest on; else their top bit is a sign."""
        return all(a < b for a, b in itertools.pairwise(v for v in self.values if math.isfinite(v)))

    @functools.cached_property
    def _middles(self) -> tuple[float, ...]:
        """The points half way between neighbours among the finite values (of a signed set the positive ones)."""
        rising = [v for v in self.values if math.isfinite(v) and (self._ascending or math.copysign(1, v) > 0)]
        return tuple((a + b) / 2 for a, b in itertools.pairwise(rising))


@functools.cache
def _table(element: Element, device: torch.device) -> Tensor:
    return torch.tensor(element.values, dtype=torch.float32, device=device)


def integer(bits: int) -> Element:
    """Two's complement of `bits` bits."""
    half = 1 << (bits - 1)
    values = tuple(float(c if c < half else c - 2 * half) for c in range(2 * half))
    return Element(f"int{bits}", bits, values, torch.int8 if bits == 8 else None)


def minifloat(exponent: int, mantissa: int, special: str | None = None, native: torch.dtype | None = None) -> Element:
    """A small float with sign, `exponent` and `mantissa` bits, bias ``2**(exponent-1) - 1`` and subnormals.

    `special` says what the top codes mean: ``"nan"``: only the very last is NaN (OCP E4M3); ``"ieee"``: the whole top
    exponent is infinity and NaN (E5M2); None: all are numbers (E2M1, E2M3).
    """
    bias = 2 ** (exponent - 1) - 1

    def magnitude(code: int) -> float:
        e, m = code >> mantissa, code & (2**mantissa - 1)
        if special == "nan" and code == 2 ** (exponent + mantissa) - 1:
            return math.nan
        if special == "ieee" and e == 2**exponent - 1:
            return math.inf if m == 0 else math.nan
        fraction = m / 2**mantissa
        return math.ldexp(fraction, 1 - bias) if e == 0 else math.ldexp(1 + fraction, e - bias)

    positive = [magnitude(code) for code in range(2 ** (exponent + mantissa))]
    values = tuple(positive + [-v for v in positive])
    return Element(f"e{exponent}m{mantissa}", 1 + exponent + mantissa, values, native)


INT2, INT3, INT4, INT6, INT8 = (integer(bits) for bits in (2, 3, 4, 6, 8))
UINT4 = Element("uint4", 4, tuple(float(c) for c in range(16)))
E2M1 = minifloat(2, 1)
E4M3 = minifloat(4, 3, "nan", torch.float8_e4m3fn)
E5M2 = minifloat(5, 2, "ieee", torch.float8_e5m2)
E8M0 = Element(
    "e8m0", 8, tuple([2.0 ** (c - 127) for c in range(255)] + [math.nan]), torch.float8_e8m0fnu
)  # a power of two, no sign: the scale of the OCP MX formats
NF4 = Element(
    "nf4",
    4,
    (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
)  # quantiles of a normal distribution, scaled to [-1, 1] (QLoRA, arXiv 2305.14314, appendix E)
ELEMENTS = {e.name: e for e in (INT2, INT3, INT4, INT6, INT8, UINT4, NF4, E2M1, E4M3, E5M2, E8M0)}

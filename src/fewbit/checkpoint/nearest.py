"""The numerics nearest to given ones among those that a target can say."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

from fewbit.numerics.format import ALL, FORMATS, Format
from fewbit.numerics.quantspec import InputScale, KVSpec, QuantSpec

_INPUTS: tuple[tuple[str, InputScale], ...] = (
    ("fp8", "static"),
    ("int8", "static"),
    ("nvfp4", "outer"),
    ("fp8_row", "dynamic"),
    ("int8_row", "dynamic"),
    ("mxfp8", "dynamic"),
    ("mxfp4", "dynamic"),
)
"""How inputs come in the formats that are written; those with a calibrated scale need one to start from."""


def nearest_linear(was: QuantSpec, sayable: Callable[[QuantSpec], bool]) -> QuantSpec | None:
    """The nearest numerics of a linear: never fewer bits where as many will do, then the same elements and inputs.

    Args:
        was: the numerics to come near to.
        sayable: whether the target can say a candidate.
    """
    inputs: list[tuple[Format | None, InputScale]] = [(was.input, was.input_scale), (None, "dynamic")]
    inputs += [(FORMATS[name], scale) for name, scale in _INPUTS if scale == "dynamic" or was.calibrated]
    candidates = (QuantSpec(w, i, s) for w, (i, s) in itertools.product(FORMATS.values(), inputs))
    return min(filter(sayable, candidates), key=lambda candidate: distance(was, candidate), default=None)


def nearest_kv(was: KVSpec, sayable: Callable[[KVSpec], bool]) -> KVSpec | None:
    """The nearest format of K and V; see `nearest_linear`."""
    candidates = [KVSpec(fmt, fmt) for fmt in FORMATS.values() if not fmt.grouped]
    return min(filter(sayable, candidates), key=lambda kv: _weight_distance(was.k, kv.k), default=None)


def distance(was: QuantSpec, other: QuantSpec) -> tuple[float, ...]:
    """How far numerics are from given ones, for `min`: what counts most comes first."""
    assert was.weight is not None
    assert other.weight is not None
    return *_weight_distance(was.weight, other.weight)[:3], *_input_distance(was, other), *_weight_distance(
        was.weight, other.weight
    )[3:]  # fmt: skip


def _weight_distance(was: Format, other: Format) -> tuple[float, ...]:
    bits = other.element.bits - was.element.bits
    share, theirs = _sharing(was), _sharing(other)
    return (
        bits < 0,
        abs(bits),
        other.element != was.element,
        other.scale != was.scale,
        other.zero != was.zero,
        theirs > share,
        abs(math.log2(theirs / share)),
    )


def _input_distance(was: QuantSpec, other: QuantSpec) -> tuple[float, ...]:
    mine, theirs = (16 if q.input is None else q.input.element.bits for q in (was, other))
    elements = [None if q.input is None else q.input.element for q in (was, other)]
    return theirs < mine, abs(theirs - mine), elements[0] != elements[1], was.input_scale != other.input_scale


def _sharing(fmt: Format) -> int:
    """How many weights share a scale, for a matrix of some size."""
    rows, columns = (4096 if size == ALL else size for size in fmt.block)
    return rows * columns

"""The kernels that choose scales and round columns, against the reference. On a CPU through Triton's interpreter."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from fewbit.numerics import reference
from fewbit.numerics.element import ELEMENTS
from fewbit.numerics.format import FORMATS
from fewbit.numerics.qtensor import uncoded
from fewbit.ops.rounding.rounding import round_columns, round_columns_by_kernel, search, searched
from interpreter import DEVICE

INT4 = [name for name in FORMATS if name.startswith("int4_g")]


def test_every_group_of_int4_is_searched_by_the_kernel():
    assert [name for name, fmt in FORMATS.items() if searched(fmt)] == INT4


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("name", INT4)
def test_the_search_finds_what_the_reference_finds(name, weighted):
    fmt = FORMATS[name]
    torch.manual_seed(len(name))
    x = torch.randn(37, 3 * fmt.block[1]) * torch.rand(37, 1).exp() * 0.1
    x[3], x[4, : fmt.block[1]], x[5] = 0.0, 1e-42, x[5].abs() + 1.0  # nothing; almost nothing; all of one sign
    importance = torch.rand(x.shape[1]).square() + 0.01 if weighted else None
    scale, zero = (None if t is None else t.cpu() for t in search(
        x.to(DEVICE), fmt, None if importance is None else importance.to(DEVICE)))  # fmt: skip
    expected, _, expected_zero = reference.choose_scale(x, fmt, None, importance)
    assert scale.dtype == expected.dtype
    assert scale.shape == expected.shape

    def errors(scale, zero):
        off = (reference.round_to(x, uncoded(fmt, scale, None, zero)).dequantize() - x).double().square()
        return (off if importance is None else off * importance).unflatten(1, (-1, fmt.block[1])).sum(-1)

    mine, theirs = errors(scale, zero), errors(expected, expected_zero)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-30)  # equal but for the order of sums
    same = scale == expected if zero is None else (scale == expected) & (zero == expected_zero)
    assert same.double().mean() > 0.98


@pytest.mark.parametrize("width", [128, 96, 5])
@pytest.mark.parametrize(("name", "asym"), [("int4", False), ("int4", True), ("int8", False), ("e2m1", False),
                                            ("e4m3", False), ("e5m2", False)])  # fmt: skip
def test_columns_are_rounded_as_the_reference_rounds_them(name, asym, width):
    element = ELEMENTS[name]
    torch.manual_seed(width)
    w = torch.randn(45, width)
    upper = (torch.randn(width, width) * 0.05).triu(1) + torch.diag(torch.rand(width) + 0.5)
    scale = (torch.rand(45, width) + 0.5) * 3 / element.max  # some saturate
    zero = torch.randint(-3, 4, (45, width)).float() if asym else None
    given = [None if t is None else t.to(DEVICE) for t in (w, upper, scale, zero)]
    codes, errors = (t.cpu() for t in round_columns_by_kernel(*given, element))
    expected, wanted = round_columns(w, upper, scale, zero, element)
    # where a number lies between two codes to the last bit, the row goes another way from there on
    alike = (element.decode(codes) == element.decode(expected)).all(1)
    assert alike.double().mean() > 0.9
    torch.testing.assert_close(errors[alike], wanted[alike], rtol=1e-4, atol=1e-5)


def test_digits_of_small_floats():
    assert [ELEMENTS[n].digits for n in ("e2m1", "e4m3", "e5m2")] == [(1, 0), (3, -6), (2, -14)]

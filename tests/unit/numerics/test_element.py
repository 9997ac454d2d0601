"""Element sets: every code means a number, and every number goes to the nearest code as the hardware does it."""

import itertools
import math

import pytest
import torch

from fewbit.numerics.element import E2M1, E4M3, E5M2, E8M0, ELEMENTS, INT3, INT4, INT8, NF4, UINT4, Element, minifloat

NATIVE = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2, E8M0: torch.float8_e8m0fnu}


def name(element: Element) -> str:
    return element.name


def without_native(element: Element) -> Element:
    """The same set, rounded by the table."""
    return Element(element.name, element.bits, element.values)


def awkward(element: Element) -> torch.Tensor:
    """All values of a set, the points half way between them, the floats next to each, and numbers far outside."""
    values = sorted({v for v in element.values if math.isfinite(v)})
    points = torch.tensor(values + [(a + b) / 2 for a, b in itertools.pairwise(values)])
    near = [points, points.nextafter(torch.tensor(math.inf)), points.nextafter(torch.tensor(-math.inf))]
    far = [element.max * f for f in (1.01, 1.1, 2, 1e6, 1e30) if element.max * f < 3e38]
    ends = torch.tensor([0.0, 1e-45, 1e-38, *far])
    x = torch.cat([*near, ends])
    x = torch.cat([x, -x]) if element.min < 0 else x[x > 0]
    return x[x.isfinite()]


@pytest.mark.parametrize("element", ELEMENTS.values(), ids=name)
def test_every_code_comes_back(element):
    codes = torch.arange(2**element.bits, dtype=torch.int32).to(torch.uint8)
    values = element.decode(codes)
    finite = values.isfinite()
    assert torch.equal(element.encode(values[finite]), codes[finite])
    expected = torch.tensor(element.values)
    assert torch.equal(values.nan_to_num(-1.5), expected.nan_to_num(-1.5))
    assert torch.equal(torch.signbit(values[finite]), torch.signbit(expected[finite]))


@pytest.mark.parametrize("element", NATIVE, ids=name)
def test_the_table_says_what_torch_says(element):
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    theirs = codes.view(NATIVE[element]).float()
    assert torch.equal(without_native(element).decode(codes).nan_to_num(-1.5), theirs.nan_to_num(-1.5))


@pytest.mark.parametrize("element", [E4M3, E5M2], ids=name)
@pytest.mark.parametrize("table", [False, True], ids=["native", "table"])
def test_rounds_as_torch_casts(element, table):
    x = awkward(element)
    theirs = x.clamp(element.min, element.max).to(NATIVE[element]).view(torch.uint8)
    mine = (without_native(element) if table else element).encode(x)
    wrong = mine != theirs
    assert not wrong.any(), (x[wrong], mine[wrong], theirs[wrong])


@pytest.mark.parametrize("element", [E4M3, E5M2], ids=name)
def test_every_half_precision_number_rounds_as_torch_casts(element):
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
        x = x[x.isfinite()]
        theirs = x.clamp(element.min, element.max).to(NATIVE[element]).view(torch.uint8)
        assert torch.equal(element.encode(x), theirs)
        assert torch.equal(without_native(element).encode(x), theirs)


@pytest.mark.slow
@pytest.mark.parametrize("element", [E4M3, E5M2], ids=name)
def test_the_table_rounds_a_dense_sweep_of_all_floats_as_torch_casts(element):
    table = without_native(element)
    for low in range(-(2**31), 2**31, 2**26):
        bits = torch.arange(low, low + 2**26, 61, dtype=torch.int64).to(torch.int32)
        x = bits.view(torch.float32)
        x = x[x.isfinite()]
        theirs = x.clamp(element.min, element.max).to(NATIVE[element]).view(torch.uint8)
        assert torch.equal(table.encode(x), theirs)


@pytest.mark.parametrize("element", [E2M1, INT3, INT4, INT8, UINT4, minifloat(2, 3)], ids=name)
def test_rounds_to_the_nearest_by_brute_force_ties_to_even(element):
    x = awkward(element)
    values = torch.tensor(element.values, dtype=torch.float64)
    codes = element.encode(x).long()
    distance = (x.double().clamp(element.min, element.max)[:, None] - values).abs()
    nearest = distance.amin(-1)
    assert torch.equal(distance.gather(1, codes[:, None])[:, 0], nearest)
    tied = (distance == nearest[:, None]).sum(-1) > 1  # also at zero, where both codes are even
    assert (codes[tied] % 2 == 0).all()
    assert (tied & (nearest > 0)).any()


def test_nf4_rounds_to_the_nearest_of_its_sixteen():
    x = torch.linspace(-1.3, 1.3, 1001)
    distance = (x[:, None] - torch.tensor(NF4.values)).abs()
    taken = distance.gather(1, NF4.encode(x).long()[:, None])[:, 0]
    assert (taken <= distance.amin(-1) + 1e-6).all()
    assert (NF4.min, NF4.max, NF4.values[7]) == (-1, 1, 0)


def test_an_unsigned_set_has_nothing_below_zero():
    assert UINT4.encode(torch.tensor([-3.0, -0.2, 0.4, 15.4, 99.0])).tolist() == [0, 0, 0, 15, 15]
    assert not UINT4.integer  # which would be two's complement


def test_e2m1_is_the_eight_numbers_and_their_negatives():
    assert E2M1.values == (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.0001, 1e9])
    assert E2M1.decode(E2M1.encode(x)).tolist() == [0, 1, 1, 2, 2, 4, 4, 6, 6]
    assert E2M1.encode(torch.tensor([-0.0, -0.1, -0.25])).tolist() == [8, 8, 8]


def test_the_sign_of_zero_is_kept():
    for element in (E2M1, E4M3, E5M2):
        for kind in (element, without_native(element)):
            assert torch.signbit(kind.decode(kind.encode(torch.tensor([0.0, -0.0])))).tolist() == [False, True]


def test_rounding_saturates_and_never_makes_infinity_or_nan():
    x = torch.tensor([1e30, -1e30, 449.0, 465.0, 57345.0, 65535.0])
    for element in (E2M1, E4M3, E5M2, INT4, INT8):
        y = element.decode(element.encode(x))
        assert y.isfinite().all()
        assert y[0] == element.max
        assert y[1] == element.min


def test_subnormals_of_the_eight_bit_floats():
    step = 2.0**-9
    assert E4M3.decode(E4M3.encode(torch.tensor([step, 3 * step, 2.5 * step, 0.5 * step, 0.6 * step]))).tolist() == [
        step,
        3 * step,
        2 * step,
        0,
        step,
    ]


def test_a_power_of_two_scale_rounds_to_the_nearest_power():
    x = torch.tensor([1.0, 1.4, 1.6, 2.0**-127, 2.0**-130, 3e38])
    assert E8M0.decode(E8M0.encode(x)).tolist() == [1, 1, 2, 2.0**-127, 2.0**-127, 2.0**127]


def test_ranges():
    assert (E4M3.max, E5M2.max, E2M1.max) == (448, 57344, 6)
    assert (INT4.min, INT4.max, INT8.min, INT8.max) == (-8, 7, -128, 127)
    assert minifloat(2, 3).max == 7.5

"""Laws of numbers in few bits, tried on whatever hypothesis can think of."""

import itertools
import math

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fewbit.numerics.element import E2M1, E4M3, E5M2, ELEMENTS, INT4, INT8, NF4
from fewbit.numerics.format import ALL, FORMATS
from fewbit.numerics.pack import pack_nibbles, pack_words, unpack_nibbles, unpack_words
from fewbit.numerics.qtensor import cat
from fewbit.numerics.reference import fake_quantize, quantize

formats = st.sampled_from(list(FORMATS.values()))
floats = st.floats(-(2.0**100), 2.0**100, width=32) | st.sampled_from([0.0, -0.0, 2.0**-126, 2.0**-149, 0.25, 2.5, 5.0])


@st.composite
def weights(draw, fmt):
    """A matrix that `fmt` can cut into blocks: a few drawn numbers spread over noise of a drawn size."""
    rows, cols = (8 if b in (1, ALL) else b for b in fmt.block)
    shape = (rows * draw(st.integers(1, 2)), cols * draw(st.integers(1, 3)))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**32))))
    x = noise * 2.0 ** draw(st.integers(-40, 40))
    for value in draw(st.lists(floats, max_size=8)):
        x[draw(st.integers(0, shape[0] - 1)), draw(st.integers(0, shape[1] - 1))] = value
    return x


@st.composite
def format_and_weights(draw):
    fmt = draw(formats)
    return fmt, draw(weights(fmt))


@given(format_and_weights())
def test_quantizing_what_came_back_changes_nothing(case):
    fmt, x = case
    q = quantize(x, fmt)
    w = q.dequantize()
    assume(w.isfinite().all())
    again = quantize(w, fmt, scale=q.scale, outer=q.outer, zero=q.zero)
    assert torch.equal(again.dequantize(), w)


@given(format_and_weights())
def test_scales_are_positive_and_finite_and_nothing_becomes_nan(case):
    fmt, x = case
    q = quantize(x, fmt)
    assert (q.scales() > 0).all()
    assert q.scales().isfinite().all()
    assert not q.dequantize().isnan().any()


@given(format_and_weights())
def test_rounding_is_to_a_nearest_number_of_the_format(case):
    """No other code under the same scale lies closer (up to the rounding of float32 itself)."""
    fmt, x = case
    q = quantize(x, fmt)
    finite = torch.tensor([c for c, v in enumerate(fmt.element.values) if math.isfinite(v)], dtype=torch.uint8)
    sample = finite if len(finite) <= 16 else finite[torch.randperm(len(finite))[:16]]
    mine = (q.dequantize().double() - x.double()).abs()
    for code in sample.tolist():
        other = type(q)(fmt, torch.full_like(q.codes, code), q.scale, q.outer, q.zero).dequantize().double()
        assert (mine <= (other - x.double()).abs() + 1e-6 * (other.abs() + x.double().abs())).all()


@given(format_and_weights(), st.integers(-20, 20))
def test_a_power_of_two_goes_straight_through(case, exponent):
    """Scaling by a power of two scales the result, where neither scales nor codes meet the end of their range."""
    fmt, x = case
    x = x.clamp(-(2.0**40), 2.0**40)
    assume((x[x != 0].abs() > 2.0**-60).all())
    factor = 2.0**exponent
    assert torch.equal(quantize(x * factor, fmt).dequantize(), quantize(x, fmt).dequantize() * factor)


@given(format_and_weights(), st.data())
def test_a_slice_of_codes_is_a_slice_of_the_weight(case, data):
    fmt, x = case
    q = quantize(x, fmt)
    dim = data.draw(st.sampled_from([-2, -1]))
    step = 1 if fmt.block[dim] == ALL else fmt.block[dim]
    blocks = x.shape[dim] // step
    start = data.draw(st.integers(0, blocks - 1))
    stop = data.draw(st.integers(start + 1, blocks))
    cut = q.slice(dim, start * step, stop * step)
    assert torch.equal(cut.dequantize(), q.dequantize().narrow(dim, start * step, (stop - start) * step))


@given(format_and_weights(), st.data())
def test_joining_what_was_cut_gives_it_back(case, data):
    fmt, x = case
    q = quantize(x, fmt)
    step = max(fmt.block[0], 1)
    blocks = x.shape[0] // step
    cuts = sorted({0, blocks, *data.draw(st.lists(st.integers(0, blocks), max_size=3))})
    pieces = [q.slice(-2, a * step, b * step) for a, b in itertools.pairwise(cuts)]
    assert cat(pieces).equal(q)


@given(format_and_weights())
def test_rows_do_not_know_each_other_where_a_scale_spans_one(case):
    fmt, x = case
    if fmt.block[0] == 1 and not fmt.outer:
        assert torch.equal(fake_quantize(x, fmt)[3:5], fake_quantize(x[3:5], fmt))


@given(hnp.arrays("float32", 64, elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_the_eight_bit_floats_round_as_torch_does(array):
    x = torch.from_numpy(array)
    for element, dtype in ((E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)):
        theirs = x.clamp(element.min, element.max).to(dtype).view(torch.uint8)
        assert torch.equal(element.encode(x), theirs)
        table = type(element)(element.name, element.bits, element.values)
        assert torch.equal(table.encode(x), theirs)


@given(st.sampled_from([e for e in ELEMENTS.values() if e.min < 0]), st.lists(floats, min_size=2, max_size=30))
def test_rounding_keeps_order_and_sign(element, numbers):
    x = torch.tensor(numbers).sort().values
    y = element.decode(element.encode(x))
    assert (y.diff() >= 0).all()
    assert (y.abs() <= element.max + (element.integer)).all()
    if element != NF4:  # which has other numbers below zero than above
        flipped = element.decode(element.encode(-x))
        inside = x.abs() <= element.max
        assert torch.equal(flipped[inside], -y[inside])


@given(st.lists(st.integers(-112, 112), min_size=1, max_size=40))
def test_four_bit_floats_are_the_nearest_ones_ties_to_even(sixteenths):
    x = torch.tensor(sixteenths) / 16
    for number, code in zip(x.tolist(), E2M1.encode(x).tolist(), strict=True):
        distances = [abs(number - v) for v in E2M1.values]
        assert distances[code] == min(distances)
        ties = {abs(v) for v, d in zip(E2M1.values, distances, strict=True) if d == min(distances)}
        assert len(ties) == 1 or code % 2 == 0


@given(hnp.arrays("uint8", hnp.array_shapes(min_dims=2, max_dims=3, max_side=24)), st.data())
def test_packing_loses_nothing(array, data):
    bits = data.draw(st.integers(2, 8))
    codes = torch.from_numpy(array) & (2**bits - 1)
    dim = data.draw(st.sampled_from([-1, -2]))
    assert torch.equal(unpack_words(pack_words(codes, bits, dim), bits, codes.shape[dim], dim), codes)
    if bits == 4:
        even = codes.narrow(dim, 0, codes.shape[dim] // 2 * 2)
        assert torch.equal(unpack_nibbles(pack_nibbles(even, dim), dim), even)


@given(format_and_weights())
def test_quantize_pack_unpack_is_the_same_tensor(case):
    fmt, x = case
    q = quantize(x, fmt)
    if fmt.element.bits == 4:
        for dim in (-1, -2):
            assert torch.equal(unpack_nibbles(pack_nibbles(q.codes, dim), dim), q.codes)
    if fmt.element in (INT4, INT8):
        assert torch.equal(unpack_words(pack_words(q.codes, fmt.element.bits), fmt.element.bits, x.shape[1]), q.codes)

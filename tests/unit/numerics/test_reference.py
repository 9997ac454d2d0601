"""The reference rounding at its edges, and how much each format loses on a Gaussian matrix."""

import math

import pytest
import torch

from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.numerics.element import E4M3, E8M0, INT4
from fewbit.numerics.format import FORMATS
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.reference import choose_scale, fake_quantize, outer_scale, quantize

GROUPED = [n for n in FORMATS if FORMATS[n].block[0] == 1 and FORMATS[n].grouped]


def gauss(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(x, name):
    return ((quantize(x, FORMATS[name]).dequantize() - x).norm() / x.norm()).item()


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("fp8", 0.0266),
        ("fp8_block", 0.0265),
        ("mxfp8", 0.0265),
        ("int8_row", 0.0075),
        ("nvfp4", 0.0952),
        ("int4_g128", 0.1115),
        ("int4_g128_asym", 0.1011),
        ("mxfp4", 0.1118),
    ],
)
def test_loses_what_the_published_decoders_lose_on_a_gaussian_matrix(name, published):
    assert error(gauss(512, 256), name) == pytest.approx(published, rel=0.1)


def test_a_finer_grid_loses_less():
    x = gauss(512, 256)
    assert error(x, "int8_row") < error(x, "int8") < error(x, "fp8")
    assert error(x, "int4_g32") < error(x, "int4_g64") < error(x, "int4_g128")
    assert error(x, "int4_g128_asym") < error(x, "int4_g128")
    assert error(x, "fp8") < error(x, "fp8_e5m2")
    assert error(x, "nvfp4") < error(x, "mxfp4")


@pytest.mark.parametrize("name", FORMATS)
def test_blocks_of_zeros_have_scale_one_and_stay_zeros(name):
    fmt = FORMATS[name]
    q = quantize(torch.zeros(256, 256), fmt)
    assert (q.scales() == 1).all()
    assert (q.dequantize() == 0).all()
    if fmt.grouped:
        x = gauss(256, 256)
        x[:128, :128] = 0
        q = quantize(x, fmt)
        stored = E4M3.decode(q.scale) if fmt.outer else (q.scales() if q.outer is None else q.scale)
        rows = 1 if fmt.block[0] == 128 else 128
        assert (stored[:rows, : 128 // fmt.block[1]] == 1).all()
        assert (q.dequantize()[:128, :128] == 0).all()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused(name, poison):
    x = gauss(128, 128)
    x[3, 5] = poison
    with pytest.raises(CheckpointError, match="holds NaN or infinity"):
        quantize(x, FORMATS[name])


@pytest.mark.parametrize("name", GROUPED)
def test_a_width_that_does_not_divide_is_refused_with_the_numbers(name):
    block = FORMATS[name].block[1]
    for width in (block + 4, 172):
        with pytest.raises(
            UnsupportedError, match=rf"{width} columns do not divide into blocks of {block} \({name}\); .*"
        ):
            quantize(gauss(4, width), FORMATS[name])


@pytest.mark.parametrize("shape", [(300, 200), (576, 130), (1, 1), (64, 300), (129, 128)])
def test_square_blocks_may_be_ragged(shape):
    fmt = FORMATS["fp8_block"]
    x = gauss(*shape)
    q = quantize(x, fmt)
    assert q.scale.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    for i, row in enumerate(range(0, shape[0], 128)):
        for j, col in enumerate(range(0, shape[1], 128)):
            tile = x[row : row + 128, col : col + 128]
            alone = quantize(tile, FORMATS["fp8"])
            assert q.scale[i, j] == alone.scale
            assert torch.equal(q.dequantize()[row : row + 128, col : col + 128], alone.dequantize())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-30, 1.0, 1e30, 2e38])
def test_scales_are_finite_and_not_zero_whatever_the_size(name, size):
    q = quantize(gauss(128, 128).clamp(-1, 1) * size, FORMATS[name])
    assert (q.scales() > 0).all()
    assert q.scales().isfinite().all()
    assert q.dequantize().isfinite().all()
    if q.outer is not None:
        assert q.outer > 0
        assert q.outer.reciprocal().isfinite()


@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_on_the_grid_comes_back_code_for_code(name):
    q = quantize(gauss(128, 256), FORMATS[name])
    again = quantize(q.dequantize(), FORMATS[name], scale=q.scale, outer=q.outer, zero=q.zero)
    assert torch.equal(again.dequantize(), q.dequantize())


def squared_error_by_block(x, fmt, scale):
    blocks = x.unflatten(-1, (scale.shape[-1], -1))
    codes = INT4.encode(blocks / scale[..., None].float()).flatten(-2)
    return (QTensor(fmt, codes, scale).dequantize() - x).square().unflatten(-1, (scale.shape[-1], -1)).sum(-1)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_the_int4_search_is_never_worse_than_the_plain_divisors(group):
    fmt = FORMATS[f"int4_g{group}"]
    heavy = gauss(256, 256) * gauss(256, 256, seed=1).exp()
    two = torch.zeros(2, 256)
    two[0, ::group], two[0, 1::group] = 0.7, -0.7  # amax / 7 meets both ends, amax / 7.5 neither
    two[1, ::2] = 3.5
    for x in (gauss(256, 256), heavy, two):
        best = squared_error_by_block(x, fmt, quantize(x, fmt).scale)
        amax = x.unflatten(-1, (-1, group)).abs().amax(-1)
        for divisor in (7.0, 7.5):
            plain = torch.where(amax > 0, amax / divisor, 1.0).bfloat16()
            assert (best <= squared_error_by_block(x, fmt, plain) * (1 + 1e-5)).all()


def test_a_power_of_two_scale_counts_magnitudes_of_1_75_and_up_to_the_next_power():
    below = torch.tensor(1.75).nextafter(torch.tensor(0.0)).item()
    for exponent in (-100, -20, 0, 20, 100):
        for name, offset in (("mxfp4", 2), ("mxfp8", 8)):
            for largest, power in ((1.0, 0), (below, 0), (1.75, 1), (1.9999999, 1)):
                x = torch.zeros(1, 32)
                x[0, 7] = -largest * 2.0**exponent
                scale, _, _ = choose_scale(x, FORMATS[name])
                assert E8M0.decode(scale).item() == 2.0 ** (exponent + power - offset)


def test_the_outer_scale_is_the_power_of_two_that_leaves_room():
    fmt = FORMATS["nvfp4"]
    for amax in (2688.0, 2687.0, 2689.0, 1.0, 0.7, 1e-30, 1e30):
        outer = outer_scale(torch.tensor(amax), fmt).item()
        assert math.frexp(outer)[0] == 0.5
        assert amax / 2688 <= outer < 2 * amax / 2688
    assert outer_scale(torch.tensor(0.0), fmt) == 1
    assert outer_scale(torch.tensor(2688.0), fmt) == 1


def test_an_outer_scale_that_was_given_is_used_and_saturates():
    fmt = FORMATS["nvfp4"]
    x = gauss(16, 64)
    q = quantize(x, fmt, outer=torch.tensor(2.0**-9))
    assert q.outer == 2.0**-9
    assert ((q.dequantize() - x).norm() / x.norm()) < 0.11
    tight = quantize(x, fmt, outer=torch.tensor(2.0**-20))
    assert tight.dequantize().abs().max() == 448 * 6 * 2.0**-20


@pytest.mark.parametrize("name", FORMATS)
def test_fake_quantize_is_quantize_and_back(name):
    fmt = FORMATS[name]
    x = gauss(4, 8, 256)
    flat = x.reshape(32, 256)
    q = quantize(flat, fmt)
    assert torch.equal(fake_quantize(x, fmt), q.dequantize().view_as(x))
    if fmt.zero is None:
        assert torch.equal(fake_quantize(x, fmt, scale=q.scale, outer=q.outer), q.dequantize().view_as(x))
    assert fake_quantize(x.bfloat16(), fmt).dtype == torch.float32


def test_a_token_is_rounded_alone():
    x = gauss(5, 128)
    for name in ("int8_row", "fp8_row", "mxfp8"):
        together = fake_quantize(x, FORMATS[name])
        assert torch.equal(together[2:3], fake_quantize(x[2:3], FORMATS[name]))

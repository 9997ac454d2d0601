"""Cutting, joining and counting quantized tensors."""

import pytest
import torch

from fewbit.errors import UnsupportedError
from fewbit.numerics.element import UINT4
from fewbit.numerics.format import ALL, FORMATS, Format, integer_format
from fewbit.numerics.qtensor import QTensor, cat
from fewbit.numerics.reference import quantize, round_to


def gauss(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", FORMATS)
def test_a_slice_is_the_slice_of_the_weight(name):
    q = quantize(gauss(256, 512), FORMATS[name])
    w = q.dequantize()
    for dim in (0, -2):
        assert torch.equal(q.slice(dim, 128, 256).dequantize(), w[128:256])
    for dim in (1, -1):
        assert torch.equal(q.slice(dim, 256, 512).dequantize(), w[:, 256:512])
    assert torch.equal(q.slice(0, 128, 256).slice(1, 0, 128).dequantize(), w[128:, :128])


@pytest.mark.parametrize("name", ["int4_g128", "int4_g32_asym", "nvfp4", "mxfp4", "mxfp8", "fp8_block", "int8_g64"])
def test_a_cut_through_a_block_is_refused_with_the_numbers(name):
    fmt = FORMATS[name]
    q = quantize(gauss(256, 256), fmt)
    block = fmt.block[1]
    for start, stop in ((0, block + 1), (1, block), (block // 2, 256)):
        with pytest.raises(ValueError, match=rf"cut {start}:{stop} of axis -1 .* block of {block} \({name}\)"):
            q.slice(-1, start, stop)


def test_a_cut_through_rows_of_a_square_block_is_refused_but_the_ragged_end_is_not():
    q = quantize(gauss(300, 256), FORMATS["fp8_block"])
    with pytest.raises(ValueError, match="cut 0:200 of axis -2 goes through a block of 128"):
        q.slice(0, 0, 200)
    assert torch.equal(q.slice(0, 128, 300).dequantize(), q.dequantize()[128:])


@pytest.mark.parametrize("name", [n for n in FORMATS if FORMATS[n].block[0] != -1 and not FORMATS[n].outer])
def test_joining_is_joining_the_weights(name):
    fmt = FORMATS[name]
    pieces = [quantize(gauss(rows, 256, seed=rows), fmt) for rows in (256, 128, 64)]
    joined = cat(pieces)
    assert torch.equal(joined.dequantize(), torch.cat([p.dequantize() for p in pieces]))
    assert joined.slice(0, 0, 256).equal(pieces[0])


def test_scales_of_the_whole_tensor_must_agree_to_be_joined():
    x, y = gauss(32, 64), 3 * gauss(32, 64, seed=1)
    for name, part in (("fp8", "scale"), ("int8", "scale"), ("nvfp4", "outer")):
        fmt = FORMATS[name]
        q = quantize(x, fmt)
        with pytest.raises(ValueError, match=f"cannot join: the {part} of the whole tensor differs"):
            cat([q, quantize(1000 * y, fmt)])
        same = {"outer": q.outer} if part == "outer" else {"scale": q.scale}
        r = quantize(x[:16], fmt, **same)
        assert torch.equal(cat([q, r]).dequantize(), torch.cat([q.dequantize(), r.dequantize()]))


def test_different_formats_cannot_be_joined():
    x = gauss(32, 64)
    with pytest.raises(ValueError, match="cannot join formats mxfp4, mxfp8"):
        cat([quantize(x, FORMATS["mxfp4"]), quantize(x, FORMATS["mxfp8"])])


def test_a_piece_that_ends_inside_a_block_can_only_come_last():
    fmt = FORMATS["fp8_block"]
    ragged, whole = quantize(gauss(100, 128), fmt), quantize(5 * gauss(128, 128), fmt)
    with pytest.raises(ValueError, match=r"cannot join 100 \+ 128 rows: a piece ends inside a block of 128"):
        cat([ragged, whole])
    assert torch.equal(cat([whole, ragged]).dequantize(), torch.cat([whole.dequantize(), ragged.dequantize()]))


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("fp8", 8 * 64 * 256 + 32),
        ("int8_row", 8 * 64 * 256 + 64 * 32),
        ("int4_g128", 4 * 64 * 256 + 64 * 2 * 16),
        ("int4_g128_asym", 4 * 64 * 256 + 64 * 2 * (16 + 4)),
        ("nvfp4", 4 * 64 * 256 + 64 * 16 * 8 + 32),
        ("mxfp4", 4 * 64 * 256 + 64 * 8 * 8),
        ("fp8_block", 8 * 64 * 256 + 2 * 32),
    ],
)
def test_bits_count_codes_scales_and_zeros(name, bits):
    assert quantize(gauss(64, 256), FORMATS[name]).bits == bits


def test_equal_looks_at_every_bit():
    q = quantize(gauss(32, 64), FORMATS["int4_g32_asym"])
    assert q.equal(quantize(gauss(32, 64), FORMATS["int4_g32_asym"]))
    assert not q.equal(quantize(gauss(32, 64), FORMATS["int4_g32"]))
    for part in ("codes", "scale", "zero"):
        other = quantize(gauss(32, 64), FORMATS["int4_g32_asym"])
        other.parts()[part].view(torch.uint8)[0, 0] ^= 1
        assert not q.equal(other), part


def test_dequantizes_to_the_dtype_asked_for_and_moves_as_a_whole():
    q = quantize(gauss(32, 64), FORMATS["nvfp4"])
    assert q.dequantize(torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(q.dequantize(torch.bfloat16), q.dequantize().bfloat16())
    assert {t.device.type for t in q.to("meta").parts().values()} == {"meta"}
    assert q.shape == (32, 64)


@pytest.mark.parametrize("name", FORMATS)
def test_axes_before_the_last_two_are_a_batch(name):
    fmt = FORMATS[name]
    x = gauss(3, 128, 256)
    outer = None if not fmt.outer else torch.tensor(2.0**-8)
    batch = quantize(x, fmt, outer=outer)
    assert torch.equal(batch.dequantize(), torch.stack([quantize(m, fmt, outer=outer).dequantize() for m in x]))


@pytest.mark.parametrize(("bits", "asym"), [(2, True), (3, False), (4, True), (8, False)])
def test_act_order_takes_the_scale_of_each_column_from_a_table(bits, asym):
    random = torch.Generator().manual_seed(bits)
    fmt = integer_format(bits, (1, 32), asym=asym, act_order=True)
    codes = torch.randint(0, 2**bits, (24, 96), generator=random).to(torch.uint8)
    scale = torch.rand(24, 3, generator=random).to(torch.bfloat16) + 0.1
    zero = torch.randint(-2, 2, (24, 3), generator=random).to(torch.int8) if asym else None
    group_of = torch.arange(96, dtype=torch.int32)[torch.randperm(96, generator=random)] % 3
    q = QTensor(fmt, codes, scale, zero=zero, group_of=group_of)
    signed = codes.double() - 2**bits * (codes >= 2 ** (bits - 1))
    expected = torch.empty(24, 96, dtype=torch.float64)
    for column, group in enumerate(group_of.tolist()):
        shift = 0 if zero is None else zero[:, group].double()
        expected[:, column] = (signed[:, column] - shift) * scale[:, group].double()
    w = q.dequantize()
    assert torch.equal(w, expected.float())
    assert torch.equal(q.slice(-1, 5, 50).dequantize(), w[:, 5:50])  # a cut through what would be a group
    assert torch.equal(q.slice(-2, 3, 9).dequantize(), w[3:9])
    assert round_to(w, q).equal(q)
    assert cat([q.slice(-2, 0, 7), q.slice(-2, 7, 24)]).equal(q)
    other = QTensor(fmt, codes, scale, zero=zero, group_of=group_of.flip(0))
    with pytest.raises(ValueError, match="group_of of the whole tensor differs"):
        cat([q, other])
    assert q.bits == 24 * 96 * bits + 24 * 3 * (16 + bits * asym) + 96 * 32


def test_integers_of_other_widths_are_named_like_the_rest():
    assert integer_format(4, (1, 128)) is FORMATS["int4_g128"]
    assert integer_format(8, (ALL, ALL)) is FORMATS["int8"]
    assert integer_format(8, (1, ALL)) is FORMATS["int8_row"]
    assert str(integer_format(3, (1, 64), asym=True)) == "int3_g64_asym"
    assert str(integer_format(4, (1, 128), act_order=True)) == "int4_g128_act_order"
    assert integer_format(5, (1, ALL)).scale == torch.float32


def test_a_zero_that_is_a_float_is_added_after_the_scale():
    random = torch.Generator().manual_seed(1)
    fmt = Format("minima", UINT4, (1, 32), zero="float")
    codes = torch.randint(0, 16, (8, 96), dtype=torch.uint8, generator=random)
    scale, zero = torch.rand(8, 3, generator=random), -torch.rand(8, 3, generator=random)
    q = QTensor(fmt, codes, scale, zero=zero)
    # in float32, the product rounded before the sum
    expected = codes.float() * scale.repeat_interleave(32, 1) + zero.repeat_interleave(32, 1)
    assert torch.equal(q.dequantize(), expected)
    assert torch.equal(q.slice(-1, 32, 96).dequantize(), expected[:, 32:])
    assert q.bits == 8 * 96 * 4 + 8 * 3 * 64


def test_what_is_only_read_is_not_rounded_to():
    for fmt in (Format("minima", UINT4, (1, 32), zero="float"), integer_format(4, (1, 32), act_order=True)):
        with pytest.raises(UnsupportedError, match=f"{fmt} is only read"):
            quantize(gauss(8, 64), fmt)

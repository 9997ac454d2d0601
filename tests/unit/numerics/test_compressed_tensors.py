"""Given the same scales, the compressed-tensors library and fewbit make the same numbers, bit for bit.

The library divides by scale / global where fewbit multiplies scale by outer = 1 / global: the same number where the
outer scale is a power of two, as fewbit's always is. It works in the dtype of its scales, so they are handed over in
float32.
"""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize as their_dequantize
from compressed_tensors.quantization.lifecycle.forward import fake_quantize as their_fake_quantize
from compressed_tensors.quantization.lifecycle.forward import quantize as their_quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

from fewbit.numerics.element import E8M0
from fewbit.numerics.format import ALL, FORMATS
from fewbit.numerics.reference import quantize


def args_of(fmt):
    """What the library calls this format."""
    settings = {"num_bits": fmt.element.bits, "type": "int" if fmt.element.integer else "float"}
    settings["symmetric"] = fmt.zero is None
    if fmt.outer:
        return QuantizationArgs(strategy="tensor_group", group_size=fmt.block[1], **settings)
    if fmt.block[0] == ALL:
        return QuantizationArgs(strategy="tensor", **settings)
    if fmt.block == (1, ALL):
        return QuantizationArgs(strategy="channel", **settings)
    if fmt.block[0] > 1:
        return QuantizationArgs(strategy="block", block_structure=list(fmt.block), **settings)
    if fmt.scale is E8M0:
        return QuantizationArgs(strategy="group", group_size=32, scale_dtype=torch.uint8, **settings)
    return QuantizationArgs(strategy="group", group_size=fmt.block[1], **settings)


SHARED = [n for n in FORMATS if "e5m2" not in n]  # the library knows no E5M2


def matrices():
    g = torch.Generator().manual_seed(7)
    plain = torch.randn(256, 384, generator=g)
    yield "float32", plain
    yield "bfloat16", (plain * 0.02).bfloat16().float()
    yield "heavy", plain * torch.randn(256, 384, generator=g).exp()
    yield "skewed", plain.abs() + 0.1
    on_grid = torch.randint(-28, 29, (256, 384), generator=g) / 4  # many ties: halves and quarters
    yield "ties", on_grid


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("kind", [k for k, _ in matrices()])
def test_same_scales_same_bits(name, kind):
    fmt, x = FORMATS[name], dict(matrices())[kind]
    mine = quantize(x, fmt)
    globe = None if mine.outer is None else mine.outer.reciprocal()
    scale = mine.scales() if mine.outer is None else fmt.scale.decode(mine.scale)
    zero = None if mine.zero is None else mine.zero.float()
    args = args_of(fmt)
    theirs = their_fake_quantize(x, scale, zero, args, global_scale=globe)
    assert torch.equal(mine.dequantize(), theirs)
    values = their_quantize(x, scale, zero, args, global_scale=globe)
    assert torch.equal(fmt.element.decode(mine.codes), values)
    if fmt.block[0] != 128:  # the library's dequantize wants padded blocks
        assert torch.equal(their_dequantize(values, scale, zero, args, global_scale=globe), theirs)


@pytest.mark.parametrize("name", SHARED)
def test_the_librarys_own_scales_give_the_same_bits(name):
    """The scales a file of theirs would hold: of plain minimum and maximum, not ours."""
    fmt, args = FORMATS[name], args_of(FORMATS[name])
    for _, x in matrices():
        rows, cols = (size if b == ALL else b for b, size in zip(fmt.block, x.shape, strict=True))
        blocks = x.unflatten(1, (-1, cols)).unflatten(0, (-1, rows))
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
        globe = outer = None
        if fmt.outer:
            outer = torch.tensor(2.0**-7)
            globe = outer.reciprocal()
        scale, zero = calculate_qparams(low, high, args, global_scale=globe)
        zero = zero if fmt.zero else None
        stored = scale
        if fmt.outer or fmt.scale is E8M0:
            scale = scale.to(torch.float8_e4m3fn).float() if fmt.outer else scale
            stored = fmt.scale.encode(scale)
        mine = quantize(x, fmt, scale=stored, outer=outer, zero=None if zero is None else zero.to(torch.int8))
        theirs = their_fake_quantize(x, scale, None if zero is None else zero.float(), args, global_scale=globe)
        assert torch.equal(mine.dequantize(), theirs)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8"])
def test_chooses_the_exponents_that_the_library_chooses(name):
    fmt = FORMATS[name]
    magnitudes = torch.cat([x.abs().flatten() for _, x in matrices()])
    edges = torch.tensor([1.0, 1.75, 1.9999999, 1.7499999, 6.0, 448.0, 7.0, 3.5, 1e-20, 1e20])
    amax = torch.cat([magnitudes[magnitudes > 0], edges, edges / 2, edges * 2**20, edges * 2**-20])
    x = torch.zeros(len(amax), 32)
    x[:, 3] = amax
    theirs, _ = calculate_qparams(torch.zeros_like(amax), amax, args_of(fmt))
    assert torch.equal(quantize(x, fmt).scales()[:, 0], theirs)


@pytest.mark.parametrize("name", ["int8", "int8_row", "fp8", "fp8_row"])
def test_chooses_the_scales_that_the_library_chooses(name):
    fmt = FORMATS[name]
    for _, x in matrices():
        low, high = (x.amin(1, True), x.amax(1, True)) if fmt.block[0] == 1 else (x.amin(), x.amax())
        theirs, _ = calculate_qparams(low, high, args_of(fmt))
        assert torch.equal(quantize(x, fmt).scale, theirs.view_as(quantize(x, fmt).scale))


def test_the_outer_scale_leaves_at_most_a_binary_digit_of_the_librarys_room():
    for _, x in matrices():
        theirs = generate_gparam(x.amin(), x.amax()).item()
        mine = 1 / quantize(x, FORMATS["nvfp4"]).outer.item()
        assert theirs / 2 < mine <= theirs

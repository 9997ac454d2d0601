"""The table of formats, and what one linear is told."""

import pytest
import torch

from fewbit.errors import RecipeError
from fewbit.numerics.element import E4M3, E8M0
from fewbit.numerics.format import ALL, FORMATS, format_named
from fewbit.numerics.quantspec import KVSpec, QuantSpec


def test_a_format_is_found_by_its_name():
    for name, fmt in FORMATS.items():
        assert format_named(name) is fmt
        assert str(fmt) == name


def test_an_unknown_format_names_the_nearest_known_one():
    with pytest.raises(RecipeError, match=r"unknown numeric format 'nvpf4'; did you mean 'nvfp4'\?"):
        format_named("nvpf4")
    with pytest.raises(RecipeError, match="known: fp8, fp8_block"):
        format_named("qqq")


def test_what_the_standards_fix():
    assert (FORMATS["nvfp4"].block, FORMATS["nvfp4"].scale, FORMATS["nvfp4"].outer) == ((1, 16), E4M3, True)
    for name in ("mxfp4", "mxfp8"):
        assert (FORMATS[name].block, FORMATS[name].scale, FORMATS[name].outer) == ((1, 32), E8M0, False)
    assert FORMATS["fp8_block"].block == (128, 128)
    assert FORMATS["fp8"].block == (ALL, ALL)
    assert not FORMATS["fp8_row"].grouped
    assert FORMATS["int4_g128"].grouped


def test_bits_of_a_scale():
    assert FORMATS["nvfp4"].scale_bits == 8
    assert FORMATS["int4_g128"].scale_bits == 16
    assert FORMATS["int4_g128"].scale == torch.bfloat16
    assert FORMATS["fp8"].scale_bits == 32


def test_what_a_linear_does_can_be_read():
    int8, fp8 = FORMATS["int8_row"], FORMATS["fp8"]
    assert str(QuantSpec()) == "as it was"
    assert str(QuantSpec(weight=int8)) == "int8_row weights"
    assert str(QuantSpec(weight=int8, input=int8)) == "int8_row weights, int8_row inputs (dynamic)"
    assert not QuantSpec(weight=int8, input=int8).calibrated
    assert QuantSpec(weight=fp8, input=fp8, input_scale="static").calibrated
    assert not QuantSpec(weight=fp8, input_scale="static").calibrated
    assert str(KVSpec(fp8, fp8)) == "fp8"
    assert str(KVSpec(int8, fp8)) == "k int8_row, v fp8"

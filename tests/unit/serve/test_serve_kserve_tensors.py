"""Tensors of every datatype survive both forms; what no client sends by accident is refused."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewbit.errors import RequestError
from fewbit.serve.kserve.tensors import DATATYPES, Tensor, from_bytes, from_json, numbers, to_bytes, to_list

NUMBERS = [kind for kind in DATATYPES if kind != "BYTES"]


@pytest.mark.parametrize("datatype", NUMBERS)
def test_numbers_survive_both_forms(datatype):
    kind = DATATYPES[datatype]
    values = np.array([[0, 1, 1], [1, 0, 1]], kind)
    if kind.kind in "iu" and datatype != "BF16":
        values[0, 0], values[1, 2] = np.iinfo(kind).min, np.iinfo(kind).max
    told = Tensor("x", datatype, values)
    again = from_bytes("x", datatype, [2, 3], to_bytes(told))
    assert again.shape == (2, 3)
    np.testing.assert_array_equal(again.values, values)
    if datatype != "BF16":  # which JSON cannot say
        plain = json.loads(json.dumps(to_list(told)))
        np.testing.assert_array_equal(from_json("x", datatype, [2, 3], plain).values, values)
        np.testing.assert_array_equal(from_json("x", datatype, [2, 3], [plain[:3], plain[3:]]).values, values)


@given(st.lists(st.binary(max_size=20), max_size=8))
def test_bytes_survive_the_binary_form(elements):
    told = from_bytes("x", "BYTES", [len(elements)], b"".join(len(e).to_bytes(4, "little") + e for e in elements))
    assert told.values.tolist() == elements
    assert from_bytes("x", "BYTES", [len(elements)], to_bytes(told)).values.tolist() == elements


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), max_size=8))
def test_texts_survive_json(elements):
    assert to_list(from_json("x", "BYTES", [len(elements)], json.loads(json.dumps(elements)))) == elements


@given(st.binary(max_size=64), st.lists(st.integers(-2, 5), max_size=3), st.sampled_from(sorted(DATATYPES)))
def test_whatever_comes_is_a_tensor_or_an_error(data, shape, datatype):
    with contextlib.suppress(RequestError):
        assert list(from_bytes("x", datatype, shape, data).shape) == shape


def test_bfloat16_is_the_upper_half_of_a_float():
    halves = np.array([0x3F80, 0xC000, 0x7F80], "<u2")  # 1, -2, infinity
    assert numbers(Tensor("x", "BF16", halves)).tolist() == [1.0, -2.0, float("inf")]


@pytest.mark.parametrize(
    ("datatype", "value", "why"),
    [
        ("UINT8", 256, "an integer in [0, 255], got 256"),
        ("INT8", -129, "an integer in [-128, 127]"),
        ("UINT64", -1, "an integer in [0, 18446744073709551615]"),
        ("BOOL", 1, "true or false, got 1"),
        ("FP16", 1e6, "a number that fits FP16"),
        ("FP32", "1", "a number that fits FP32"),
        ("FP64", True, "a number that fits FP64"),
        ("BF16", 1.0, "send it in binary"),
        ("BYTES", 1, "x[0] must be a string, got 1"),
        ("BYTES", "\ud800", "half a surrogate pair"),
    ],
)
def test_elements_that_are_none(datatype, value, why):
    with pytest.raises(RequestError) as e:
        from_json("x", datatype, [1], [value])
    assert why in str(e.value)


def test_bytes_that_json_cannot_say():
    with pytest.raises(RequestError, match="ask for it with binary_data true"):
        to_list(from_bytes("x", "BYTES", [1], b"\1\0\0\0\xff"))
    with pytest.raises(RequestError, match="a byte other than 0 and 1"):
        from_bytes("x", "BOOL", [2], b"\1\2")

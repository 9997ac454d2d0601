"""The Pareto front, against its definition."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewbit.measure.pareto import dominates, pareto

POINTS = st.lists(st.tuples(*[st.integers(0, 5)] * 3), max_size=12)


def test_a_worked_example():
    #         cheap and bad, in between, dear and good, beaten by the second, equal to the second
    points = [(1, 9), (3, 4), (8, 1), (4, 4), (3, 4)]
    assert pareto(points) == [0, 1, 2, 4]


def test_more_is_better_when_negated():
    speed, error = [100, 50, 200], [0.1, 0.1, 0.3]
    assert pareto([(-s, e) for s, e in zip(speed, error, strict=True)]) == [0, 2]


@given(POINTS)
def test_on_the_front_or_beaten_by_somebody_on_it(points):
    front = pareto(points)
    for i, point in enumerate(points):
        beaten = any(dominates(points[j], point) for j in front)
        assert beaten != (i in front)


@given(st.tuples(*[st.integers(0, 3)] * 2), st.tuples(*[st.integers(0, 3)] * 2))
def test_no_two_dominate_each_other(a, b):
    assert not (dominates(a, b) and dominates(b, a))
    assert not dominates(a, a)


def test_nothing_and_infinity():
    assert pareto([]) == []
    assert pareto([(math.inf, 1.0), (2.0, 2.0)]) == [0, 1]


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        pareto([(1.0, math.nan)])
    with pytest.raises(ValueError, match="zip"):
        pareto([(1.0, 2.0), (1.0,)])

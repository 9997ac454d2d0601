"""Two models on the same items."""

from __future__ import annotations

import numpy as np
import pytest

from fewbit.measure.paired import interval, mcnemar, paired


def test_mcnemar_is_the_binomial_test():
    assert mcnemar(0, 0) == 1
    assert mcnemar(1, 0) == 1
    assert mcnemar(0, 5) == pytest.approx(2 / 2**5)
    assert mcnemar(3, 9) == mcnemar(9, 3) == pytest.approx(2 * (1 + 12 + 66 + 220) / 2**12)
    assert mcnemar(7, 7) == 1


def test_flips_and_means():
    found = paired([1, 1, 0, 0, 1], [1, 0, 1, 0, 0])
    assert (found.lost, found.won, found.flips) == (2, 1, 0.6)
    assert (found.base, found.model) == (0.6, 0.4)
    assert found.difference == pytest.approx(-0.2)
    assert found.recovery == pytest.approx(2 / 3)
    assert found.low <= found.difference <= found.high


def test_the_interval_is_as_wide_as_theory_says():
    rng = np.random.default_rng(1)
    x, y = (rng.random(4000) < 0.6).astype(float), (rng.random(4000) < 0.55).astype(float)
    found = paired(x.tolist(), y.tolist())
    width = 2 * 1.96 * (y - x).std() / 4000**0.5
    assert found.high - found.low == pytest.approx(width, rel=0.03)
    low, high = interval(x.tolist())
    assert high - low == pytest.approx(2 * 1.96 * x.std() / 4000**0.5, rel=0.03)


def test_the_same_model_twice():
    scores = [0.0, 1.0, 1.0, 0.0]
    found = paired(scores, scores)
    assert (found.difference, found.low, found.high, found.p, found.flips, found.recovery) == (0, 0, 0, 1, 0, 1)


def test_scores_that_are_no_flips_and_a_base_without_any():
    found = paired([0.5, 0.25], [0.5, 0.0])
    assert found.lost is found.p is found.flips is None
    assert paired([0, 0], [0, 1]).recovery is None


def test_not_the_same_items():
    with pytest.raises(ValueError, match="2 and 1"):
        paired([1, 0], [1])

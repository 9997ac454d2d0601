"""Two models on the same items."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fewbit.cli.compare import _recovery
from fewbit.measure.paired import Z, difference_interval, interval, mcnemar, paired, ratio_interval, wilson


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
    assert (found.difference, found.p, found.flips, found.recovery) == (0, 1, 0, 1)
    # without a flip the ends are those of Wilson's interval at none of n: z^2 / (n + z^2)
    assert (-found.low, found.high) == pytest.approx([wilson(0, 4)[1]] * 2)
    assert wilson(0, 4)[1] == pytest.approx(Z**2 / (4 + Z**2))
    assert found.recovery_low < 1 <= found.recovery_high


def test_nothing_that_varies_is_still_not_certain():
    assert interval([0.0] * 20) == pytest.approx((0, 0.16113), abs=1e-5)
    assert interval([1.0] * 20) == pytest.approx((0.83887, 1), abs=1e-5)
    assert paired([0, 0, 0], [1, 1, 1]).low < 1 == paired([0, 0, 0], [1, 1, 1]).high
    assert paired([1, 1, 1], [0, 0, 0]).high > -1 == paired([1, 1, 1], [0, 0, 0]).low


@pytest.mark.parametrize(
    ("lost", "won", "both", "neither"), [(2, 12, 36, 0), (0, 3, 20, 9), (5, 0, 1, 4), (7, 6, 9, 8)]
)
def test_the_ends_are_where_the_score_test_refuses(lost, won, both, neither):
    """The likeliest shares under each end, found by trying them all: there the statistic is Z."""
    n = lost + won + both + neither
    share = np.linspace(0, 1, 2_000_001)[1:-1]
    for value in difference_interval(lost, won, n):
        same = 1 - 2 * share - value  # of items that both or neither have right
        usable = (share + value > 0) & (same > 0)
        likely = lost * np.log(share[usable]) + won * np.log(share[usable] + value)
        likely += (both + neither) * np.log(same[usable])
        at = share[usable][likely.argmax()]
        spread = n * (2 * at + value - value**2)
        assert abs(won - lost - n * value) / math.sqrt(spread) == pytest.approx(Z, rel=1e-3)
    m = n - neither
    for value in ratio_interval(lost, won, both):
        right = (1 - share) / value  # of the base, where `share` is lost of those items that one has right at least
        usable = (right - share > 0) & (1 - right > 0)
        likely = lost * np.log(share[usable]) + won * np.log(1 - right[usable])
        likely += both * np.log(right[usable] - share[usable])
        at = likely.argmax()
        spread = m * value * (share[usable][at] + 1 - right[usable][at])
        assert abs(both + won - value * (both + lost)) / math.sqrt(spread) == pytest.approx(Z, rel=1e-3)


@pytest.mark.parametrize("shares", [(0.5, 0.05, 0.05), (0.9, 0.04, 0.02), (0.2, 0.1, 0.15), (0.98, 0.01, 0.0)])
def test_intervals_hold_the_truth_as_often_as_they_say(shares):
    """Of 2,000 drawn samples of 200 items: nineteen of twenty, and three points of room."""
    both, lost, won = shares
    drawn = np.random.default_rng(7).multinomial(200, [both, lost, won, 1 - sum(shares)], size=2000)
    truth, ratio, held, held_ratio = won - lost, (both + won) / (both + lost), 0, 0
    for b, lo, w, _ in drawn.tolist():
        low, high = difference_interval(lo, w, 200)
        held += low <= truth <= high
        low, high = ratio_interval(lo, w, b)
        held_ratio += low <= ratio <= high
    assert held / 2000 > 0.92
    assert held_ratio / 2000 > 0.92


def test_scores_that_are_no_flips_and_a_base_without_any():
    found = paired([0.5, 0.25], [0.5, 0.0])
    assert found.lost is found.p is found.flips is None
    assert paired([0, 0], [0, 1]).recovery is None


def test_not_the_same_items():
    with pytest.raises(ValueError, match="2 and 1"):
        paired([1, 0], [1])


def test_the_recovery_of_several_tasks_has_an_interval():
    one = {"recovery": 0.9, "recovery_low": 0.87, "recovery_high": 0.94}
    other = {"recovery": 0.8, "recovery_low": 0.76, "recovery_high": 0.83}
    assert _recovery([one]) == pytest.approx((0.9, 0.87, 0.94))
    assert _recovery([one, other]) == pytest.approx((0.85, 0.85 - 0.05 / 2, 0.85 + 0.05 / 2))

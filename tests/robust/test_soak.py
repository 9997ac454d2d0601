"""Half a minute of `make soak`, and how it tells a leak from what allocators do."""

from __future__ import annotations

import random

import pytest
from soak import MAX_SLOPE, growth, soak

MIB = 1 << 20


def sizes(seconds: int, leak: float = 0.0, step: float = 0.0, noise: float = 4.0) -> list[tuple[float, int]]:
    """Samples of a process that leaks so many MiB a minute, and takes `step` MiB at once when 3/4 are over."""
    r = random.Random(seconds)
    return [
        (float(t), int(MIB * (100 + leak * t / 60 + (step if 4 * t > 3 * seconds else 0) + r.uniform(0, noise))))
        for t in range(0, seconds, 2)
    ]


@pytest.mark.parametrize("leak", [2.5, 8.0])
def test_a_leak_is_seen_under_noise(leak: float):
    assert growth(sizes(600, leak)) == pytest.approx(leak, abs=0.3)
    assert growth(sizes(600, leak + 1, step=-20)) > MAX_SLOPE


@pytest.mark.parametrize("step", [0, 30, -30])
def test_what_is_taken_once_is_no_leak(step: float):
    assert growth(sizes(600, step=step)) < MAX_SLOPE / 2
    assert growth(sizes(600, leak=0.5, step=step)) < MAX_SLOPE


def test_short_runs_are_not_judged():
    assert growth(sizes(30, leak=100)) is None
    assert growth(sizes(220, leak=100)) is None
    assert growth(sizes(250, leak=100)) == pytest.approx(100, abs=3)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_half_a_minute_of_mixed_traffic():
    found, said = soak(0.5, seed=1)
    assert not found.wrong, said
    kinds = {kind for kind, status in found.counts if status == "200"}
    assert kinds >= {"completion", "streamed", "chat", "generate", "golden"}, said
    assert found.counts["left", "-"] > 0, said
    assert sum(count for (kind, _), count in found.counts.items() if kind == "bad") > 0, said

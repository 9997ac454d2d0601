"""Half a minute of `make soak`."""

from __future__ import annotations

import pytest
from soak import soak


@pytest.mark.slow
def test_half_a_minute_of_mixed_traffic():
    found, said = soak(0.5, seed=1)
    assert not found.wrong, said
    kinds = {kind for kind, status in found.counts if status == "200"}
    assert kinds >= {"completion", "streamed", "chat", "generate", "golden"}, said
    assert found.counts["left", "-"] > 0, said
    assert sum(count for (kind, _), count in found.counts.items() if kind == "bad") > 0, said

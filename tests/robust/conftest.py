"""One real server for all tests of bad inputs: each leaves it as it was."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from real_server import Server


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    running = Server("--drain", "2")
    yield running
    running.close()

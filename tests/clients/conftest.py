"""The bundled model, served, and the Python of each client's own environment (`make test-clients` makes them)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from client_server import serving

from fewbit.demo import demo_model
from fewbit.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def storyteller() -> Path:
    try:
        return demo_model()
    except CheckpointError as error:
        pytest.skip(f"NO STORYTELLER, so no client was tried: {error}")


@pytest.fixture(scope="session")
def server(storyteller) -> Iterator[str]:
    with serving(storyteller, "--name", "storyteller", "--device", "cpu") as url:
        yield url


@pytest.fixture(scope="session")
def program() -> Callable[[str, str], str]:
    """`program("aiperf", "aiperf")` is the path of a program in a client's environment; skips where that is not."""

    def find(client: str, name: str) -> str:
        found = ROOT / ".venv-clients" / client / "bin" / name
        if not (found.parents[1] / ".all").is_file():
            pytest.skip(f"NO {client.upper()}: {found} is not there; `make test-clients` makes it")
        return str(found)

    return find

"""Model directories with tokenizers of each common make."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizer_makes import MAKES, TEXTS, write
from tokenizers import Tokenizer


@pytest.fixture(scope="session")
def backends() -> dict[str, Tokenizer]:
    return {name: make() for name, make in MAKES.items()}


@pytest.fixture(params=MAKES)
def make(request) -> str:
    return request.param


@pytest.fixture
def model_dir(tmp_path, backends, make) -> Path:
    return write(tmp_path / make, backends[make])


@pytest.fixture
def write_dir(tmp_path, backends):
    """`write_dir("byte_level", {...config...}, generation_config={...})` gives a model directory."""

    def of(make: str, config: dict | None = None, **files: dict) -> Path:
        return write(tmp_path / f"model{len(list(tmp_path.iterdir()))}", backends[make], config, **files)

    return of


@pytest.fixture
def texts() -> list[str]:
    return TEXTS

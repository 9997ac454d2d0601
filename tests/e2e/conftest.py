"""Commands of fewbit in this process."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fewbit import cli
from helpers import Ended


@pytest.fixture
def fewbit(capsys) -> Callable[..., Ended]:
    """`fewbit("inspect", DIR)` runs a command in this process."""

    def run(*arguments: object) -> Ended:
        status = cli.run([str(a) for a in arguments])
        return Ended(status, *capsys.readouterr())

    return run

"""The bundled model: a small real language model, for demonstrations and tests."""

from __future__ import annotations

import os
from pathlib import Path

from fewbit.errors import CheckpointError

VARIABLE = "FEWBIT_DEMO_MODEL"


def demo_model() -> Path:
    """The directory of `storyteller`: in a checkout or an unpacked sdist, else where ``$FEWBIT_DEMO_MODEL`` says.

    Raises:
        CheckpointError: in neither place; the message says where to get it.
    """
    if given := os.environ.get(VARIABLE):
        if not (Path(given) / "config.json").is_file():
            raise CheckpointError(f"${VARIABLE} is {given}, which is no model directory")
        return Path(given)
    here = Path(__file__).resolve().parents[2] / "models" / "storyteller"
    if (here / "config.json").is_file():
        return here
    raise CheckpointError(
        "the demonstration model is not in the wheel: take models/storyteller from fewbit's repository or its sdist "
        f"(pip download --no-deps --no-binary fewbit fewbit) and set {VARIABLE} to that folder"
    )

"""What holds for every test: no network, one thread, a time limit by folder, and where the shared data lies."""

from __future__ import annotations

import os

# Before anything is imported that reads them. Processes that a test starts (commands, servers) inherit them.
os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# One thread: how a sum is split over threads decides how it is rounded, so a test that compares bits would depend on
# the machine's number of cores; and the small matrices of the tests are slower on several threads than on one.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

from pathlib import Path

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():  # kernels run in Triton's interpreter; Triton looks when it is imported
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)
# The folder's limit is the deadline, and how fast examples are drawn says something of the machine only. The same
# examples every time, so that a change fails for what it does; new ones where FEWBIT_NEW_EXAMPLES is set.
hypothesis.settings.register_profile(
    "fewbit",
    deadline=None,
    derandomize="FEWBIT_NEW_EXAMPLES" not in os.environ,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("fewbit")

TESTS = Path(__file__).parent
LIMITS_S = {
    "unit": 300,
    "robust": 900,
    "laws": 600,
    "parity": 900,
    "e2e": 1800,
    "browser": 600,
    "clients": 1800,
    "gpu": 600,
    "multi_gpu": 900,
}
"""Seconds a single test of a folder may take; a test that needs more carries its own ``timeout`` marker.

They are there to find what hangs, and ten times what the slowest test needs: machines of others are slow, and busy.
"""
NEEDS_GPU = {"gpu": 1, "multi_gpu": 2}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpus = torch.cuda.device_count()
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder not in LIMITS_S:
            raise pytest.UsageError(
                f"{item.path.relative_to(TESTS.parent)}: the folder tests/{folder} has no time limit; "
                f"move the test to one of {', '.join(LIMITS_S)}, or give the folder a limit in tests/conftest.py"
            )
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(LIMITS_S[folder]))
        if folder in NEEDS_GPU and item.get_closest_marker(folder) is None:
            item.add_marker(getattr(pytest.mark, folder))
        for marker, needed in NEEDS_GPU.items():
            if item.get_closest_marker(marker) and gpus < needed:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} NVIDIA GPU{'s' * (needed > 1)}, found {gpus}"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real texts and weights: $FEWBIT_TEST_DATA, else shared/data beside the checkout."""
    given = os.environ.get("FEWBIT_TEST_DATA")
    folder = Path(given) if given else TESTS.parent.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"NO TEST DATA: {folder} is not there; set FEWBIT_TEST_DATA to the folder with models/ and text/")
    return folder

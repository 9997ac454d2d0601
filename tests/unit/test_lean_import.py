"""Looking at a decoder, planning a step or handling text must not cost the seconds that importing torch takes."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "module",
    [
        "fewbit",
        "fewbit.errors",
        "fewbit.spec",
        "fewbit.spec.decoder",
        "fewbit.text",
        "fewbit.engine.types",
        "fewbit.engine.scheduler",
        "fewbit.engine.blocks",
        "fewbit.measure.load",
    ],
)
def test_imports_no_torch(module):
    code = f"import sys, {module}; print(*sorted({{'torch', 'transformers', 'fastapi'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [], f"import {module} also imports {done.stdout.strip()}"


def test_the_process_that_serves_imports_no_torch():
    """Its engines do, in processes of their own."""
    code = "import sys, fewbit.cli, fewbit.serve.launch; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["False"], done.stderr

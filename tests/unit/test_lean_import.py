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
    ],
)
def test_imports_no_torch(module):
    code = f"import sys, {module}; print(*sorted({{'torch', 'transformers', 'fastapi'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [], f"import {module} also imports {done.stdout.strip()}"

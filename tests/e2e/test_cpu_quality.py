"""What rounding inputs on the CPU costs a real model: at most 0.2 % of perplexity."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fewbit import cli
from fewbit.checkpoint import open_checkpoint
from fewbit.cli.common import read_windows
from fewbit.demo import demo_model
from fewbit.measure.quality import evaluate
from fewbit.ops.cpu import build as cpu_build

BUILT = cpu_build.library()


@pytest.mark.slow
@pytest.mark.skipif(isinstance(BUILT, str), reason=f"CPU KERNELS ARE NOT TESTED: {BUILT}")
@pytest.mark.parametrize("recipe", ["int8", "int8_wo", "int4", "mxfp4_wo", "nvfp4_wo"])
def test_rounded_inputs_cost_a_fifth_of_a_percent_at_most(recipe, tmp_path, capsys):
    source = Path(str(demo_model()))
    out = tmp_path / "small"
    assert cli.run(["compress", str(source), "--recipe", recipe, "-o", str(out), "-q", "--json"]) == 0
    model, device = open_checkpoint(out), torch.device("cpu")
    windows = read_windows(source / "heldout.txt.gz", source, 256, 24)
    exact = evaluate(model, None, windows, device).perplexity.value
    rounded = evaluate(model, None, windows, device, backend="auto").perplexity.value
    with capsys.disabled():
        print(json.dumps({"recipe": recipe, "exact": exact, "rounded": rounded, "ratio": rounded / exact}))
    assert rounded != exact  # the kernels ran
    assert abs(rounded / exact - 1) < 0.002

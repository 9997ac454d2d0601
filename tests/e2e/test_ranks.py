"""Several processes that calibrate together give what one gives."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest
import torch

from fewbit.checkpoint import open_checkpoint
from helpers import make_model

GPTQ = """
rules: [{match: "layers.*", weight: int4_g32}]
kv: {format: int8_head}
techniques: [awq: {}, gptq: {}]
calib: {samples: 7, length: 48, method: mse}
"""


def together(processes: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`fewbit` in several processes, as torchrun starts them."""
    for _ in range(5):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        run = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(port)]
        line = [sys.executable, *run, "-m", "fewbit.cli", *map(str, arguments)]
        done = subprocess.run(line, capture_output=True, text=True, timeout=1200, check=False)
        if "EADDRINUSE" not in done.stderr:  # somebody else has got the port meanwhile
            break
    return done


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("source"), hidden_size=128, intermediate_size=256)


def alone(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "fewbit.cli", *map(str, arguments)], capture_output=True, check=True)


def test_scales_from_largest_magnitudes_are_the_same_to_the_last_bit(source, tmp_path):
    line = ["compress", source, "--recipe", "fp8", "--kv", "fp8", "--samples", 5, "--length", 32, "--sample-tokens", 0]
    alone(*line, "-o", tmp_path / "one")
    done = together(2, *line, "-o", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("KL divergence") == 1  # one of them speaks
    for name in ("model.safetensors", "config.json", "recipe.yaml"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_second_moments_are_the_same_to_rounding(source, tmp_path):
    recipe = tmp_path / "own.yaml"
    recipe.write_text(GPTQ)
    line = ["compress", source, "--recipe", recipe, "--sample-tokens", 0]
    alone(*line, "-o", tmp_path / "one")
    done = together(2, *line, "-o", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    one, two = open_checkpoint(tmp_path / "one"), open_checkpoint(tmp_path / "two")
    for name in one.tensors:
        a, b = one.tensors[name], two.tensors[name]
        if name.startswith("layers.0.") and not isinstance(a, torch.Tensor):
            assert (a.codes == b.codes).float().mean() > 0.99, name
        elif name.startswith("layers.0."):
            assert torch.allclose(a.float(), b.float(), rtol=0.02), name


def test_more_processes_than_windows(source, tmp_path):
    line = ["compress", source, "--recipe", "fp8", "--samples", 1, "--length", 32, "-o", tmp_path / "out"]
    done = together(2, *line)
    assert done.returncode != 0
    assert "1 windows for 2 processes: each needs one; raise --samples" in done.stderr
    assert not (tmp_path / "out").exists()

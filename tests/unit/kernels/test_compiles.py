"""Every kernel of the decode step compiles for an H100 as it is cut for real models, and keeps to its registers.

Triton's interpreter sees neither an error of types nor a register that does not fit: a cut that spills runs, three
times slower. The compiler comes with Triton and needs no GPU.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need triton")

# rows of q, k and v; of o; of gate and up; of down, by (hidden, heads * head_dim)
MODELS = {
    "llama3-8b": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
    "llama3-70b": ((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)),
    "qwen3-8b": ((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288)),
    "llama3.2-1b": ((3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192)),
}
ENDINGS = ("add", "residual", "silu", "residual")
KINDS = ("bf16", "fp8", "int8", "int4", "w4a8", "fp4")
PRODUCTS = {
    ("product", kind, *shape, ending, m)
    for shapes in MODELS.values()
    for shape, ending in zip(shapes, ENDINGS, strict=True)
    for kind in KINDS
    for m in (1, 8, 16, 32, 64)
    if kind != "w4a8" or m == 1  # the kernels of more tokens are those of int4
}
ATTENTION = {
    ("attention", kv, *heads, rows)
    for kv in ("none", "e4m3", "int8")
    for heads in ((32, 8, 128), (64, 8, 128), (32, 8, 64), (14, 2, 64))
    for rows in (1, 4, 32)
}
BRANCHES = {("product", kind, 6144, 4096, "add", m, 128) for kind in KINDS for m in (1, 32)}
BRANCHES |= {("product", kind, 28672, 4096, "silu", m, 64) for kind in KINDS for m in (1, 32)}
SMALL = [("shrinking", 32), ("shrinking", 128), ("rounding", "nvfp4"), ("rounding", "mxfp4")]
CASES = SMALL + sorted(BRANCHES) + sorted(PRODUCTS) + sorted(ATTENTION)


def compiled(cases):
    script = Path(__file__).parents[2] / "h100.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, script], input=json.dumps(cases), capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return zip(cases, json.loads(done.stdout), strict=True)


def check(cases):
    for case, found in compiled(cases):
        assert found["stack"] <= 64, (case, found)  # a few registers saved once cost nothing that was measured
        assert found["shared"] <= 227 << 10, (case, found)


@pytest.mark.timeout(300)
def test_a_sample_compiles_and_spills_nothing():
    check(random.Random(0).sample(sorted(PRODUCTS), 12) + random.Random(0).sample(sorted(ATTENTION), 3) + SMALL)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_all_compile_and_spill_nothing():
    check(CASES)

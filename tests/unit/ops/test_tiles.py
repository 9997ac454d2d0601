"""How a product is cut: what was tuned counts, the rule serves every other shape, and both fit the GPU at hand."""

from __future__ import annotations

import random

import pytest

from fewbit.ops.attention.decode import cut_of
from fewbit.ops.device import HOPPER_SHARED
from fewbit.ops.linear.tiles import _stage_bytes, table, tile
from fewbit.spec.decoder import Attention, Rope

GPUS = {"NVIDIA H100 80GB HBM3": HOPPER_SHARED, "NVIDIA A100": 163 << 10, "NVIDIA L4": 99 << 10}
KINDS = ("bf16", "fp8", "int8", "int4", "w4a8", "fp4")
RANDOM = random.Random(0)
SHAPES = [(6144, 4096), (4096, 14336), (28672, 4096), (128256, 4096), (512, 256), (256, 640), (200, 192), (64, 64)]
SHAPES += [(RANDOM.randint(1, 3000), 64 * RANDOM.randint(1, 200)) for _ in range(40)]


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_cut_covers_the_product_and_fits(kind, gpu):
    for n, k in SHAPES:
        k = -(-k // 256) * 256 if kind in ("int4", "w4a8", "fp4") else k  # the kernel's view is filled up
        for m in (1, 2, 9, 16, 17, 33, 64, 128):
            for ending in ("store", "add", "silu", "residual"):
                if kind == "w4a8" and m > 1:
                    continue  # a GEMV alone
                cut = tile(kind, n, k, m, ending, gpu, GPUS[gpu])
                if cut["gemv"]:
                    assert m == 1
                    width = cut["BK"] if "BK" in cut else cut["KC"] * 256
                    assert width * cut["NIT"] >= k
                    assert "BK" in cut or width * cut["NIT"] == k
                else:
                    step = cut.get("BK", 256)
                    assert k % (step * cut["SPLIT"]) == 0, (n, k, m, cut)
                    assert cut["BM"] >= 8
                    assert cut["SPLIT"] == 1 or ending in ("add", "residual")
                    held = cut["STAGES"] - (GPUS[gpu] < HOPPER_SHARED)
                    assert _stage_bytes(kind, cut) * held <= GPUS[gpu]


def test_what_was_tuned_is_what_is_taken():
    assert "int4 28672x4096 1" in table("NVIDIA H100 80GB HBM3")
    key, tuned = next((k, v) for k, v in table("NVIDIA H100 80GB HBM3").items() if k.startswith("fp8") and v["gemv"])
    n, k = map(int, key.split()[1].split("x"))
    assert tile("fp8", n, k, 1, "store", "NVIDIA H100 80GB HBM3", HOPPER_SHARED) == tuned
    key, tuned = next((k, v) for k, v in table("NVIDIA H100 80GB HBM3").items() if k.startswith("fp4 28672x4096 1"))
    assert tile("fp4", 28672, 4096, 1, "silu", "NVIDIA H100 80GB HBM3", HOPPER_SHARED) == tuned | {
        "BM": tuned.get("BM", 8)
    }
    assert table("NVIDIA H200") == table("NVIDIA H100 80GB HBM3")
    assert table("NVIDIA A100") == {}


@pytest.mark.parametrize("shared", GPUS.values())
@pytest.mark.parametrize("depth", [32, 64, 128, 256])
def test_pages_of_attention_fit(depth, shared):
    a = Attention(32, 8, depth, Rope(1e4))
    for kv in ("none", "e4m3", "int8"):
        for rows in (1, 2, 7, 32, 128):
            cut = cut_of(rows, a, kv, 64, "", shared)
            assert cut["STAGES"] * 2 * 64 * depth * (2 if kv == "none" else 1) <= shared
            assert 1 <= cut["SPLITS"] <= 16

"""How a skinny product is cut into programs: measured for the shapes that were tuned, a rule for all others.

The tables lie in ``tuned/``, one a GPU, made by ``benchmarks/tune_step.py``. Nothing is tuned while a request waits.
"""

from __future__ import annotations

import functools
import json
from importlib.resources import files
from typing import Any

from fewbit.ops.device import HOPPER_SHARED

Tile = dict[str, Any]


def tile(kind: str, n: int, k: int, m: int, ending: str, gpu: str, shared: int) -> Tile:
    """The constants of a kernel's launch.

    Args:
        kind: ``bf16``, ``fp8``, ``int8``, ``int4``, ``w4a8`` or ``fp4``: what a weight is.
        n: rows of the weight.
        k: its columns as the kernel sees them, filled up.
        m: tokens; 1: the answer may be a GEMV (``gemv`` is True).
        ending: how the product ends, see `triton_epilogue`.
        gpu: the name of the GPU.
        shared: bytes of shared memory that a program of it may have.
    """
    # what was tuned for 32 tokens is closer than the rule for a few less or more
    bm = _bucket(m)
    found = tuned(gpu, key(kind, n, k, m)) or (tuned(gpu, key(kind, n, k, 32)) if bm > 1 else None)
    made = found or _rule(kind, n, k, bm)
    if not made["gemv"]:
        made["BM"] = bm if bm > 1 else made.get("BM", 8)
        if made["BM"] == 64 and made["BN"] == 128 and kind in ("int4", "fp4"):
            made["num_warps"] = 8  # 4 spill
        if kind in ("int4", "w4a8") and made["num_warps"] == 8 and made["BM"] <= 32:
            made["maxnreg"] = 128  # with the 163 that the compiler takes only one program fits a multiprocessor
        if ending in ("store", "silu"):  # nobody adds up what several programs store
            made["SPLIT"] = 1
        # Triton keeps one stage less in shared memory where it does not use Hopper's matrix instructions
        room = (shared - 2048) // _stage_bytes(kind, made) + (shared < HOPPER_SHARED)
        made["STAGES"] = max(1, min(made["STAGES"], room))
    return made


def key(kind: str, n: int, k: int, m: int) -> str:
    """Where the table has the cut of a product of `m` tokens."""
    return f"{kind} {n}x{k} {_bucket(m)}"


def _bucket(m: int) -> int:
    return 1 if m == 1 else next((b for b in (8, 16, 32) if m <= b), 64)


def _stage_bytes(kind: str, cut: Tile) -> int:
    """Shared memory of what one step of the reduction loads: a tile of the weight, and one of x."""
    if kind in ("bf16", "fp8", "int8"):
        size = 2 if kind == "bf16" else 1
        return int((cut["BN"] * size + cut["BM"] * 2) * cut["BK"])  # x may stay bfloat16 under 8-bit weights
    return int(cut["BN"] * (144 if kind == "fp4" else 128) + cut["BM"] * 512)


def _rule(kind: str, n: int, k: int, bm: int) -> Tile:
    # a thread of a GEMV holds 32 numbers (16 words of 4 bits) of two pieces; with more the compiler spills
    if bm == 1 and kind in ("bf16", "fp8", "int8"):
        width = min(_power_of_two(k), 2048)
        if width < 512:  # few numbers in a row, or an odd number of them: one masked piece after another
            width = min(1 << (k - 1).bit_length(), 2048)
        steps = -(-k // width)
        return {"gemv": True, "BN": 4, "BK": width, "NIT": steps, "num_warps": 8 if steps > 1 else 4}
    if bm == 1 and kind in ("int4", "w4a8") and n < 16384:
        blocks = k // 256
        columns = min(_power_of_two(blocks), 8)
        return {"gemv": True, "BN": 4, "KC": columns, "NIT": blocks // columns, "num_warps": max(columns // 4, 1)}
    if kind in ("bf16", "fp8", "int8"):
        bytes_ = 2 if kind == "bf16" else 1
        bk = next(b // bytes_ for b in (256, 128, 64) if k % (b // bytes_) == 0)
        rows = 128 if n >= 16384 else 64
        return {
            "gemv": False, "BN": rows, "BK": bk, "num_warps": 4, "STAGES": 3 if rows == 128 else 4,
            "SPLIT": _split(n // rows, k // bk), "PREFETCH": 2,
        }  # fmt: skip
    rows = 128 if n >= 16384 and (bm > 16 or kind != "fp4") else 64
    return {
        "gemv": False, "BN": rows, "num_warps": 8 if rows == 128 else 4, "STAGES": 3,
        "SPLIT": _split(-(-n // rows), k // 256), "PREFETCH": 2,
    }  # fmt: skip


def _split(programs: int, steps: int) -> int:
    """In how many pieces the reduction is cut: two programs a multiprocessor, at least two steps each."""
    fitting = [s for s in (2, 4, 7, 8) if steps % s == 0 and steps // s >= 2 and programs * s <= 400]
    return max(fitting, default=1)


def _power_of_two(number: int) -> int:
    return number & -number


def tuned(gpu: str, key: str) -> Tile:
    """What was measured to be fastest, a copy; empty: nothing was."""
    return dict(table(gpu).get(key, {}))


@functools.cache
def table(gpu: str) -> dict[str, Tile]:
    """All that was measured on a GPU, by kernel and shape.

    An H200 has the multiprocessors of an H100 and faster memory: without a table of its own it takes that one.
    """
    found: dict[str, Tile] = {}
    for name in ("H100", "H200") if "H200" in gpu else ("H100",) if "H100" in gpu else ():
        path = files("fewbit.ops.linear") / "tuned" / f"{name}.json"
        found |= json.loads(path.read_text()) if path.is_file() else {}
    return found

"""Compile the decode step's kernels for an H100, without one: what Triton's interpreter cannot see.

A script of its own, because the tests' process has the kernels interpreted. Reads cases as JSON from its input and
answers with registers, bytes of stack (spilled registers) and bytes of shared memory of each.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fewbit.ops.attention.decode import cut_of
from fewbit.ops.attention.triton_decode import decode_attention
from fewbit.ops.device import HOPPER_SHARED
from fewbit.ops.linear import triton_branch, triton_four, triton_wide
from fewbit.ops.linear.tiles import tile
from fewbit.ops.rows import triton_rows
from fewbit.spec.decoder import Attention, Rope

GPU = "NVIDIA H100 80GB HBM3"
TYPES = dict.fromkeys(("x_ptr", "g_ptr", "out_ptr", "s_ptr", "k_ptr", "v_ptr"), "*bf16")
TYPES |= dict.fromkeys(("count_ptr", "table_ptr", "len_ptr"), "*i32")
TYPES |= {"w_ptr": "*i16", "z_ptr": "*i8", "ahead_ptr": "*u8", "eps": "fp32", "scale": "fp32"}
SCALARS = ("M", "N", "K", "blocks", "ahead", "max_pages", "window", "qkv_stride")
STORED = {"bf16": "*bf16", "fp8": "*fp8e4nv", "int8": "*i8", "none": "*bf16", "e4m3": "*fp8e4nv"}


def compile_kernel(kernel: Any, constants: dict[str, Any], types: dict[str, str], options: dict[str, Any]) -> dict:
    """One kernel; arguments that are not constants are float32 memory unless `types` or `TYPES` say more."""
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    known = dict.fromkeys(SCALARS, "i32") | TYPES | types
    signature = {n: "constexpr" if n in constants else known.get(n, "*fp32") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n.endswith("_ptr") or n in ("N", "K")}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"launch_pdl": True} | options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = dict(part.split(":") for part in told.splitlines()[-1].split() if ":" in part)
    return {"registers": int(found["REG"]), "stack": int(found["STACK"]), "shared": made.metadata.shared}


def product(kind: str, n: int, k: int, ending: str, m: int, rank: int = 0) -> dict:
    """A product of the decode step as the table, or the rule, cuts it; `rank`: of a branch beside it."""
    cut = tile(kind, n, k, m, ending, GPU, HOPPER_SHARED)
    alone = ending == "add" and cut.get("SPLIT", 1) == 1
    constants = {
        "OUT": "store" if alone else "atomic" if ending == "add" else ending, "NORM": ending != "residual",
        "TOPS": True, "BIAS": False, "RANK": rank, "OUT_CODE": "none",
        "AHEAD": True, "PDL": 1, "PTX": True, "EVEN": True,
        "ASYM": False, "C": 64, "PER": 2, "SX": "rows" if kind in ("w4a8", "fp8", "int8") else "none",
        "SCALED": kind != "bf16", "DYNAMIC": kind in ("int8", "w4a8"),
        "CODE": "e4m3" if kind in ("w4a8", "fp8") else "none",
    } | cut  # fmt: skip
    options = {name: cut[name] for name in ("num_warps", "maxnreg") if name in cut}
    types = {"b_ptr": "*bf16"} | ({"out_ptr": "*fp32"} if ending == "add" else {})
    if kind in ("bf16", "fp8", "int8"):
        types |= {"w_ptr": STORED[kind]}
        if not cut["gemv"]:
            return compile_kernel(triton_wide.wide_gemm, constants, types | {"x_ptr": STORED[kind]}, options)
        types |= {"x_ptr": "*bf16"}
        if kind == "int8":
            return compile_kernel(triton_wide.int8_gemv, constants, types | {"w_ptr": "*i32"}, options)
        return compile_kernel(triton_wide.wide_gemv, constants | {"SX": False}, types, options)
    if kind == "fp4":
        return compile_kernel(triton_four.fp4_gemm, constants, types | {"s_ptr": "*i32"}, options)
    if cut["gemv"]:
        words = {"x_ptr": "*i32", "w_ptr": "*i32", "s_ptr": "*i32"}
        return compile_kernel(triton_four.int4_gemv, constants | {"SX": False}, types | words, options)
    return compile_kernel(triton_four.int4_gemm, constants, types, options)


def attention(kv: str, heads: int, kv_heads: int, head_dim: int, rows: int) -> dict:
    """Decode attention as the table, or the rule, cuts it."""
    shape = Attention(heads, kv_heads, head_dim, Rope(1e4))
    cut = cut_of(rows, shape, kv, 64, GPU)
    constants = {
        "H": heads, "HK": kv_heads, "D": head_dim, "PAGE": 64, "KV": kv, "WRITE": True, "QK_NORM": False,
        "WINDOW": False, "CODE": "none", "TOPS": True, "AHEAD": True, "CLEAR": True, "PTX": True,
    } | cut  # fmt: skip
    types = {"k_ptr": STORED[kv], "v_ptr": STORED[kv]}
    return compile_kernel(decode_attention, constants, types, {"num_warps": cut["num_warps"]})


def shrinking(rank: int) -> dict:
    """The first half of a branch."""
    constants = {"BM": 16, "BK": 128, "RANK": rank, "CLEAR": rank, "NORM": True, "PDL": 1}
    return compile_kernel(triton_branch.shrink, constants, {"a_ptr": "*bf16"}, {"num_warps": 4})


def rounding(code: str) -> dict:
    """The decode step's rounding of a row whose scale is known."""
    constants = {"BLOCK": 2048, "NORM": True, "CODE": code, "DYNAMIC": False, "PDL": 1, "PTX": True}
    return compile_kernel(triton_rows.round_known, constants, {"s_ptr": "*fp32"}, {"num_warps": 4})


def run(case: list) -> dict:
    """A case: the name of a function of this file, and its arguments."""
    functions = {f.__name__: f for f in (product, attention, shrinking, rounding)}
    return functions[case[0]](*case[1:])


if __name__ == "__main__":
    with ProcessPoolExecutor(2) as pool:
        print(json.dumps(list(pool.map(run, json.load(sys.stdin)))))

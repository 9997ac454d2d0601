"""Time the candidates of every skinny product on this GPU and write the table of the fastest.

    python benchmarks/tune_linear.py --kinds int4,fp8 --rows 1,32 --out src/fewbit/ops/linear/tuned/H100.json

Each candidate runs as a CUDA graph of at least 24 calls over weights that together exceed the cache many times, with
dependent launches, and with the ending that the product has in a model. The median of 7 replays counts. Candidates are
compiled by many processes first; what does not compile or does not fit the multiprocessor is left out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path

import torch

from fewbit.measure.dummy import _quantized
from fewbit.numerics.format import FORMATS
from fewbit.numerics.quantspec import QuantSpec
from fewbit.ops.linear.four import Fp4, Int4
from fewbit.ops.linear.gpu import Codes, Folded, Residual
from fewbit.ops.linear.problem import LinearWeights
from fewbit.ops.linear.tiles import _rule
from fewbit.ops.linear.wide import Wide

SHAPES = {
    "llama3-8b": [(6144, 4096, "add"), (4096, 4096, "residual"), (28672, 4096, "silu"), (4096, 14336, "residual")],
    "llama3-70b": [(10240, 8192, "add"), (8192, 8192, "residual"), (57344, 8192, "silu"), (8192, 28672, "residual")],
    "qwen3-8b": [(24576, 4096, "silu"), (4096, 12288, "residual")],
    "llama3.2-1b": [(3072, 2048, "add"), (2048, 2048, "residual"), (16384, 2048, "silu"), (2048, 8192, "residual")],
    "heads": [(128256, 4096, "store"), (128256, 8192, "store"), (128256, 2048, "store"), (151936, 4096, "store")],
}
KINDS = {
    "bf16": (Wide(), QuantSpec()),
    "fp8": (Wide(), QuantSpec(FORMATS["fp8"], FORMATS["fp8"], "static")),
    "int8": (Wide(), QuantSpec(FORMATS["int8_row"], FORMATS["int8_row"])),
    "int4": (Int4(), QuantSpec(FORMATS["int4_g128"])),
    "w4a8": (Int4(), QuantSpec(FORMATS["int4_g128"], FORMATS["fp8_row"])),
    "fp4": (Fp4(), QuantSpec(FORMATS["nvfp4"])),
}


def candidates(kind: str, n: int, k: int, bm: int, ending: str) -> list[dict]:
    """What is tried; the rule's own choice first."""
    base = "int4" if kind == "w4a8" else kind
    found = [_rule(base, n, k, bm)]
    splits = [1] if ending in ("silu", "store") else [1, 2, 4, 7, 8]
    if base in ("bf16", "fp8", "int8"):
        size = 2 if base == "bf16" else 1
        if bm == 1:
            for bn in (2, 4, 8):
                for bk in (1024, 2048, 4096, 8192, 16384):
                    if (k % bk and bk < k) or bk >= 2 * k or bn * bk > 65536:
                        continue
                    found += [{"gemv": True, "BN": bn, "BK": bk, "NIT": -(-k // bk), "num_warps": w} for w in (4, 8)]
        if bm > 1 or kind == "bf16" or (kind == "fp8" and ending == "residual"):
            for bn, warps in ((64, 4), (128, 4), (128, 8)):
                for bytes_ in (128, 256):
                    for stages in (3, 4):
                        for split in splits:
                            if k % (bytes_ // size * split) or not 120 <= -(-n // bn) * split <= 600:
                                continue
                            cut = {"gemv": False, "BN": bn, "BK": bytes_ // size, "num_warps": warps}
                            found.append(cut | {"STAGES": stages, "SPLIT": split, "PREFETCH": 2})
    else:
        blocks = -(-k // 256)
        if bm == 1 and base == "int4":
            for bn in (4, 8, 16):
                for kc in (2, 4, 8, 16):
                    if blocks % kc == 0:
                        found += [
                            {"gemv": True, "BN": bn, "KC": kc, "NIT": blocks // kc, "num_warps": w} for w in (1, 2, 4)
                        ]
        if kind != "w4a8":
            for bn, warps in ((64, 4), (128, 4), (128, 8)):
                for stages in (2, 3, 4):
                    for split in splits:
                        if blocks % split == 0 and 100 <= -(-n // bn) * split <= 600:
                            cut = {"gemv": False, "BN": bn, "num_warps": warps}
                            found.append(cut | {"STAGES": stages, "SPLIT": split, "PREFETCH": 2})
    unique = []
    for cut in found:
        if not cut["gemv"]:
            cut["BM"] = max(bm, 16)
        if ending in ("store", "silu") and not cut["gemv"]:
            cut["SPLIT"] = 1
        if cut not in unique:
            unique.append(cut)
    return unique


class Bench:
    """One product with as many copies of its weights as it takes to get past the cache."""

    def __init__(self, kind: str, n: int, k: int, ending: str, copies: int | None = None) -> None:
        kernel, quant = KINDS[kind]
        self.n, self.k, self.ending, self.kind = n, k, ending, kind
        generator = torch.Generator("cuda").manual_seed(0)
        rows = n // 2 if ending == "silu" else n
        bits = 16 if quant.weight is None else quant.weight.element.bits
        self.bytes = n * k * bits / 8 * {"int4": 1 + 1 / 32, "w4a8": 1 + 1 / 32, "fp4": 1.125}.get(kind, 1)
        count = copies or max(2, min(32, -(-400_000_000 // int(self.bytes))))
        scale = torch.tensor(0.02, device="cuda") if quant.calibrated else None
        self.linears = []
        for _ in range(count):
            pieces = []
            for _ in range(2 if ending == "silu" else 1):
                if quant.weight is None:
                    w = torch.randn(rows, k, generator=generator, device="cuda").bfloat16() * 0.02
                else:
                    w = _quantized((rows, k), quant.weight, generator)
                pieces.append(LinearWeights(quant, w, None, scale))
            self.linears.append(kernel.join(pieces, "", ending == "silu"))

    def call(self, linear, m: int, cut: dict):
        """A closure that launches one product."""
        k, n = self.k, self.n
        x = torch.randn(m, k, device="cuda").bfloat16()
        linear.tile = lambda *_: dict(cut)
        sums, clear = torch.rand(m, 16, device="cuda") * k / 16, torch.zeros(m, 16, device="cuda")
        rounding, dtype = linear.wants(m)
        handed = x
        given = linear.rounding is not None and linear.rounding.scale is not None and self.ending == "residual"
        if given:  # the producer made the codes
            handed = Codes((x * 20).to(linear.rounding.dtype), linear.rounding.scale)
        elif rounding is not None:
            scale = rounding.scale if rounding.scale is not None else torch.rand(m, device="cuda") + 0.01
            handed = Codes((x * 20).to(dtype or rounding.dtype), scale)
        norm = Folded(sums, clear, 1e-5) if self.ending != "residual" and not isinstance(handed, Codes) else None
        residual = None
        out = torch.zeros(m, n, device="cuda")
        if self.ending == "residual":
            res, g = torch.randn(m, n, device="cuda"), torch.rand(n, device="cuda").bfloat16()
            residual = Residual(
                res, g, torch.zeros(m, 16, device="cuda"), torch.zeros(8192, dtype=torch.int32, device="cuda")
            )
            out = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
        elif self.ending == "silu":
            out = torch.empty(m, n // 2, device="cuda", dtype=torch.bfloat16)
        return lambda: linear.few(handed, out, ending=self.ending, norm=norm, residual=residual, pdl=True)

    def seconds(self, m: int, cut: dict) -> float:
        """Median time of a call in a graph."""
        calls = [self.call(linear, m, cut) for linear in self.linears]
        calls = calls * -(-24 // len(calls))
        for c in calls[:2]:
            c()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for c in calls:
                c()
        graph.replay()
        times = []
        for _ in range(7):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(3):
                graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) * 1e-3 / 3 / len(calls))
        return statistics.median(times)


def _compile(job):
    (kind, n, k, ending), cuts = job
    bench = Bench(kind, n, k, ending, 1)
    for m, cut in cuts:
        try:
            bench.call(bench.linears[0], m, cut)()
            torch.cuda.synchronize()
        except Exception as fault:
            print("left out:", kind, n, k, cut, str(fault).splitlines()[0][:80], file=sys.stderr)
    return len(cuts)


def main() -> None:
    """Tune."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--models", default="llama3-8b")
    parser.add_argument("--rows", default="1,16,32,64")
    parser.add_argument("--out", required=True)
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which nothing more is timed")
    options = parser.parse_args()
    began, rows = time.time(), [int(r) for r in options.rows.split(",")]
    todo = []
    for kind in options.kinds.split(","):
        for model in options.models.split(","):
            for n, k, ending in SHAPES[model]:
                if (model == "heads") == (kind == "bf16") or model != "heads":
                    tried = [r for r in rows if r == 1 or kind != "w4a8"]  # the products of several rows are int4's
                    todo.append(
                        ((kind, n, k, ending), [(r, c) for r in tried for c in candidates(kind, n, k, r, ending)])
                    )
    jobs = [(case, cuts[i::4]) for case, cuts in todo for i in range(4)]
    workers = max(1, min(14, (os.cpu_count() or 2) - 2))
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        done = sum(pool.imap_unordered(_compile, jobs))
    print(f"compiled {done} candidates in {time.time() - began:.0f} s", flush=True)
    path = Path(options.out)
    table = json.loads(path.read_text()) if path.is_file() else {}
    for (kind, n, k, ending), cuts in todo:
        if time.time() - began > options.limit:
            print("out of time", flush=True)
            break
        bench = Bench(kind, n, k, ending)
        for r in sorted({m for m, _ in cuts}):
            found = []
            for m, cut in cuts:
                if m == r:
                    try:
                        found.append((bench.seconds(m, cut), cut))
                    except Exception:  # does not fit
                        continue
            ruled, best = found[0][0], min(found, key=lambda f: f[0])
            speed = bench.bytes / best[0] / 1e12
            print(
                f"{kind:5} {n}x{k} {r:3} {best[0] * 1e6:7.2f} µs {speed:.2f} TB/s (rule {ruled * 1e6:.2f}) {best[1]}",
                flush=True,
            )
            table[f"{kind} {n}x{k} {r}"] = {key: v for key, v in best[1].items() if key != "BM"}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(table, indent=0, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()

"""Time decode attention in other cuts: µs and bytes a second of K and V, in a graph over caches past the L2.

python benchmarks/tune_attention.py
"""

from __future__ import annotations

import itertools
import statistics

import torch

from fewbit.model.attend import KVCodec
from fewbit.model.fused import cosines
from fewbit.numerics.format import FORMATS
from fewbit.numerics.quantspec import KVSpec
from fewbit.ops.attention.decode import cut_of, decode_attention
from fewbit.spec.decoder import Attention, Rope


def seconds(calls):
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
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


def main():
    a = Attention(32, 8, 128, Rope(500000.0))
    length, device = 2304, "cuda"
    cos, sin = cosines(a.position, 128, torch.arange(4096, device=device))
    for m, kv, page in itertools.product((1, 32), ("none", "fp8"), (64, 128)):
        scales = [torch.full((8,), 0.03, device=device)] * 2
        codec = (
            KVCodec(torch.bfloat16)
            if kv == "none"
            else KVCodec(torch.bfloat16, KVSpec(FORMATS[kv], FORMATS[kv]), *scales)
        )
        width = -(-length // page)
        size = 2 if kv == "none" else 1
        copies = max(2, min(24, int(400e6 // (m * length * 8 * 128 * 2 * size))))
        caches = []
        for _ in range(copies):
            pair = [
                torch.randn(m * width, 8, 128, page, device=device).to(
                    torch.bfloat16 if size == 2 else torch.float8_e4m3fn
                )
                for _ in "kv"
            ]
            caches.append(
                [pair[0].view(m * width, 8, page, 128), pair[1] if size == 1 else pair[1].view(m * width, 8, page, 128)]
            )
        table = torch.randperm(m * width, device=device).view(m, width).int()
        lengths = torch.full((m,), length, device=device, dtype=torch.int32)
        qkv, clear = torch.randn(m, 6144, device=device), torch.zeros(m, 6144, device=device)
        out = torch.empty(m, 4096, device=device, dtype=torch.bfloat16)
        scratch = (
            torch.empty(m * 32 * 32 * 128, device=device),
            torch.empty(m * 32 * 64, device=device),
            torch.zeros(m * 8, dtype=torch.int32, device=device),
        )
        bytes_ = m * length * 8 * 128 * 2 * size
        found = []
        splits = ((12, 18) if page == 128 else (9, 18)) if m == 1 else (1,)
        for split, warps, stages in itertools.product(
            splits, (2, 4) if m == 1 else (4, 8), (3,) if m == 1 else (2, 3, 4)
        ):
            for pdl, late, prefetch in (
                ((True, True, True), (True, False, True), (True, True, False), (False, False, False))
                if m == 1
                else ((False, False, False),)
            ):
                cut = {
                    "SPLITS": split,
                    "STAGES": stages,
                    "num_warps": warps,
                    "PDL": pdl,
                    "PREFETCH": prefetch,
                    "LATE": late,
                }
                if stages != 3 and not (pdl and late and prefetch) and m == 1:
                    continue
                calls = [
                    lambda c=c: decode_attention(
                        qkv,
                        out,
                        *c,
                        codec,
                        table,
                        lengths,
                        a,
                        page,
                        scratch,
                        write=(cos, sin, {}),
                        clear=clear,
                        pdl=True,
                        cut=cut,
                    )
                    for c in caches
                ]
                try:
                    found.append((seconds(calls * -(-24 // len(calls))), cut))
                except Exception as fault:
                    print(str(fault).splitlines()[0][:60])
        found.sort(key=lambda f: f[0])
        print(f"m={m} {kv} page {page}: rule {cut_of(m, 8, page)}")
        for t, cut in found[:4] + found[-1:]:
            print(f"   {t * 1e6:7.2f} µs {bytes_ / t / 1e12:.2f} TB/s {cut}")


if __name__ == "__main__":
    main()

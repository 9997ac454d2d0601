"""What a device reaches in this run: the ceilings that figures are held against, besides a vendor's peaks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Ceilings:
    """Bytes a second of a large copy, read and written, and FLOP/s of large products.

    Attributes:
        copy: of memory; on a CPU of a large sum, where that reads faster.
        bf16: of products in the arithmetic of unquantized layers: BF16, on a CPU float32.
        eight: with 8-bit inputs: FP8, else INT8; on a CPU the same as `bf16`.
    """

    copy: float
    bf16: float
    eight: float


def ceilings(device: torch.device) -> Ceilings:
    """Measure them; about half a second."""
    if device.type != "cuda":
        return _of_cpu()
    ends = torch.empty(2, 1 << 30, dtype=torch.uint8, device=device)
    copy = ends.numel() / seconds(lambda: ends[0].copy_(ends[1]))
    size = 8192
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    flops = 2.0 * size**3
    bf16 = flops / seconds(lambda: a @ b.t())
    if torch.cuda.get_device_capability(device) >= (8, 9):
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        one = torch.ones((), device=device)
        eight = flops / seconds(
            lambda: torch._scaled_mm(
                a8, b8.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
            )
        )
    else:
        a8, b8 = a.to(torch.int8), b.to(torch.int8)
        eight = flops / seconds(lambda: torch._int_mm(a8, b8.t()))
    return Ceilings(copy, bf16, eight)


def finish(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _of_cpu() -> Ceilings:
    """The best of a few: whatever else runs on this machine only adds."""
    ends = torch.ones(2, 1 << 25)  # 256 MiB, beyond most caches; written, or all pages are the same one
    memory = max(ends.nbytes / _quickest(call) for call in (lambda: ends[0].copy_(ends[1]), ends.sum))
    size = 1024
    a, b = torch.randn(2, size, size)
    product = 2.0 * size**3 / _quickest(lambda: a @ b)
    return Ceilings(memory, product, product)


def _quickest(call: Callable[[], Any], times: int = 4) -> float:
    found = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)


def seconds(call: Callable[[], Any], times: int = 10, repeats: int = 5) -> float:
    """Median time of one call on the GPU."""
    call()
    found: list[float] = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            call()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) * 1e-3 / times)
    return statistics.median(found)

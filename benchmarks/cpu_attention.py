"""Attention over pages on a CPU, in C and in torch, in turns: a layer of Llama-3.2-1B, one thread, more than a cache.

    .venv/bin/python benchmarks/cpu_attention.py [--rounds N]

Processor time of a layer, which busy neighbours stretch less than the clock; medians, and of ratios the rounds' median.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from fewbit.engine.attend import KVCache, PagedAttend
from fewbit.engine.batch import Batch, Piece
from fewbit.model.attend import KVCodec
from fewbit.numerics.format import FORMATS
from fewbit.numerics.quantspec import KVSpec
from fewbit.spec.decoder import MLP, Attention, DecoderSpec, Layer, Norm

SHAPE = Attention(32, 8, 64, None)
PAGE, LAYERS = 16, 8  # of layers in turns: more K and V than a cache holds
CASES = [
    ("bf16", 1, 512),
    ("bf16", 1, 4096),
    ("int8", 1, 4096),
    ("fp8", 1, 4096),
    ("bf16", 256, 0),
    ("bf16", 256, 1024),
]


def codec(name: str) -> KVCodec:
    """K and V in BF16, or in codes under one scale."""
    if name == "bf16":
        return KVCodec(torch.bfloat16)
    return KVCodec(torch.bfloat16, KVSpec(FORMATS[name], FORMATS[name]), torch.tensor(0.02), torch.tensor(0.02))


def measure(name: str, rows: int, past: int, rounds: int) -> str:
    """A line of the table."""
    pages = -(-(past + rows) // PAGE)
    norm = Norm(1e-5)
    layer = Layer(SHAPE, MLP(64), norm, norm)
    spec = DecoderSpec(vocab=64, hidden=64, layers=(layer,) * LAYERS, final_norm=norm, tied=True, context=1 << 20)
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(rows, heads, SHAPE.head_dim, generator=random) for heads in (SHAPE.heads, 8, 8))
    batch = Batch([Piece("", [0] * rows, past, list(range(pages)))])
    slots, tables = torch.arange(past, past + rows), torch.arange(pages)
    ways = []
    for exact in (True, False):
        cache = KVCache(spec, [codec(name)] * LAYERS, pages, PAGE, torch.device("cpu"), exact)
        assert exact or None not in cache.paged, "there is no library: fewbit doctor says why"
        for stored in (*cache.k, *cache.v):
            stored.copy_(codec(name).store(*(torch.randn(stored.shape, generator=random),) * 2)[0])
        ways.append(cache)
    spent: list[list[float]] = [[], []]
    for _ in range(rounds + 1):
        for cache, times in zip(ways, spent, strict=True):
            begun = time.thread_time()
            attend = PagedAttend(cache, batch, slots, tables)
            for index in range(LAYERS):
                attend(index, q, k, v, SHAPE)
            times.append((time.thread_time() - begun) / LAYERS * 1e3)
    old, new = (times[1:] for times in spent)  # the first round touches the memory
    ratio = statistics.median(a / b for a, b in zip(old, new, strict=True))
    middle = statistics.median
    return (
        f"| {name} | {rows} | {past} | {middle(old):.2f} ({min(old):.2f} to {max(old):.2f}) "
        f"| {middle(new):.2f} ({min(new):.2f} to {max(new):.2f}) | {ratio:.1f} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        print("| K and V | queries | past | torch, ms a layer | in C | ratio |\n| --- | --- | --- | --- | --- | --- |")
        for case in CASES:
            print(measure(*case, args.rounds), flush=True)


if __name__ == "__main__":
    main()

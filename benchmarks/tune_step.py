"""Tune the decode step of a model on this GPU: every product, and attention, in the place where it runs.

    python benchmarks/tune_step.py --config llama3-8b --cells fp8:1,int4:1,int4:32 --kv fp8 --out tuned/H100.json

What a kernel takes alone says little: how it starts while the one before it ends, and how its programs spread over
the multiprocessors that become free, decides as much. So a graph of 8 layers is timed as a whole and one part at a time
is varied (coordinate descent, two rounds); the median of 5 timings counts. Candidates are compiled first, by as many
processes as there are processors; one that does not compile is left out. The result is merged into --out.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch

from fewbit.compress.recipe import AS_IT_WAS, read_recipe
from fewbit.engine.gpu import make_pages
from fewbit.measure.ceilings import seconds
from fewbit.measure.dummy import dummy_checkpoint, shape_named
from fewbit.model.load import Loader
from fewbit.model.step import DecodeStep
from fewbit.ops.attention.decode import stored_as
from fewbit.ops.linear.tiles import Tile, table

ROLES = {"qkv": "add", "o": "residual", "gate_up": "silu", "down": "residual"}
LENGTHS = (2112, 2496)  # in answers of 512 after prompts of 2048
PAGE = 64
SHARED = 227 << 10  # bytes of shared memory that the programs of a multiprocessor have together
Cell = tuple[str, str, int, str]  # config, recipe, rows, K/V


class Step:
    """The decode step of a few layers, with the table it reads its cuts from."""

    def __init__(self, cell: Cell, layers: int) -> None:
        config, recipe, rows, kv = cell
        device = torch.device("cuda", 0)
        shape = shape_named(config) | {"vocab_size": 4096}
        made = (AS_IT_WAS if recipe == "bf16" else read_recipe(recipe)).with_kv(None if kv == "bf16" else kv)
        self.rows = rows
        self.decoder = Loader(dummy_checkpoint(shape, made, device, layers=layers), device).fused()
        self.attention, self.kv = self.decoder.spec.layers[0].attention, stored_as(self.decoder.codecs[0])
        width = -(-LENGTHS[-1] // PAGE)
        self.step = DecodeStep(self.decoder, make_pages(self.decoder, rows * width, PAGE), rows, width * PAGE)
        # room for finer cuts of attention than the table holds yet
        pieces = 48 * rows * self.attention.heads
        parts, stats = (torch.zeros(pieces * each, device=device) for each in (self.attention.head_dim, 2))
        self.step.scratch = parts, stats, self.step.scratch[2]
        inputs = torch.zeros(rows * (3 + width), dtype=torch.int32)
        inputs[rows : 2 * rows] = -1
        inputs[3 * rows :] = torch.randperm(rows * width, generator=torch.Generator().manual_seed(0))
        self.step.inputs[: len(inputs)].copy_(inputs)
        self.table = table(self.step.gpu)

    def key(self, part: str) -> str:
        """Where the table has the cut of a part."""
        if part == "attention":
            a = self.attention
            return f"attention {self.kv} {a.heads}x{a.kv_heads}x{a.head_dim} {PAGE} {self.rows}"
        return getattr(self.decoder.layers[0], part).key(self.rows)

    def cut(self, part: str) -> Tile:
        """What the table or the rule says now."""
        if part == "attention":
            return self.step.cut(self.rows, self.attention, self.decoder.codecs[0])
        linear = getattr(self.decoder.layers[0], part)
        return linear.tile(self.rows, ROLES[part])

    def run(self) -> None:
        """Once, to compile."""
        self.step.run(self.rows)
        torch.cuda.synchronize()

    def seconds(self) -> float:
        """Of the step, in a graph; the mean over the lengths of sequences."""
        self.run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step.run(self.rows)
        times = []
        for length in LENGTHS:
            self.step.inputs[2 * self.rows : 3 * self.rows] = length
            times.append(seconds(graph.replay))
        return sum(times) / len(times)


def candidates(step: Step, part: str) -> list[Tile]:
    """What is tried for a part; for products without the moment at which the next kernel may start."""
    if part == "attention":
        few = step.rows <= 4
        names = "SPLITS", "num_warps", "STAGES", "PREFETCH", "PDL"
        values = (
            ((12, 16, 20, 24, 40), (2, 4, 8), (2, 3), (1, 3), (2,)) if few
            else ((1, 2), (2, 4), (3, 4, 6), (0, 2), (0, 2))
        )  # fmt: skip
        return [dict(zip(names, each, strict=True)) for each in product(*values)]
    linear = getattr(step.decoder.layers[0], part)
    kind, n, k, rows = linear.kind_of(step.rows), linear.n, linear.padded_k, step.rows
    found: list[Tile] = []
    if rows == 1 and kind in ("bf16", "fp8", "int8"):
        for bn, bk, warps in product((2, 4, 8), (1024, 2048, 4096, 8192, 16384), (4, 8)):
            if (k % bk == 0 or k < bk < 2 * k) and 4096 <= bn * bk <= 65536:
                found.append({"gemv": True, "BN": bn, "BK": bk, "NIT": -(-k // bk), "num_warps": warps})
    if rows == 1 and kind in ("int4", "w4a8"):
        for bn, kc, warps in product((4, 8, 16, 32), (2, 4, 8, 16), (1, 2, 4, 8)):
            if k // 256 % kc == 0 and 16 <= bn * kc // warps <= 64:
                found.append({"gemv": True, "BN": bn, "KC": kc, "NIT": k // 256 // kc, "num_warps": warps})
    tiles_for_one = {"fp4": ROLES.values(), "fp8": ("residual",), "int4": ("silu",), "w4a8": ("silu",)}
    if rows > 1 or ROLES[part] in tiles_for_one.get(kind, ()):
        size = {"bf16": 2.0, "fp8": 1.0, "int8": 1.0}.get(kind, 0.5)
        spans = [256, 128] if size >= 1 else [128]  # bytes of a row in a stage
        widths = (8, 16) if rows == 1 else (max(8, min(64, 1 << (rows - 1).bit_length())),)
        splits = (1,) if ROLES[part] == "silu" else (1, 2, 4, 7, 8)
        for (bn, warps), span, stages, split, tokens in product(
            ((64, 4), (128, 4), (128, 8)), spans, (2, 3, 4, 6), splits, widths
        ):
            columns = int(span / size)
            if k % (columns * split):
                continue
            stage = bn * span * (1.13 if kind == "fp4" else 1) + tokens * columns * (1 if size == 1 else 2)
            resident = int(SHARED // (stage * stages + 1024))
            waves = -(-n // bn) * split / (132 * resident) if resident else 99.0
            # few programs, or a last wave that is nearly empty, leave the memory without work
            if 0.6 <= waves <= 4 and -(-waves // 1) / waves <= 1.4:
                cut = {"gemv": False, "BN": bn, "BM": tokens, "num_warps": warps, "STAGES": stages, "SPLIT": split}
                found.append(cut | {"PREFETCH": 2} | ({"BK": columns} if size >= 1 else {}))
    return found


@functools.cache
def _small(cell: Cell) -> Step:
    return Step(cell, layers=1)


def _compile(job: tuple[Cell, str, list[Tile]]) -> None:
    cell, part, cuts = job
    step = _small(cell)
    for cut in cuts:
        step.table[step.key(part)] = cut
        try:
            step.run()
        except Exception as fault:
            print("left out:", part, cut, str(fault).splitlines()[0][:80], file=sys.stderr)
    step.table.pop(step.key(part), None)


class Descent:
    """The best table found so far, and the time of the step under it."""

    def __init__(self, step: Step) -> None:
        """Begin with every product launched alike, dependent or not: one at a time does not find its way there."""
        self.step, self.best = step, step.seconds()
        for start in (0, 1):
            before = {part: step.cut(part) for part in ROLES}
            step.table |= {step.key(part): cut | {"PDL": start} for part, cut in before.items()}
            if (seconds := step.seconds()) < self.best:
                self.best = seconds
            else:
                step.table |= {step.key(part): cut for part, cut in before.items()}

    def offer(self, part: str, cut: Tile) -> float:
        """Take a cut if the step is faster with it; its time."""
        table, key = self.step.table, self.step.key(part)
        before = table.get(key, self.step.cut(part))
        table[key] = cut
        try:
            seconds = self.step.seconds()
        except Exception as fault:
            print("left out:", part, cut, str(fault).splitlines()[0][:80], file=sys.stderr)
            seconds = 1e9
        if seconds < self.best * 0.998:
            self.best = seconds
        else:
            table[key] = before
        return seconds

    def round(self, part: str, cuts: list[Tile]) -> list[Tile]:
        """Try cuts, and when the next kernel may start; the cuts from the fastest to the slowest."""
        held = {name: value for name, value in self.step.cut(part).items() if name in ("PDL", "AHEAD")}
        times = [self.offer(part, held | cut) for cut in cuts]
        fastest = sorted(range(len(cuts)), key=times.__getitem__)
        if part != "attention":  # the best cut for the one start need not be that for the other
            for i in fastest[:4]:
                self.offer(part, held | cuts[i] | {"PDL": 1 - held.get("PDL", 1)})
        for ahead in (0, 1, 2, 4, 8):
            self.offer(part, self.step.cut(part) | {"AHEAD": ahead})
        print(f"   {part}: {self.best * 1e3:.3f} ms {self.step.cut(part)}", flush=True)
        return [cuts[i] for i in fastest]


def tune(cell: Cell, pool: Any) -> dict[str, Tile]:
    """The table of one model, recipe and number of rows."""
    began, step = time.time(), Step(cell, layers=8)
    tried = {part: candidates(step, part) for part in (*ROLES, "attention")}
    jobs = [
        (cell, part, [{"PDL": start} | cut for cut in cuts[i::4]])
        for part, cuts in tried.items()
        for start in ((2,) if part == "attention" else (0, 1))
        for i in range(4)
    ]
    for _ in pool.imap_unordered(_compile, jobs):
        pass
    descent = Descent(step)
    count, spent = sum(map(len, tried.values())), time.time() - began
    print(f"== {cell}: {descent.best * 1e3:.3f} ms; {count} candidates compiled in {spent:.0f} s", flush=True)
    for part, cuts in tried.items():
        tried[part] = descent.round(part, cuts)
    for part, cuts in tried.items():
        descent.round(part, cuts[:4])
    print(f"   after {time.time() - began:.0f} s", flush=True)
    return {step.key(part): step.cut(part) for part in tried}


def main() -> None:
    """Tune the cells and merge what was found into a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="llama3-8b", help="a built-in shape")
    parser.add_argument("--cells", default="int4:1,int4:32", help="recipe:rows, by commas; bf16 for no recipe")
    parser.add_argument("--kv", default="fp8", help="format of K and V; bf16 for none")
    parser.add_argument("--out", required=True, type=Path, help="the table to merge into")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which no more cell is begun")
    options = parser.parse_args()
    began = time.time()
    found = json.loads(options.out.read_text()) if options.out.is_file() else {}
    with multiprocessing.get_context("spawn").Pool(max(1, min(14, (os.cpu_count() or 2) - 2))) as pool:
        for name in options.cells.split(","):
            if time.time() - began > options.limit:
                print("out of time", flush=True)
                break
            recipe, rows = name.split(":")
            found |= tune((options.config, recipe, int(rows), options.kv), pool)
            options.out.write_text(json.dumps(dict(sorted(found.items())), indent=0, sort_keys=True) + "\n")
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

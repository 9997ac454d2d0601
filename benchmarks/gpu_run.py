"""The record of a GPU: its tests, and the table of `fewbit bench offline`; written after every cell.

    python benchmarks/gpu_run.py --commit $(git rev-parse --short HEAD) --batches 1,32 --runs 3

Writes ``benchmarks/results/GPU-COMMIT.json``: versions, the command, how many tests passed, and every cell with all
that the benchmark found. An existing record is added to.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from digest import ops_digest

from fewbit.compress.recipe import AS_IT_WAS, read_recipe
from fewbit.errors import FewbitError
from fewbit.measure.dummy import shape_named
from fewbit.measure.offline import Bench, Cell
from fewbit.version import __version__

ROWS = "none:none,fp8:fp8,int8:fp8,int4:fp8,w4a8:fp8,nvfp4_wo:fp8"
TESTS = ("tests/gpu", "tests/unit/kernels")


def run_tests(workers: int = 14) -> dict[str, int]:
    """Outcomes of the tests of kernels and of the engine on this GPU, by several processes side by side."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    listed = subprocess.run([*pytest, *TESTS, "-m", "not slow", "--collect-only"], capture_output=True, text=True)
    ids = [line for line in listed.stdout.splitlines() if "::" in line]
    counts: Counter[str] = Counter()

    def some(part: list[str]) -> tuple[Counter[str], str]:
        done = subprocess.run([*pytest, "--tb=line", *part], capture_output=True, text=True)
        summary = done.stdout.splitlines()[-1] if done.stdout.strip() else ""
        found = re.findall(r"(\d+) (passed|failed|skipped|error)", summary)
        outcomes = Counter({outcome: int(number) for number, outcome in found})
        outcomes["crashed"] = len(part) - outcomes.total()
        return outcomes, "\n".join(
            line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR", "E  "))
        )

    parts = [ids[i::workers] for i in range(min(workers, len(ids)))]
    with ThreadPoolExecutor(workers) as pool:
        for outcomes, text in pool.map(some, parts):
            counts.update(outcomes)
            print(text[:1000], end="\n" if text else "", flush=True)
    print("tests:", dict(counts), flush=True)
    return dict(counts)


def record(path: Path, commit: str) -> dict[str, Any]:
    """What is in the record already, or its head."""
    if path.is_file():
        return json.loads(path.read_text())
    return {
        "gpu": torch.cuda.get_device_name(),
        "commit": commit,
        "ops": ops_digest(),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {
            "fewbit": __version__, "python": platform.python_version(), "torch": torch.__version__,
            "triton": __import__("triton").__version__, "cuda": torch.version.cuda,
        },
        "commands": [],
        "tests": {},
        "cells": [],
    }  # fmt: skip


def save(found: dict[str, Any], path: Path) -> None:
    """Write a record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


def card_now() -> dict[str, str]:
    """Clocks in MHz, degrees and watts of the GPU: what they are explains a cell that is slower than its like."""
    asked = "clocks.sm,clocks.mem,temperature.gpu,power.draw,clocks_event_reasons.active"
    query = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader,nounits", "--id=0"]
    told = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return dict(zip(asked.split(","), told.split(", "), strict=False))


def measure(options: argparse.Namespace, row: str, path: Path) -> None:
    """One recipe at all batch sizes. A process of its own: the second in one ran at lower clocks than the first."""
    sizes = {int(size): options.runs for size in options.batches.split(",") if size}
    sizes |= {int(size): 1 for size in options.once.split(",") if size}
    name, kv = (None if part == "none" else part for part in row.split(":"))
    recipe = (read_recipe(name) if name else AS_IT_WAS).with_kv(kv).with_head(options.head)
    named = {"config": options.config, "recipe": name, "kv": kv, "head": options.head, "input": 2048, "output": 512}
    try:
        shape, gpu = shape_named(options.config), torch.device("cuda", 0)
        bench = Bench.of_shape(shape, recipe, gpu, [Cell(size, 2048, 512) for size in sizes])
        for size, runs in sorted(sizes.items()):
            before = card_now()
            r = bench.run(Cell(size, 2048, 512), runs)
            found = json.loads(path.read_text())
            found["cells"].append(named | {"batch": size} | asdict(r) | {"card": [before, card_now()]})
            save(found, path)
            print(
                f"{options.config} {row} batch {size}: {r.tokens_per_s:.1f} tok/s ({r.slowest:.1f}-{r.fastest:.1f}), "
                f"first {r.first_token_s * 1e3:.1f} ms, step {r.step_s * 1e3:.3f} graph {r.graph_s * 1e3:.3f} ms, "
                f"{r.bandwidth:.1%} of copy ({r.ceilings.copy / 1e12:.2f} TB/s), {r.of_limit:.1%} of the limit, "
                f"differs {r.difference:.3f}",
                flush=True,
            )
    except FewbitError as error:
        print(f"{row}: {error}", flush=True)


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", required=True, help="of the code that runs")
    parser.add_argument("--config", default="llama3-8b")
    parser.add_argument("--rows", default=ROWS, help="recipe:kv, by commas")
    parser.add_argument("--batches", default="1,32", help="by commas")
    parser.add_argument("--once", default="", help="batch sizes that are measured once, for a sweep")
    parser.add_argument("--head", help="format of the head: fp8 or int4")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tests", action="store_true", help="run the tests too")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    card = "-".join(torch.cuda.get_device_name().split()[1:2])
    path = options.out / f"{card}-{options.commit}.json"
    found = record(path, options.commit)
    said = [f"--{name} {value}" for name, value in vars(options).items() if value and name not in ("out", "tests")]
    found["commands"].append(" ".join(["python benchmarks/gpu_run.py", *said, *["--tests"] * options.tests]))
    if options.tests:
        found["tests"] = run_tests()
    save(found, path)
    for row in options.rows.split(",") if options.rows else ():
        process = multiprocessing.get_context("spawn").Process(target=measure, args=(options, row, path))
        process.start()
        process.join()


if __name__ == "__main__":
    main()

"""How much of a model's predictions survives each quantization, with fewbit and with its peers, on equal terms.

One model; for each seed one drawing of calibration windows, which every tool gets as token ids. Each peer quantizes in
a process of its own (`quality_peer.py`, environment of `peers.txt`) and writes its standard export; fewbit opens that
like its own and one evaluator, fewbit's forward in float32, compares all with the float model on held-out text. Where
fewbit cannot read an export, the peer's own evaluation of its fake-quantized model on the same tokens stands in. All
get the model in float32, so that nobody is judged by the dtype in which norms, scales, K and V happen to be stored.

    .venv/bin/python benchmarks/quality.py --seeds 0,1,2 [--outliers] [--rows fp8,int4] [--model DIR] [--text FILE]
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from quality_judge import Ids, Judge, Scores, in_float32
from quality_table import OWN, READ, ROWS, TOOLS, Cell, Row, print_table

import fewbit
from fewbit.compress import built_in, compress, plan, read_recipe
from fewbit.compress.data import shipped_text
from fewbit.compress.recipe import Calibration, Recipe, Source
from fewbit.errors import FewbitError, RecipeError, UnsupportedError
from fewbit.text.tokenizer import Tokenizer
from fewbit.text.windows import read_documents, windows

HERE = Path(__file__).resolve().parent
PEERS = HERE.parent / ".venv-peers" / "bin" / "python"
TAIL = 120_000  # characters at the end of the shipped text that are held out where no text is given


# --- data -------------------------------------------------------------------------------------------------------------


def texts(args: argparse.Namespace, tokenizer: Tokenizer) -> tuple[Ids, Ids]:
    """All windows that calibration draws from, and those that are held out."""
    (shipped,) = read_documents(shipped_text())
    assert isinstance(shipped, str)
    calibration = list(read_documents(args.calib)) if args.calib else [shipped if args.text else shipped[:-TAIL]]
    held_out = read_documents(args.text) if args.text else [shipped[-TAIL:]]
    pool, kept = windows(calibration, tokenizer, args.calib_length), windows(
        held_out, tokenizer, args.length, args.windows
    )  # fmt: skip
    for found, wanted, length, option in (
        (pool, args.calib_windows, args.calib_length, "--calib-windows or --calib-length"),
        (kept, args.windows, args.length, "--windows or --length"),
    ):
        if len(found) < wanted or len(found[0]) < length:
            raise RecipeError(f"the text holds {len(found)} windows of {length} tokens, not {wanted}; lower {option}")
    return pool, kept


def write_ids(path: Path, ids: Ids) -> Path:
    """Windows as JSON Lines, as fewbit's calibration data and the peers take them."""
    path.write_text("".join(json.dumps({"ids": window}) + "\n" for window in ids), "utf8")
    return path


# --- the tools --------------------------------------------------------------------------------------------------------


def recipe_of(row: Row, ids: Path, count: int, length: int) -> Recipe:
    """A row's recipe, calibrated on the windows of a file."""
    recipe = replace(read_recipe(row.recipe), calibration=Calibration(count, length, (Source(ids),)))
    if row.nearest:
        recipe = replace(recipe, techniques=tuple(t for t in recipe.techniques if not hasattr(t, "layer")))
    return recipe


def run_fewbit(cell: Cell, seed: int, model: Path, ids: Path, calib: Ids, judge: Judge, work: Path) -> None:
    """Quantize with fewbit and judge."""
    recipe, target = recipe_of(ROWS[cell.row], ids, len(calib), len(calib[0])), work / f"fewbit-{cell.row}"
    checkpoint = fewbit.open_checkpoint(model)
    try:
        planned = plan(checkpoint, recipe)
    except UnsupportedError as error:
        cell.why_not, cell.detail = "does not fit", str(error)
        return
    compress(checkpoint, planned, target)
    cell.scores[seed] = judge(target)


def run_peer(
    python: Path, tool: str, cells: Sequence[Cell], seed: int, job: dict[str, Any], judge: Judge, work: Path
) -> dict[str, str]:
    """Let a peer make all its ways in one process, and judge each; gives the versions of what it ran on."""
    out = work / tool
    out.mkdir()
    ways = list(dict.fromkeys(cell.way for cell in cells))
    # with the first seed all judge themselves too, which shows whether their exports are read rightly
    asked = list(dict.fromkeys(cell.way for cell in cells if cell.by == OWN or not cell.scores))
    job = job | {"tool": tool, "ways": ways, "own": asked, "out": str(out)}
    (out / "job.json").write_text(json.dumps(job), "utf8")
    with (out / "log.txt").open("w") as log:
        command = [str(python), str(HERE / "quality_peer.py"), str(out / "job.json")]
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False, cwd=out)
    judged: dict[str, tuple[Scores, str]] = {}
    for cell in cells:
        result = out / f"{cell.way}.json"
        found: dict[str, Any] = {"status": "failed", "gpu": False}
        if result.exists():
            found = json.loads(result.read_text("utf8"))
        if found["status"] != "done":
            cell.detail = found.get("reason", "its process ended early: " + " ".join(last_line(out / "log.txt")))
            cell.why_not = failure(found, cell.detail)
            continue
        own = Scores(**found["own"]) if found["own"] else None
        if own is not None:
            cell.own[seed] = own.figures()[0]
        try:
            if cell.way not in judged:
                judged[cell.way] = judge(out / cell.way), READ
        except FewbitError as error:
            if own is None:
                cell.detail = found.get("own_why_not", str(error))
                cell.why_not = failure(found, cell.detail)
                continue
            cell.detail = found.get("export_why_not", str(error))
            judged[cell.way] = own, OWN
        cell.scores[seed], cell.by = judged[cell.way]
    versions = out / "versions.json"
    return json.loads(versions.read_text("utf8")) if versions.exists() else {}


def failure(found: dict[str, Any], reason: str) -> str:
    """A failure in words: for want of a GPU, by what the tool said, or otherwise."""
    words = ("cuda", "triton", "accelerator", "gpu")
    return "needs a GPU" if not found["gpu"] and any(word in reason.lower() for word in words) else "failed"


def last_line(log: Path) -> list[str]:
    """The last line of a log, in words."""
    return (log.read_text("utf8", errors="replace").strip().splitlines() or ["no output"])[-1].split()


# --- the run ----------------------------------------------------------------------------------------------------------


def note(text: str) -> None:
    """Progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def measure(args: argparse.Namespace, work: Path) -> tuple[list[Cell], dict[str, Any]]:
    """All cells, and what they were made with."""
    checkpoint = fewbit.open_checkpoint(args.model)
    if checkpoint.quant:
        raise UnsupportedError(f"{args.model} is already quantized; give the original")
    args.calib_length = min(args.calib_length, checkpoint.spec.context)
    pool, held_out = texts(args, Tokenizer.load(checkpoint.path))
    python = args.peers.absolute() if args.peers.exists() else None  # not resolved: a venv's python is a link
    if python is None:
        note(f"no peers: {args.peers} is missing; benchmarks/peers.txt says how to make it")
    cells = cells_of(args.rows, python is not None)
    held_out_file = write_ids(work / "held-out.jsonl", held_out)
    model = args.model if args.dtype == "auto" else in_float32(args.model, work / "float32")
    judge = Judge(model, held_out)
    versions: dict[str, str] = {"fewbit": fewbit.__version__, "torch": torch.__version__}
    meta: dict[str, Any] = {"model": str(args.model), "versions": versions, "outlier_logit_change": {}}
    for seed in args.seeds:
        here = work / f"seed-{seed}"
        here.mkdir()
        calib = random.Random(seed).sample(pool, args.calib_windows)
        ids = write_ids(here / "calibration.jsonl", calib)
        if args.outliers:
            model = in_float32(args.model, here / "outliers", seed)
            change = judge.distance(model)
            meta["outlier_logit_change"][seed] = change
            if change > 1e-2:
                raise UnsupportedError(f"outliers changed a logit by {change:g}; the family reads its norms elsewhere")
        for cell in cells:
            if cell.tool == "fewbit" and not cell.why_not:
                note(f"seed {seed}: fewbit {cell.row}")
                run_fewbit(cell, seed, model, ids, calib, judge, here)
        for tool in TOOLS:
            mine = [c for c in cells if c.tool == tool and not c.why_not]
            if not mine or python is None:
                continue
            note(f"seed {seed}: {tool}")
            job = {"model": str(model.resolve()), "calibration": str(ids), "held_out": str(held_out_file)}
            versions |= run_peer(python, tool, mine, seed, job, judge, here)
    return cells, meta


def cells_of(rows: Sequence[str], with_peers: bool) -> list[Cell]:
    """Every cell of the table, empty."""
    cells = []
    for row in rows:
        missing = "" if ROWS[row].recipe in built_in() else "no recipe yet"
        cells.append(Cell(row, "fewbit", "", why_not=missing))
        if with_peers:
            cells += [Cell(row, tool, way) for tool in TOOLS for way in ROWS[row].peers(tool)]
    return cells


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Quality of quantized models: fewbit and its peers.")
    parser.add_argument("--model", type=Path, help="Hugging Face directory [default: the bundled model]")
    parser.add_argument("--rows", default=",".join(ROWS), help=f"by commas, of {', '.join(ROWS)} [default: all]")
    parser.add_argument("--seeds", default="0", help="by commas; each draws its own calibration windows")
    parser.add_argument("--outliers", action="store_true", help="first give the model outlier channels")
    parser.add_argument("--text", type=Path, help="held-out text [default: the end of the shipped text]")
    parser.add_argument("--calib", type=Path, help="calibration text [default: the shipped text before that]")
    parser.add_argument("--calib-windows", type=int, default=16)
    parser.add_argument("--calib-length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=24, help="held-out windows")
    parser.add_argument("--length", type=int, default=256, help="tokens of each")
    parser.add_argument("--peers", type=Path, default=PEERS, help="python of the peers' environment")
    parser.add_argument("--dtype", choices=("float32", "auto"), default="float32", help="auto: as it is stored")
    parser.add_argument("--json", type=Path, help="write everything there")
    parser.add_argument("--keep", type=Path, help="keep models and logs in this new folder")
    args = parser.parse_args()
    if args.outliers and args.dtype == "auto":
        parser.error("--outliers writes the model in float32; leave --dtype alone")
    args.rows, seeds = args.rows.split(","), args.seeds.split(",")
    if wrong := [row for row in args.rows if row not in ROWS]:
        parser.error(f"unknown row {wrong[0]}; known: {', '.join(ROWS)}")
    if not all(seed.isascii() and seed.isdigit() for seed in seeds):
        parser.error(f"--seeds {','.join(seeds)}: expected whole numbers by commas, such as 0,1,2")
    args.seeds = [int(seed) for seed in seeds]
    return args


def main() -> None:
    """Measure and print."""
    args = arguments()
    start = time.perf_counter()
    try:
        args.model = args.model or fewbit.demo_model()
        with tempfile.TemporaryDirectory() as folder:
            work = args.keep or Path(folder)
            work.mkdir(parents=True, exist_ok=args.keep is None)
            cells, meta = measure(args, work.resolve())
    except (FewbitError, FileExistsError) as error:
        sys.exit(f"quality.py: {error}")
    print_table(cells)
    print("\n" + ", ".join(f"{name} {number}" for name, number in meta["versions"].items()))
    print(f"seeds {','.join(map(str, args.seeds))}; {args.windows} held-out windows of {args.length} tokens")
    print(f"calibrated on {args.calib_windows} windows of {args.calib_length} tokens; model in {args.dtype}")
    print(f"{time.perf_counter() - start:.0f} s")
    if args.outliers:
        print(f"outliers changed no logit by more than {max(meta['outlier_logit_change'].values()):.1e}")
    if args.json:
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        args.json.write_text(json.dumps({**meta, "settings": settings, "cells": [asdict(c) for c in cells]}), "utf8")


if __name__ == "__main__":
    main()

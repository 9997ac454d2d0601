"""Decoding and prompts on this machine's CPU: fewbit beside llama.cpp and transformers, on the same weights.

Random weights of a shape, written once for every engine (`cpu_models.py`); each engine in a process of its own
(`cpu_worker.py`) with the same number of threads. They take turns (`cpu_table.py` says who with whom): in a round every
one does every piece of work once, while the others wait; the order turns around from round to round, and the first
round is not counted. Read bandwidth is measured in the same rounds. A ratio is the median over the rounds, its spread
that of the rounds.

    .venv/bin/python benchmarks/cpu_peers.py [--shapes llama3.2-1b,storyteller] [--threads N] [--quick] [--json FILE]

Models are named by fewbit's formats of the layers and of the head (``bf16``: as it was), or by those of a GGUF file,
which fewbit runs, too: the very file of llama.cpp. Q4_0 has groups of 32 and 4.5 bits a weight; `int4_g128`, what the
recipes make, has 4.125; Q8_0 has 8.5, `int8_row` 8. Bytes of a step are weights as stored, scales and head with them,
and K and V in the middle of the run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cpu_models import DENSE, STORYTELLER, config_of, model_of
from cpu_table import COMPARISONS, CONTEXT, ENGINES, LARGE, OURS, WORK, Comparison, Contestant, Row, ratios, show

from fewbit.errors import FewbitError, UnsupportedError
from fewbit.measure.machine import machine

HERE = Path(__file__).resolve().parent
PEERS = HERE.parent / ".venv-cpu-peers" / "bin" / "python"
FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm", "sve")
CHECKED = 64  # tokens of the prompt whose scores are compared
CLOSE = {"Q4_0": 0.5, "int4": 0.5}
"""Least correlation with the dense model's scores, by how a model's name begins; of all others 0.99.

Four bits lose much of random weights: 0.7 is left after 16 layers. That names and positions are right, 8 bits show.
"""


class Process:
    """A worker and what it can be asked."""

    def __init__(self, python: Path, contestant: Contestant, model: str, threads: int, log: Path) -> None:
        self.contestant, self.log = contestant, log
        command = [str(python), str(HERE / "cpu_worker.py"), contestant.engine, model, str(threads)]
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True,
                env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            )  # fmt: skip

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def ask(self, **what: Any) -> dict[str, Any]:
        """One line there, one line back.

        Raises:
            UnsupportedError: the process has ended.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(json.dumps(what), file=self.process.stdin, flush=True)
            found: dict[str, Any] = json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            raise UnsupportedError(f"{self.contestant} ended early; {self.log} says why") from None
        return found


# --- the run ----------------------------------------------------------------------------------------------------------


def note(text: str) -> None:
    """Progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def start(args: argparse.Namespace, shape: str, contestant: Contestant) -> Process:
    """The process of a contestant, with its files."""
    if contestant.engine == "transformers":
        model = f"{model_of(shape, DENSE, args.work, note)}:{contestant.model}"
    else:
        model = str(model_of(shape, contestant.model, args.work, note))
    python = Path(sys.executable) if contestant.engine == "fewbit" else args.python
    return Process(python, contestant, model, args.threads, args.work / shape / f"{contestant}.log")


def reference(args: argparse.Namespace, shape: str) -> np.ndarray:
    """Scores of the dense model as fewbit computes them."""
    file = args.work / shape / "scores.npy"
    if not file.exists():
        with start(args, shape, Contestant("fewbit", DENSE)) as process:
            process.ask(do="logits", tokens=CHECKED, file=str(file))
    found: np.ndarray = np.load(file)
    return found


def agree(args: argparse.Namespace, shape: str, process: Process) -> dict[str, Any]:
    """Whether a contestant runs the model that is meant.

    Raises:
        UnsupportedError: it does not.
    """
    file, dense = args.work / shape / f"{process.contestant}.npy", reference(args, shape)
    process.ask(do="logits", tokens=CHECKED, file=str(file))
    scores = np.load(file)
    found = float(np.corrcoef(dense, scores)[0, 1])
    least = next((c for start, c in CLOSE.items() if process.contestant.model.startswith(start)), 0.99)
    same = bool(dense.argmax() == scores.argmax())
    note(f"{shape}, {process.contestant}: scores correlate with the dense model's at {found:.5f}, same choice: {same}")
    if found < least:
        raise UnsupportedError(f"{process.contestant} runs another model: expected a correlation of {least} or more")
    return {"shape": shape, "contestant": str(process.contestant), "correlation": found, "same_choice": same}


def compare(args: argparse.Namespace, shape: str, comparison: Comparison, result: dict[str, Any]) -> None:
    """All rounds of one comparison; adds rows, ratios, agreement and versions to `result`."""
    items = work_of(args, shape)
    with ExitStack() as stack:
        reference(args, shape)  # before others take memory
        processes = [stack.enter_context(start(args, shape, c)) for c in comparison.contestants]
        rows: dict[tuple[str, str], Row] = {}
        for process in processes:
            facts = process.ask(do="facts")
            result["machine"][process.contestant.engine] = facts["version"]
            result["agreement"].append(agree(args, shape, process))
            for work, asked in items.items():
                name, batch = str(process.contestant), asked.get("batch", 1)
                middle = CONTEXT + asked.get("steps", 0) / 2
                read = facts["weight_bytes"] + batch * middle * facts["kv_bytes"] if asked["do"] == "decode" else 0
                bits = 8 * facts["weight_bytes"] / facts["weights"]
                rows[name, work] = Row(shape, name, work, asked.get("tokens", batch), bits, read)
        for number in range(args.rounds + 1):
            note(f"{shape}, {comparison.engine}: " + (f"round {number} of {args.rounds}" if number else "warming up"))
            turns = processes[:: -1 if number % 2 else 1]
            for work, asked in items.items():
                read = processes[0].ask(do="bandwidth")["bytes_per_s"]
                for process in turns:
                    extra = {"seed": number} if asked["do"] == "prefill" else {}
                    found = process.ask(**asked, **extra)
                    if number:
                        row = rows[str(process.contestant), work]
                        row.seconds.append(found["seconds"])
                        row.bandwidth.append(read)
                        row.loop += [found["loop"]] if "loop" in found else []
    result["rows"] += rows.values()
    result["ratios"] += ratios(comparison, rows, shape)


# --- the command line ------------------------------------------------------------------------------------------------


def flags() -> str:
    """Of the processor's instructions those that products use; nothing where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf8").splitlines()
    except OSError:
        return ""
    have = next((line.split() for line in lines if line.startswith(("flags", "Features"))), [])
    return " ".join(flag for flag in FLAGS if flag in have)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Speed on a CPU: fewbit, llama.cpp, transformers.")
    parser.add_argument("--shapes", default=f"{LARGE},{STORYTELLER}", help="by commas [default: both]")
    parser.add_argument("--peers", default=",".join(ENGINES), help="by commas [default: both]")
    parser.add_argument(
        "--models", default=",".join(OURS), help=f"fewbit's, by commas, of {', '.join(OURS)} [default: all]"
    )
    parser.add_argument("--items", default=",".join(WORK), help=f"by commas, of {', '.join(WORK)} [default: all]")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of every engine [default: torch's]"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="two rounds of few steps: to see that it works")
    parser.add_argument("--work", type=Path, default=HERE.parent / "build" / "cpu-peers", help="keeps models and logs")
    parser.add_argument("--python", type=Path, default=PEERS, help="of the peers' environment")
    parser.add_argument("--json", type=Path, help="write everything there")
    args = parser.parse_args()
    args.work = args.work.absolute()
    for option, known in (("peers", ENGINES), ("models", OURS), ("items", list(WORK))):
        setattr(args, option, getattr(args, option).split(","))
        if wrong := [name for name in getattr(args, option) if name not in known]:
            parser.error(f"--{option}: unknown {wrong[0]!r}; known: {', '.join(known)}")
    if args.threads < 1 or args.rounds < 1:
        parser.error("--threads and --rounds are 1 at least")
    if not args.python.exists():
        parser.error(f"no peers: {args.python} is missing; make bench-peers makes it")
    if args.quick:
        args.rounds = min(args.rounds, 2)
    return args


def work_of(args: argparse.Namespace, shape: str) -> dict[str, dict[str, Any]]:
    """What each worker is asked: more steps of a small model, whose steps are short."""
    found = {item: dict(WORK[item]) for item in args.items}
    for asked in found.values():
        if "steps" in asked:
            asked["steps"] = asked["steps"] * (1 if shape == LARGE else 8) // (4 if args.quick else 1)
    return found


def write(file: Path | None, result: dict[str, Any]) -> None:
    """What was found so far, where it is wanted."""
    if file:
        plain = {k: [asdict(x) for x in v] if k in ("rows", "ratios") else v for k, v in result.items()}
        file.write_text(json.dumps(plain, indent=1), "utf8")


def main() -> None:
    """Measure and print."""
    args = arguments()
    result: dict[str, Any] = {
        "machine": machine(torch.device("cpu"))
        | {"flags": flags(), "threads": args.threads, "load before": os.getloadavg()[0]},
        "settings": {"work": WORK, "rounds": args.rounds, "quick": args.quick},
        "agreement": [], "rows": [], "ratios": [],
    }  # fmt: skip
    try:
        for shape in args.shapes.split(","):
            config_of(shape)
            for comparison in COMPARISONS:
                ours = tuple(model for model in comparison.ours if model in args.models)
                if ours and comparison.engine in args.peers:
                    compare(args, shape, replace(comparison, ours=ours), result)
                    write(args.json, result)
    except FewbitError as error:
        sys.exit(f"cpu_peers.py: {error}")
    show(result)


if __name__ == "__main__":
    main()

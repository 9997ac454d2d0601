"""Decoding and prompts on this machine's CPU: fewbit beside llama.cpp and transformers, on the same weights.

Random weights of a shape, written once for every engine (`cpu_models.py`); each engine in a process of its own
(`cpu_worker.py`) with the same number of threads. They take turns: in a round every one does every piece of work once,
while the others wait; the order turns around from round to round, and the first round is not counted. Read bandwidth is
measured in the same rounds. A ratio is the median over the rounds, its spread that of the rounds.

    .venv/bin/python benchmarks/cpu_peers.py [--shapes llama3.2-1b,storyteller] [--threads N] [--quick] [--json FILE]

Weights are written as fewbit's formats of the layers and of the head; ``bf16`` stands for a head as it was. Q4_0 has
groups of 32 (4.5 bits a weight), as `int4_g32`; `int4_g128`, what the recipes make, has 4.125. Q8_0 has 8.5 bits,
`int8_row` 8. Bytes of a step are weights as stored, scales and head included, and K and V in the middle of the run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from cpu_models import DENSE, STORYTELLER, config_of, model_of

from fewbit.errors import FewbitError, UnsupportedError
from fewbit.measure.machine import machine

HERE = Path(__file__).resolve().parent
PEERS = HERE.parent / ".venv-cpu-peers" / "bin" / "python"
LARGE = "llama3.2-1b"
CONTEXT = 128  # tokens of each sequence before those that are timed
WORK: Mapping[str, Mapping[str, Any]] = {
    "decode 1": {"do": "decode", "batch": 1, "context": CONTEXT, "steps": 32},
    "decode 8": {"do": "decode", "batch": 8, "context": CONTEXT, "steps": 16},
    "prefill 512": {"do": "prefill", "tokens": 512},
}
QUICK = 4  # times fewer steps
FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm", "sve")
CHECKED = 64  # tokens of the prompt whose scores are compared
CLOSE = {"Q4_0": 0.9, "int4": 0.9}
"""Least correlation of scores with those of the dense model, by how a model's name begins; of all others 0.99."""


@dataclass(frozen=True)
class Contestant:
    """An engine with a model."""

    engine: str
    model: str

    def __str__(self) -> str:
        return f"{self.engine} {self.model}"


@dataclass(frozen=True)
class Comparison:
    """Who takes turns; the first of ours is what targets are about."""

    ours: tuple[str, ...]
    engine: str
    theirs: tuple[str, ...]

    @property
    def contestants(self) -> tuple[Contestant, ...]:
        """Ours first."""
        return tuple(Contestant("fewbit", m) for m in self.ours) + tuple(
            Contestant(self.engine, m) for m in self.theirs
        )


COMPARISONS = (
    Comparison(("int4_g128+int4_g128", "int4_g32+int4_g32", "int4_g128+bf16"), "llama.cpp", ("Q4_0",)),
    Comparison(("int8_row+int8_row", "int8_row+bf16"), "llama.cpp", ("Q8_0",)),
    Comparison(("int4_g128+int8_row",), "transformers", ("float32", "bfloat16")),
)
RATIOS = {
    ("llama.cpp", "decode 1"): 1.0,
    ("llama.cpp", "decode 8"): 1.5,
    ("llama.cpp", "prefill 512"): 0.8,
    ("transformers", "decode 1"): 4.0,
}
"""Least ratio of the first of ours to the best of theirs."""
BANDWIDTH = {"int4_g128+int4_g128": 0.75}
"""Least share of the read bandwidth, decoding one sequence of the large shape."""
LOOP = 0.1
"""Largest share of such a step outside of the forward."""


@dataclass
class Row:
    """One contestant at one piece of work; a figure for each round.

    Attributes:
        bits: of a weight, over all linears with the head.
        step_bytes: that a step must read; of a prompt 0.
        seconds: of a step, or of the prompt.
        bandwidth: bytes a second that a sum reads, measured in the same round.
        loop: share of the step outside of the model's forward; empty where it is not known.
    """

    shape: str
    contestant: str
    work: str
    tokens: int
    bits: float
    step_bytes: float
    seconds: list[float] = field(default_factory=list)
    bandwidth: list[float] = field(default_factory=list)
    loop: list[float] = field(default_factory=list)

    def share(self) -> float:
        """Of the read bandwidth."""
        return median(self.step_bytes / s / b for s, b in zip(self.seconds, self.bandwidth, strict=True))


@dataclass(frozen=True)
class Ratio:
    """How often as fast as a peer: medians and spread of the rounds' ratios, and what it should be."""

    shape: str
    ours: str
    theirs: str
    work: str
    ratio: float
    slowest: float
    fastest: float
    target: float | None


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
    with ExitStack() as stack:
        reference(args, shape)  # before others take memory
        processes = [stack.enter_context(start(args, shape, c)) for c in comparison.contestants]
        rows: dict[tuple[str, str], Row] = {}
        for process in processes:
            facts = process.ask(do="facts")
            result["machine"][process.contestant.engine] = facts["version"]
            result["agreement"].append(agree(args, shape, process))
            for work, asked in args.asked.items():
                name, batch = str(process.contestant), asked.get("batch", 1)
                middle = CONTEXT + asked.get("steps", 0) / 2
                read = facts["weight_bytes"] + batch * middle * facts["kv_bytes"] if asked["do"] == "decode" else 0
                bits = 8 * facts["weight_bytes"] / facts["weights"]
                rows[name, work] = Row(shape, name, work, asked.get("tokens", batch), bits, read)
        for number in range(args.rounds + 1):
            note(f"{shape}, {comparison.engine}: " + (f"round {number} of {args.rounds}" if number else "warming up"))
            turns = processes[:: -1 if number % 2 else 1]
            for work, asked in args.asked.items():
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


def ratios(comparison: Comparison, rows: Mapping[tuple[str, str], Row], shape: str) -> list[Ratio]:
    """Each of ours against each of theirs, and against their best in each round where they are several."""
    found = []
    contestants = [str(c) for c in comparison.contestants]
    ours, theirs = contestants[: len(comparison.ours)], contestants[len(comparison.ours) :]
    for work in dict.fromkeys(work for _, work in rows):
        times = {name: rows[name, work].seconds for name in theirs}
        if len(theirs) > 1:
            times[f"{comparison.engine}' best"] = [min(each) for each in zip(*times.values(), strict=True)]
        best = list(times)[-1]
        for name in ours:
            for peer, seconds in times.items():
                each = [b / a for a, b in zip(rows[name, work].seconds, seconds, strict=True)]
                judged = name == ours[0] and peer == best
                target = RATIOS.get((comparison.engine, work)) if judged else None
                found.append(Ratio(shape, name, peer, work, median(each), min(each), max(each), target))
    return found


# --- what is printed --------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A Markdown table, in columns."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, ["-" * width for width in widths], *rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")


def line_of(row: Row) -> list[str]:
    """One contestant at one piece of work."""
    speeds = [row.tokens / seconds for seconds in row.seconds]
    cells = [row.work, row.contestant, f"{row.bits:.2f}", f"{1e3 * median(row.seconds):.2f}"]
    cells.append(f"{median(speeds):.1f} ({min(speeds):.1f}-{max(speeds):.1f})")
    cells += [f"{row.step_bytes / 1e6:.1f}", f"{row.share():.0%}"] if row.step_bytes else ["", ""]
    return [*cells, f"{median(row.loop):.1%}" if row.loop else ""]


def verdict(reached: float, target: float | None, most: bool = False) -> str:
    """A target and whether it is reached."""
    if target is None:
        return ""
    return f"{'<=' if most else '>='} {target:g}: {'reached' if (reached <= target) == most else 'missed'}"


def show(result: Mapping[str, Any]) -> None:
    """Everything on the terminal."""
    for key, value in result["machine"].items():
        print(f"{key}: {value}")
    reads = [read for row in result["rows"] for read in row.bandwidth]
    print(f"read bandwidth, GB/s: {median(reads) / 1e9:.1f} ({min(reads) / 1e9:.1f}-{max(reads) / 1e9:.1f})")
    for shape in dict.fromkeys(row.shape for row in result["rows"]):
        mine = sorted((row for row in result["rows"] if row.shape == shape), key=lambda row: list(WORK).index(row.work))
        print(f"\n{shape}\n")
        head = ["work", "engine, layers+head", "bits", "ms", "tok/s", "MB a step", "of read bandwidth", "engine loop"]
        table(head, [line_of(row) for row in mine])
        print()
        targets = [
            [r.work, r.ours, r.theirs, f"{r.ratio:.2f} ({r.slowest:.2f}-{r.fastest:.2f})", verdict(r.ratio, r.target)]
            for r in sorted((r for r in result["ratios"] if r.shape == shape), key=lambda r: list(WORK).index(r.work))
        ]
        for row in mine if shape == LARGE else []:
            model = row.contestant.removeprefix("fewbit ")
            if row.work == "decode 1" and model in BANDWIDTH:
                share = row.share()
                told = verdict(share, BANDWIDTH[model])
                targets.append([row.work, row.contestant, "read bandwidth", f"{share:.2f}", told])
            if row.work == "decode 1" and row.loop and not model.endswith("bf16"):
                loop = median(row.loop)
                targets.append([row.work, row.contestant, "engine loop", f"{loop:.3f}", verdict(loop, LOOP, most=True)])
        table(["work", "ours", "against", "median of rounds (spread)", "target"], targets)


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
    parser.add_argument("--peers", default="llama.cpp,transformers", help="by commas [default: both]")
    parser.add_argument("--work-items", default=",".join(WORK), help=f"by commas, of {', '.join(WORK)} [default: all]")
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
    for option, known in (("peers", [c.engine for c in COMPARISONS]), ("work_items", list(WORK))):
        if wrong := [name for name in getattr(args, option).split(",") if name not in known]:
            parser.error(f"unknown {wrong[0]!r}; known: {', '.join(dict.fromkeys(known))}")
    if args.threads < 1 or args.rounds < 1:
        parser.error("--threads and --rounds are 1 at least")
    if not args.python.exists():
        parser.error(f"no peers: {args.python} is missing; make bench-peers makes it")
    args.asked = {name: dict(WORK[name]) for name in args.work_items.split(",")}
    if args.quick:
        args.rounds = min(args.rounds, 2)
        for asked in args.asked.values():
            asked |= {"steps": asked["steps"] // QUICK} if "steps" in asked else {}
    return args


def main() -> None:
    """Measure and print."""
    args = arguments()
    result: dict[str, Any] = {
        "machine": machine(torch.device("cpu"))
        | {"flags": flags(), "threads": args.threads, "load before": os.getloadavg()[0]},
        "settings": {"work": args.asked, "rounds": args.rounds},
        "agreement": [], "rows": [], "ratios": [],
    }  # fmt: skip
    try:
        for shape in args.shapes.split(","):
            config_of(shape)
            for comparison in COMPARISONS:
                if comparison.engine in args.peers.split(","):
                    compare(args, shape, comparison, result)
    except FewbitError as error:
        sys.exit(f"cpu_peers.py: {error}")
    show(result)
    if args.json:
        plain = {k: [asdict(x) for x in v] if k in ("rows", "ratios") else v for k, v in result.items()}
        args.json.write_text(json.dumps(plain, indent=1), "utf8")


if __name__ == "__main__":
    main()

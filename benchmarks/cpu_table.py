"""What the CPU benchmark compares, what is to be reached, and its tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

LARGE = "llama3.2-1b"
CONTEXT = 128  # tokens of each sequence before those that are timed
WORK: Mapping[str, Mapping[str, Any]] = {
    "decode 1": {"do": "decode", "batch": 1, "context": CONTEXT, "steps": 32},
    "decode 8": {"do": "decode", "batch": 8, "context": CONTEXT, "steps": 16},
    "prefill 512": {"do": "prefill", "tokens": 512},
}


@dataclass(frozen=True)
class Contestant:
    """An engine with a model."""

    engine: str
    model: str

    def __str__(self) -> str:
        return f"{self.engine} {self.model}"


@dataclass(frozen=True)
class Comparison:
    """Who takes turns."""

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
    Comparison(("int4_g128+int4_g128", "Q4_0", "int4_g128+bf16"), "llama.cpp", ("Q4_0",)),
    Comparison(("int8_row+int8_row", "Q8_0", "int8_row+bf16"), "llama.cpp", ("Q8_0",)),
    Comparison(("int4_g128+int8_row",), "transformers", ("float32", "bfloat16")),
)
ENGINES = list(dict.fromkeys(comparison.engine for comparison in COMPARISONS))
OURS = list(dict.fromkeys(model for comparison in COMPARISONS for model in comparison.ours))
JUDGED = [comparison.ours[0] for comparison in COMPARISONS]
"""What targets are about."""
RATIOS = {
    ("llama.cpp", "decode 1"): 1.0,
    ("llama.cpp", "decode 8"): 1.5,
    ("llama.cpp", "prefill 512"): 0.8,
    ("transformers", "decode 1"): 4.0,
}
"""Least ratio to the best of theirs."""
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


def ratios(comparison: Comparison, rows: Mapping[tuple[str, str], Row], shape: str) -> list[Ratio]:
    """Each of ours against each of theirs, and against the best of theirs in each round where they are several."""
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
                judged = name.removeprefix("fewbit ") in JUDGED and peer == best
                target = RATIOS.get((comparison.engine, work)) if judged else None
                found.append(Ratio(shape, name, peer, work, median(each), min(each), max(each), target))
    return found


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
    good = reached <= target if most else reached >= target
    return f"{'<=' if most else '>='} {target:g}: {'reached' if good else 'missed'}"


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

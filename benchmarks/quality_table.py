"""The rows of the quality benchmark, its cells, and how they are printed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from quality_judge import Scores

OWN, READ = "itself", "fewbit"


@dataclass(frozen=True)
class Row:
    """What is compared with what.

    Attributes:
        title: in words.
        recipe: fewbit's.
        modelopt, llmcompressor: what each peer makes, by the names of `quality_peer.py`.
        nearest: take the recipe's rounding technique away, where the peers only round to nearest.
    """

    title: str
    recipe: str
    modelopt: tuple[str, ...] = ()
    llmcompressor: tuple[str, ...] = ()
    nearest: bool = False

    def peers(self, tool: str) -> tuple[str, ...]:
        """The ways of one tool."""
        return {"modelopt": self.modelopt, "llm-compressor": self.llmcompressor}[tool]


ROWS = {
    "fp8": Row("FP8 static", "fp8", ("FP8",), ("FP8",)),
    "int8_sq_nearest": Row(
        "INT8 SQ static, nearest",
        "int8_sq_static",
        ("SQ", "SQ, alpha 0.8"),
        ("SQ",),
        nearest=True,
    ),
    "int8_sq_static": Row(
        "INT8 SQ static",
        "int8_sq_static",
        ("SQ", "SQ, alpha 0.8"),
        ("SQ, GPTQ",),
    ),
    "int8_sq": Row("INT8 SQ per token", "int8_sq", (), ("SQ, GPTQ, per token",)),
    "int4": Row("INT4 nearest", "int4", ("max", "mse"), ("minmax", "mse")),
    "int4_awq": Row("INT4 AWQ", "int4_awq", ("AWQ lite", "AWQ full"), ("AWQ", "AWQ, both, mse")),
    "int4_gptq": Row("INT4 GPTQ", "int4_gptq", ("GPTQ", "GPTQ, layerwise"), ("GPTQ", "GPTQ, mse")),
    "nvfp4": Row("NVFP4", "nvfp4", ("NVFP4",), ("NVFP4",)),
    "nvfp4_awq": Row("NVFP4 AWQ", "nvfp4_awq", ("NVFP4 AWQ lite", "NVFP4 AWQ full"), ("NVFP4 AWQ",)),
    "nvfp4_svd": Row("NVFP4 SVDQuant", "nvfp4_svd", ("NVFP4 SVDQuant",)),
    "mxfp4": Row("MXFP4", "mxfp4", ("MXFP4",), ("MXFP4",)),
}
TOOLS = ("modelopt", "llm-compressor")


@dataclass
class Cell:
    """One tool's way in one row: scores by seed, or a word why there are none.

    Attributes:
        by: whose forward judged it.
        own: the peer's own KL by seed, a check on the reading of its export.
    """

    row: str
    tool: str
    way: str
    scores: dict[int, Scores] = field(default_factory=dict)
    why_not: str = ""
    detail: str = ""
    by: str = READ
    own: dict[int, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The tool, and its way where it has several."""
        return f"{self.tool} ({self.way})" if self.way else self.tool


def mean_error(values: Iterable[float]) -> tuple[float, float]:
    """Mean and standard error over seeds (NaN for one)."""
    some = list(values)
    error = statistics.stdev(some) / math.sqrt(len(some)) if len(some) > 1 else math.nan
    return statistics.fmean(some), error


def shown(values: Iterable[float], digits: int) -> str:
    """``mean ± error``."""
    mean, error = mean_error(values)
    return f"{mean:.{digits}f}" if math.isnan(error) else f"{mean:.{digits}f} ± {error:.{digits}f}"


def difference(mine: Cell, theirs: Cell) -> tuple[float, float]:
    """KL of one cell less that of another, and its standard error over windows and seeds, both paired."""
    seeds = [seed for seed in mine.scores if seed in theirs.scores]
    gaps = [[a - b for a, b in zip(mine.scores[s].kl, theirs.scores[s].kl, strict=True)] for s in seeds]
    by_window = [statistics.fmean(column) for column in zip(*gaps, strict=True)]
    _, over_windows = mean_error(by_window)
    mean, over_seeds = mean_error(statistics.fmean(gap) for gap in gaps)
    return mean, math.hypot(over_windows, 0.0 if math.isnan(over_seeds) else over_seeds)


def print_table(cells: Sequence[Cell]) -> None:
    """A line for each tool of each row, then fewbit against the best peer of each row.

    The last column is the KL that a peer finds by its own forward with the first seed: where it differs, the export is
    not what was quantized.
    """
    lines: list[tuple[str, ...]] = [
        ("row", "tool", "KL divergence", "perplexity x", "top-1 same", "judged by", "by itself")
    ]
    for cell in cells:
        if not cell.scores:
            lines.append((ROWS[cell.row].title, cell.name, cell.why_not, "", "", "", ""))
            continue
        kl, ratio, agreement = zip(*(s.figures() for s in cell.scores.values()), strict=True)
        own = f"{statistics.fmean(cell.own.values()):.5f}" if cell.own and cell.by == READ else ""
        figures = shown(kl, 5), shown(ratio, 3), shown(agreement, 3)
        lines.append((ROWS[cell.row].title, cell.name, *figures, cell.by, own))
    print_lines(lines)
    lines = [("row", "fewbit", "best peer", "", "ratio", "difference ± error", "")]
    for row in dict.fromkeys(cell.row for cell in cells):
        mine = next(c for c in cells if c.row == row and c.tool == "fewbit")
        others = [c for c in cells if c.row == row and c.tool != "fewbit" and c.scores]
        if not mine.scores or not others:
            continue
        best = min(others, key=lambda c: mean_error(s.figures()[0] for s in c.scores.values())[0])
        a, b = (mean_error(s.figures()[0] for s in c.scores.values())[0] for c in (mine, best))
        gap, error = difference(mine, best)
        verdict = "even" if abs(gap) <= 2 * error else "worse" if gap > 0 else "better"
        lines.append(
            (ROWS[row].title, f"{a:.5f}", f"{b:.5f}", best.name, f"{a / b:.3f}", f"{gap:+.5f} ± {error:.5f}", verdict)
        )
    print()
    print_lines(lines)


def print_lines(lines: Sequence[Sequence[str]]) -> None:
    """Columns under their headings."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())

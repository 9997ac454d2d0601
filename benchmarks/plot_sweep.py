"""Draw a record's batch sweep: tokens/s, and the share of what memory and matrix units allow, one line a format.

    python benchmarks/plot_sweep.py benchmarks/results/H100-COMMIT.json --out docs/h100-sweep.svg

Lines differ in colour, marker and dash, so that the figure reads in grey and for colour-blind readers. Needs matplotlib
(the extra ``report``).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

# Okabe and Ito's colours
STYLES = [("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#009E73", "^", "-."), ("#CC79A7", "D", ":"),
          ("#E69F00", "v", "-"), ("#56B4E9", "P", "--"), ("#000000", "X", "-.")]  # fmt: skip


def lines(cells: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Cells by what they have in common besides the batch, in order of batch; two are no line."""
    found: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        name = cell["recipe"] or "BF16"
        parts = [name, f"{cell['kv']} K/V" if cell["kv"] else "", f"{cell['head']} head" if cell.get("head") else ""]
        found.setdefault(", ".join(p for p in parts if p), []).append(cell)
    return {name: sorted(some, key=lambda c: c["batch"]) for name, some in found.items() if len(some) > 2}


def draw(record: dict[str, Any], config: str, out: Path) -> None:
    """Both panels for one shape.

    Raises:
        SystemExit: the record has no cell of that shape.
    """
    drawn = lines([cell for cell in record["cells"] if cell["config"] == config])
    if not drawn:
        raise SystemExit(
            f"the record has no sweep of {config}; it has cells of {sorted({c['config'] for c in record['cells']})}"
        )
    cells = [cell for some in drawn.values() for cell in some]
    matplotlib.rcParams |= {"svg.hashsalt": "fewbit", "svg.fonttype": "none", "font.size": 9}
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    speed, share = figure.subplots(1, 2)
    for (name, some), (colour, marker, dash) in zip(drawn.items(), STYLES, strict=False):
        batches = [cell["batch"] for cell in some]
        options = {"color": colour, "marker": marker, "linestyle": dash, "markersize": 4, "linewidth": 1.2}
        speed.plot(batches, [cell["tokens_per_s"] for cell in some], label=name, **options)
        share.plot(batches, [100 * cell["of_limit"] for cell in some], **options)
    for axes, title in ((speed, "tokens/s"), (share, "% of the limit (copy bandwidth, large products)")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({c["batch"] for c in cells}), sorted({c["batch"] for c in cells}))
        axes.minorticks_off()
        axes.set_xlabel("sequences")
        axes.set_title(title, loc="left", fontsize=9)
        axes.grid(alpha=0.3)
    speed.set_yscale("log")
    share.set_ylim(0, 115)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    shape = f"{cells[0]['input']} + {cells[0]['output']} tokens"
    figure.suptitle(f"{config}, {record['gpu']}, {shape}, commit {record['commit']}", fontsize=9)
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    parser.add_argument("--config", default="llama3-8b")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    draw(json.loads(options.record.read_text()), options.config, options.out)


if __name__ == "__main__":
    main()

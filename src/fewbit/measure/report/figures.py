"""The figures of a report, each from what a run holds, or the reason why it is left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fewbit.measure.pareto import pareto
from fewbit.measure.report import draw
from fewbit.measure.report.collect import PERPLEXITY, TASKS, Collected, Object, lines, recoveries, task_recoveries

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Drawn:
    """A figure.

    Attributes:
        name: Of its file.
        title: What it shows.
        figure: It.
        words: What a reader has to know of it.
    """

    name: str
    title: str
    figure: Figure
    words: str


@dataclass(frozen=True)
class LeftOut:
    """A figure that is not drawn, and why."""

    title: str
    reason: str


Made = Drawn | LeftOut
NO_SWEEP = "no row of bench offline at two batch sizes or more"


def all_of(found: Collected) -> list[Made]:
    """Every figure, in the order of the page."""
    return [
        _against_batch(found, "throughput", "Throughput against batch", "tokens/s", lambda c: c["tokens_per_s"], True),
        _against_batch(
            found, "tpot", "Time per output token (TPOT) against batch", "ms", lambda c: 1e3 * c["per_token_s"], False
        ),
        _against_batch(
            found, "ttft", "Time to first token (TTFT) against batch", "ms", lambda c: 1e3 * c["first_token_s"], True
        ),
        _tradeoff(found),
        _mbu(found),
        _cdf(found),
        *_errors(found),
        _deltas(found),
        _recovery(found),
    ]


def _sweeps(found: Collected, needs: str | None = None) -> dict[str, list[Object]]:
    cells = [cell for cell in found.cells if needs is None or cell.get(needs) is not None]
    return {name: some for name, some in lines(cells).items() if len(some) > 1}


def _against_batch(
    found: Collected, name: str, title: str, unit: str, value: Callable[[Object], float], log: bool
) -> Made:
    if not (drawn := _sweeps(found)):
        return LeftOut(title, NO_SWEEP)
    made = draw.figure()
    axes = made.subplots()
    for (line, some), style in zip(drawn.items(), draw.styles(), strict=False):
        axes.plot([c["batch"] for c in some], [value(c) for c in some], label=line, **style)
    draw.batches(axes, {c["batch"] for some in drawn.values() for c in some})
    if log:
        draw.plain_log(axes)
    else:
        axes.set_ylim(bottom=0)
    axes.set_ylabel(unit)
    made.legend(loc="outside lower center", ncols=min(len(drawn), 3))
    return Drawn(name, title, made, "Static batches: all prompts at once, answers of full length.")


def _tradeoff(found: Collected) -> Made:
    title = "Throughput against latency"
    if not (drawn := _sweeps(found)):
        return LeftOut(title, NO_SWEEP)
    made = draw.figure()
    axes = made.subplots()
    for (line, some), style in zip(drawn.items(), draw.styles(), strict=False):
        axes.plot([1e3 * c["per_token_s"] for c in some], [c["tokens_per_s"] for c in some], label=line, **style)
    slowest = max(drawn.values(), key=lambda some: some[0]["per_token_s"])  # to its right and below there is room
    for c in slowest:
        place = (1e3 * c["per_token_s"], c["tokens_per_s"])
        axes.annotate(str(c["batch"]), place, textcoords="offset points", xytext=(6, -9), fontsize=7)
    axes.set_xlabel("time per output token, ms")
    axes.set_ylabel("tokens/s of all sequences")
    draw.plain_log(axes)
    made.legend(loc="outside lower center", ncols=min(len(drawn), 3))
    words = "One curve a format, a point a batch size (named on the slowest). Up and left is better."
    return Drawn("tradeoff", title, made, words)


def _mbu(found: Collected) -> Made:
    title = "Memory bandwidth used (MBU) against batch, and its roof"
    drawn = _sweeps(found, "mbu")
    if not drawn:
        return LeftOut(title, "no row with an MBU at two batch sizes or more")
    made, roofed = draw.figure(), False
    axes = made.subplots()
    for (line, some), style in zip(drawn.items(), draw.styles(), strict=False):
        sizes = [c["batch"] for c in some]
        axes.plot(sizes, [100 * c["mbu"] for c in some], label=line, **style)
        if all(c.get("step_flops") for c in some):
            roof = [100 * min(1.0, _memory_s(c) / max(_compute_s(c), 1e-30)) for c in some]
            if min(roof) < 100:
                roofed = True
                axes.plot(sizes, roof, color=style["color"], linestyle=style["linestyle"], linewidth=0.8, alpha=0.7)
    axes.axhline(100, color=draw.INK, linewidth=1.2)
    axes.annotate("memory's peak", (0.01, 100), xycoords=("axes fraction", "data"), xytext=(0, 3),
                  textcoords="offset points", fontsize=7)  # fmt: skip
    draw.batches(axes, {c["batch"] for some in drawn.values() for c in some})
    highest = max(100 * c["mbu"] for some in drawn.values() for c in some)
    axes.set_ylim(0, max(112.0, 1.08 * highest))
    axes.set_ylabel("% of the memory's peak")
    made.legend(loc="outside lower center", ncols=min(len(drawn), 3))
    peaks = sorted({c["peak"] for some in drawn.values() for c in some})
    whose = ", ".join(peaks).replace("measured", "measured in the same run")
    words = f"Bytes that a decode step must read (weights as stored, K and V) / TPOT / peak bandwidth; peaks: {whose}."
    words += " Thin lines: where arithmetic becomes the lower roof." * roofed
    return Drawn("mbu", title, made, words)


def _memory_s(cell: Object) -> float:
    return float(cell["step_bytes"] / cell["peak_bytes_per_s"])


def _compute_s(cell: Object) -> float:
    return float(cell["step_flops"] / cell["peak_flops_per_s"])


def _cdf(found: Collected) -> Made:
    title = "Latencies under load"
    detailed = {name: one for name, one in found.loads.items() if one.get("ttfts")}
    if not detailed:
        return LeftOut(title, "no result of bench serve --save-detailed")
    made = draw.figure(11, 3.4)
    panels = made.subplots(1, 3, sharey=True)
    asked = (("ttfts", "time to first token, ms"), ("tpots", "time per output token, ms"), ("e2els", "end to end, ms"))
    for axes, (key, words) in zip(panels, asked, strict=True):
        for (name, one), style in zip(detailed.items(), draw.styles(), strict=False):
            good = [i for i, error in enumerate(one["errors"]) if not error]
            values = sorted(1e3 * one[key][i] for i in good if one[key][i] is not None)
            if values:
                share = 100 * np.arange(1, len(values) + 1) / len(values)
                few = style | {"markevery": max(len(values) // 8, 1), "drawstyle": "steps-post"}
                axes.plot(values, share, label=name, **few)
        axes.set_xlabel(words)
        axes.set_xlim(left=0)
    panels[0].set_ylabel("% of the answers are as fast")
    handles, names = panels[0].get_legend_handles_labels()
    made.legend(handles, names, loc="outside lower center", ncols=min(len(names), 3))
    return Drawn("latency_cdf", title, made, "Cumulative: the share of answers that took no longer.")


def _errors(found: Collected) -> list[Made]:
    title = "Error of each layer's weights"
    if not found.compressions:
        return [LeftOut(title, "no result of compress --json")]
    return [_heat(name, one, number) for number, (name, one) in enumerate(found.compressions.items())]


def _heat(name: str, one: Object, number: int) -> Made:
    from matplotlib.colors import LogNorm

    grid: dict[str, dict[int, float]] = {}
    for linear, error in one["weight_error"].items():
        parts = linear.split(".")
        if parts[0] == "layers" and error > 0:
            of = grid.setdefault(".".join(part for part in parts[2:] if not part.isdigit()), {})
            of[int(parts[1])] = max(error, of.get(int(parts[1]), 0.0))  # of experts the worst
    if not grid:
        return LeftOut(f"Error of each layer's weights, {name}", "every weight is exactly as it was")
    layers = 1 + max(max(of) for of in grid.values())
    values = np.array([[of.get(i, np.nan) for i in range(layers)] for of in grid.values()])
    made = draw.figure(max(4.5, min(9, 2.2 + 0.28 * layers)), 1.4 + 0.28 * len(grid))
    axes = made.subplots()
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    drawn = axes.pcolormesh(values, cmap="cividis", norm=LogNorm(low, high if high > low else low * 1.01))
    axes.grid(visible=False)
    axes.set_yticks(np.arange(len(grid)) + 0.5, list(grid))
    step = max(1, layers // 16)
    axes.set_xticks(np.arange(0, layers, step) + 0.5, [str(i) for i in range(0, layers, step)])
    axes.set_xlabel("layer")
    axes.invert_yaxis()
    bar = made.colorbar(drawn, ax=axes, ticks=[low, (low * high) ** 0.5, high])
    bar.ax.minorticks_off()
    bar.ax.set_yticklabels([f"{tick:.3g}" for tick in (low, (low * high) ** 0.5, high)])
    bar.outline.set_visible(False)
    words = "|rounded − meant| / |weights| of each linear; brighter is worse."
    return Drawn(f"layer_error_{number}", f"Error of each layer's weights, {name}", made, words)


def _deltas(found: Collected) -> Made:
    title = "Tasks won and lost"
    by_model = {name: deltas for name, one in found.evals.items() if (deltas := _of_tasks(one))}
    if not by_model:
        return LeftOut(title, "no tasks of eval against a base")
    from matplotlib.ticker import MaxNLocator

    made = draw.figure()
    axes = made.subplots()
    every = [delta for deltas in by_model.values() for delta in deltas]
    reach = max(*(abs(delta) for delta in every), 1.0) * 1.05
    edges = np.linspace(-reach, reach, 22)
    hatches = ("", "//", "..", "xx", "--", "++")
    for number, ((name, deltas), style) in enumerate(zip(by_model.items(), draw.styles(), strict=False)):
        axes.hist(
            deltas, edges.tolist(), label=f"{name} ({len(deltas)} tasks)", alpha=0.55, color=style["color"],
            edgecolor=style["color"], hatch=hatches[number % len(hatches)], histtype="stepfilled",
            linestyle=style["linestyle"], linewidth=1.2,
        )  # fmt: skip
    axes.axvline(0, color=draw.INK, linewidth=1)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("accuracy of the model − accuracy of the base, percentage points")
    axes.set_ylabel("tasks")
    made.legend(loc="outside lower center", ncols=min(len(by_model), 3))
    return Drawn("task_deltas", title, made, "How many tasks changed by how much. Left of the line: lost.")


def _of_tasks(one: Object) -> list[float]:
    tasks = (one.get("tasks") or {}).values()
    return [100 * (t["accuracy"] - t["base"]["accuracy"]) for t in tasks if t.get("base")]


def _recovery(found: Collected) -> Made:
    title = "Accuracy kept against bits per weight"
    known, without = recoveries(found), ""
    points = [(name, bits, kept, of) for name, bits, kept, of in known if bits is not None]
    if unsized := [name for name, bits, *_ in known if bits is None]:
        without = f"; of no known size, or of several under one name, so not here: {', '.join(unsized)}"
    shared = {name for name, *_ in known}
    if alone := [name for name in found.evals if name not in shared]:
        without += f"; of no known quality beside a base, so not here: {', '.join(alone)}"
    if len({of for *_, of in points} - {"base"}) > 1:  # two scales do not share an axis
        without += "; without tasks, so not here: " + ", ".join(name for name, *_, of in points if of == PERPLEXITY)
        points = [point for point in points if point[3] != PERPLEXITY]
    if not any(of != "base" for *_, of in points):
        return LeftOut(title, f"no model whose size and whose quality beside a base are both known{without}")
    made = draw.figure()
    axes = made.subplots()
    front = sorted(pareto([(bits, -kept) for _, bits, kept, _ in points]), key=lambda i: points[i][1])
    axes.plot([points[i][1] for i in front], [100 * points[i][2] for i in front], color=draw.INK, linewidth=1,
              linestyle="--", label="Pareto front", zorder=1)  # fmt: skip
    for number, ((name, bits, kept, _), style) in enumerate(zip(points, draw.styles(), strict=False)):
        on = number in front
        axes.plot(bits, 100 * kept, color=style["color"], marker=style["marker"], markersize=8, linestyle="none",
                  fillstyle="full" if on else "none", zorder=2)  # fmt: skip
        axes.annotate(name, (bits, 100 * kept), textcoords="offset points", xytext=(7, 4), fontsize=8)
    axes.margins(x=0.15, y=0.15)
    axes.set_xlabel("bits per weight of the layers' linears, as stored")
    axes.set_ylabel("% of the base")
    made.legend(loc="outside lower center")
    of = next(of for *_, of in points if of != "base")
    if counts := [len(task_recoveries(found.evals[name])) for name, *_, of in points if of == TASKS]:
        of += f" (tasks: {' to '.join(map(str, sorted({min(counts), max(counts)})))})"
    words = f"{of[0].upper()}{of[1:]}{without}. Filled: on the Pareto front, no other is both smaller and better."
    return Drawn("recovery", title, made, words)


def split(made: Sequence[Made]) -> tuple[list[Drawn], list[LeftOut]]:
    """What is drawn, and what is not."""
    return [m for m in made if isinstance(m, Drawn)], [m for m in made if isinstance(m, LeftOut)]

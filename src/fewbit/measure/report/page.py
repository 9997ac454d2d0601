"""The page: one HTML file that asks nobody for anything, and reads on screens light and dark, and on paper."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fewbit.measure.report import draw
from fewbit.measure.report.collect import Collected, Object, base_of, label, lines, owner, recoveries
from fewbit.measure.report.figures import Made, split
from fewbit.measure.tasks.harness import shown
from fewbit.version import __version__

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #16181d; --soft: #5a6070; --line: #d5d9e2; --fill: #f4f6fa }
@media (prefers-color-scheme: dark) {
  :root { --page: #14161b; --ink: #e8eaf0; --soft: #a4abbb; --line: #3a3f4c; --fill: #1d2027 }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .3rem } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem }
h3 { font-size: 1rem; margin: 0 0 .3rem }
p { margin: .3rem 0 } .soft, figcaption { color: var(--soft); font-size: .87rem }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1.2rem }
figure { margin: 0; padding: .9rem; border: 1px solid var(--line); border-radius: .5rem; break-inside: avoid }
figure.wide { grid-column: 1 / -1 } figure svg { display: block; width: 100%; height: auto }
.scroll { overflow-x: auto } .scroll:focus-visible { outline: 2px solid currentColor }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th { background: var(--fill) } th:first-child, td:first-child, .words th, .words td { text-align: left }
.words td { white-space: normal; overflow-wrap: anywhere }
li { overflow-wrap: anywhere }
@media print {
  :root { color-scheme: light; --page: #fff; --ink: #000; --soft: #444; --line: #bbb; --fill: #f0f0f0 }
  body { max-width: none; padding: 0; font-size: 10pt } .figures { display: block }
  figure { margin-bottom: .8rem; border: 0; padding: 0; max-width: 16cm } figure.wide { max-width: none }
  h2, h3 { break-after: avoid } tr { break-inside: avoid } .scroll { overflow: visible } table { font-size: 8pt }
  th, td { padding: .2rem .4rem; white-space: normal }
}
"""

SHORT = 24
"""Rows of speed that stand before the figures; more stand behind them."""


def page(found: Collected, made: Sequence[Made], title: str) -> str:
    """The whole page; figures are drawn into it.

    Args:
        found: What the run holds.
        made: Its figures, under `draw.drawing`.
        title: Of the page.
    """
    drawn, left_out = split(made)
    parts = [f"<h1>{_text(title)}</h1>", f"<p class=soft>{_text(_summary(found))}</p>"]
    speed = _section("Speed", _speed(found))
    parts += speed if len(found.cells) <= SHORT else []
    parts += _section("Quality", _quality(found)) + _section("Under load", _loads(found))
    if drawn:
        parts.append("<h2>Figures</h2><div class=figures>")
        for one in drawn:
            wide = " class=wide" if one.figure.get_figwidth() > 7 else ""
            picture = draw.svg(one.figure, one.name).replace(
                "<svg ", f'<svg role="img" aria-label="{_text(one.title)}" ', 1
            )
            parts.append(
                f"<figure{wide}><h3>{_text(one.title)}</h3>{picture}<figcaption>{_text(one.words)}</figcaption></figure>"
            )
        parts.append("</div>")
    parts += speed if len(found.cells) > SHORT else []
    parts += _section("Failed", _list(f"{what}: {why}" for what, why in found.failed))
    parts += _section("Left out", _list(f"{one.title}: {one.reason}" for one in left_out))
    parts += _section("Made with", _made_with(found))
    if found.others:
        some = ", ".join(found.others[:8]) + (", ..." if len(found.others) > 8 else "")
        parts.append(f"<p class=soft>Files that hold no result: {_text(some)}</p>")
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{_text(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _text(value: Any) -> str:
    return html.escape(str(value))


def _section(title: str, body: str) -> list[str]:
    return [f"<h2>{_text(title)}</h2>", body] if body else []


def _list(items: Iterable[str]) -> str:
    made = "".join(f"<li>{_text(item)}</li>" for item in items)
    return f"<ul>{made}</ul>" if made else ""


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], kind: str = "") -> str:
    """A table that scrolls by itself where it is too wide; empty without rows."""
    if not rows:
        return ""
    head = "".join(f"<th scope=col>{_text(name)}</th>" for name in columns)
    lines_ = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    words = f" class={kind}" if kind else ""
    return (
        f'<div class=scroll tabindex=0 role=region aria-label="{_text(columns[0])}">'
        f"<table{words}><thead><tr>{head}</tr></thead><tbody>{lines_}</tbody></table></div>"
    )


def _summary(found: Collected) -> str:
    counted = (
        (len(found.cells), "row", "of speed"), (len(found.failed), "row", "that failed"),
        (len(found.evals), "model", "evaluated"), (len(found.loads), "result", "under load"),
        (len(found.compressions), "compression", "reported"),
    )  # fmt: skip
    return "; ".join(f"{n} {noun}{'s' * (n > 1)} {rest}" for n, noun, rest in counted if n) + "."


def _speed(found: Collected) -> str:
    bases: dict[str, None] = {}
    speeds: dict[tuple[Any, ...], float] = {}
    for config in dict.fromkeys(c.get("config") for c in found.cells):  # each shape of random weights has its own
        cells = [c for c in found.cells if c.get("config") == config]
        if base := base_of(cells):
            first = lines(cells)[base][0]
            bases[label(first)] = None
            speeds |= {_size(c): c["tokens_per_s"] for c in cells if owner(c) == owner(first)}
    rows = []
    for name, some in lines(found.cells).items():
        for c in some:
            of = speeds.get(_size(c))
            rows.append(
                (
                    name, _fixed(c.get("bits_per_weight"), 2), c["batch"], f"{c['input']} + {c['output']}",
                    f"{c['peak_bytes'] / 2**30:.2f}", f"{c['tokens_per_s']:.1f}",
                    f"{c['tokens_per_s'] / of:.2f}" if of else "", f"{1e3 * c['first_token_s']:.1f}",
                    f"{1e3 * c['per_token_s']:.2f}", _share(c.get("mbu")), _share(c.get("mfu")),
                    _share(c.get("of_limit")),
                )
            )  # fmt: skip
    columns = ("format", "bits", "batch", "input + output", "memory, GiB", "tokens/s", "speed-up", "TTFT, ms",
               "TPOT, ms", "MBU", "MFU", "of the limit")  # fmt: skip
    beside = (
        f"Speed-up over {', '.join(bases)}, in the same sizes on the same device. "
        "Of the limit: of what the ceilings measured in the same run allow."
    ) if bases else ""  # fmt: skip
    return table(columns, rows) + (f"<p class=soft>{_text(beside)}</p>" if bases else "")


def _size(cell: Mapping[str, Any]) -> tuple[Any, ...]:
    return cell["environment"].get("device"), cell.get("config"), cell["batch"], cell["input"], cell["output"]


def _fixed(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _quality(found: Collected) -> str:
    kept = {name: share for name, _, share, of in recoveries(found) if of != "base"}
    rows = []
    for name, one in found.evals.items():
        rows.append(
            (
                name, _error(one, "perplexity", 3), _error(one, "kl_mean", 4), _error(one, "top1_agreement", 4),
                len(one.get("tasks") or {}) or "", _mean_accuracy(one), _share(kept.get(name)),
            )
        )  # fmt: skip
    columns = ("model", "perplexity", "KL, nats", "top-1 as base", "tasks", "mean accuracy", "kept of the base")
    tasks = [
        (
            name, task, f"{t['accuracy']:.2%}", f"{t['base']['accuracy']:.2%}" if t.get("base") else "",
            _paired(t.get("paired")),
        )
        for name, one in found.evals.items()
        for task, t in (one.get("tasks") or {}).items()
    ]  # fmt: skip
    more = [table(("model", "task", "accuracy", "of the base", "recovery (95 %)"), tasks)]
    more.append(table(("model", "gauntlet, above guessing", "score", "of the base"), _gauntlets(found)))
    more.append(table(("model", "lm-eval", "metric", "score", "95 % interval", "of the base"), _harness(found)))
    return table(columns, rows) + "".join(f"<p></p>{one}" for one in more if one)


def _gauntlets(found: Collected) -> list[tuple[str, ...]]:
    """The gauntlet's categories, and last its composite: the published one only where every task was run."""
    rows: list[tuple[str, ...]] = []
    for name, one in found.evals.items():
        if made := one.get("gauntlet"):
            base = made.get("base") or {"categories": {}, "score": None}
            for category, score in made["categories"].items():
                rows.append((name, category, _fixed(score, 4), _fixed(base["categories"].get(category), 4)))
            whole = "composite" if made["complete"] else "mean of these, not the published composite"
            rows.append((name, whole, _fixed(made["score"], 4), _fixed(base["score"], 4)))
    return rows


def _harness(found: Collected) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, one in found.evals.items():
        for task, made in ((one.get("lm_eval") or {}).get("tasks") or {}).items():
            other = (made.get("base") or {}).get("metrics", {})
            for metric, value in shown(made["metrics"]).items():
                span = made["intervals"].get(metric)
                between = f"{span[0]:.4f} to {span[1]:.4f}" if span else ""
                rows.append((name, task, metric, _fixed(value, 4), between, _fixed(other.get(metric), 4)))
    return rows


def _mean_accuracy(one: Object) -> str:
    tasks = list((one.get("tasks") or {}).values())
    return f"{sum(t['accuracy'] for t in tasks) / len(tasks):.2%}" if tasks else ""


def _paired(p: Mapping[str, Any] | None) -> str:
    if not p or p.get("recovery") is None:
        return ""
    return f"{p['recovery']:.1%} ({p['recovery_low']:.1%} to {p['recovery_high']:.1%})"


def _error(one: Mapping[str, Any], name: str, digits: int) -> str:
    if one.get(name) is None:
        return ""
    return f"{one[name]:.{digits}f} ± {one.get(f'{name}_err') or 0:.{digits}f}"


def _loads(found: Collected) -> str:
    columns = ("result", "server's model", "requests", "failed", "requests/s", "tokens/s", "median TTFT, ms",
               "median TPOT, ms", "p99 TTFT, ms")  # fmt: skip
    rows = [
        (
            name + (" (stopped early)" if one.get("stopped") else ""), one.get("model_id"), one["completed"],
            one["failed"], _fixed(one["request_throughput"], 2), _fixed(one["output_throughput"], 1),
            _fixed(one["median_ttft_ms"], 1), _fixed(one["median_tpot_ms"], 2), _fixed(one.get("p99_ttft_ms"), 1),
        )
        for name, one in found.loads.items()
    ]  # fmt: skip
    return table(columns, rows)


def _made_with(found: Collected) -> str:
    """Device, driver and versions; more than one value of anything is a warning by itself."""
    seen: dict[str, list[str]] = {}

    def add(name: str, value: Any) -> None:
        if value not in (None, "", {}) and str(value) not in seen.setdefault(name, []):
            seen[name].append(str(value))

    for cell in found.cells:
        for name, value in cell["environment"].items():
            if name not in ("temperature_c", "sm_clock_mhz", "memory_clock_mhz"):
                add(name, value)
        add("seed", cell.get("seed"))
    for one in found.loads.values():
        for name, value in (one.get("environment") or {}).items():
            add(
                f"client's {name}",
                ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value,
            )
        add("seed", one.get("seed"))
        add("data of bench serve, SHA-256", (one.get("dataset") or {}).get("sha256"))
    for one in found.evals.values():
        add("device of eval", one.get("device"))
        add("seed", one.get("seed"))
        text = (one.get("text") or {}).get("sha256") or (
            None if one.get("tasks") else (one.get("key") or {}).get("data")
        )
        add("text of eval, SHA-256", text)
        for task, t in (one.get("tasks") or {}).items():
            for data in (t.get("data") or {}).values():
                add(f"data of {task}, SHA-256", data.get("sha256"))
    for one in found.compressions.values():
        add("calibration", one.get("calibration"))
    dates = sorted(seen.pop("date", []))
    if dates:
        seen["measured"] = [dates[0]] if len(dates) == 1 else [f"{dates[0]} to {dates[-1]}"]
    seen["report by"] = [f"fewbit {__version__}"]
    return table(("what", "value"), [(name, "; ".join(values)) for name, values in seen.items() if values], "words")

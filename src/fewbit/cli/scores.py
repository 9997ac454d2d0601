"""What `fewbit eval` says of its figures, in words and tables."""

from __future__ import annotations

from typing import Any

from fewbit.cli.common import note, pairs, table

ESTIMATES = (
    "perplexity",
    "perplexity_base",
    "perplexity_ratio",
    "kl_mean",
    "kl_median",
    "kl_p99",
    "top1_agreement",
    "flips",
    "probability_rms",
)


def show(made: dict[str, Any]) -> None:
    """The JSON object of the command, as tables; remarks go to stderr."""
    parts = [_text] if "tokens" in made else []
    parts += [_tasks] if made.get("tasks") else []
    parts += [_gauntlet] if "gauntlet" in made else []
    parts += [_harness] if "lm_eval" in made else []
    for number, part in enumerate(parts):
        if number:
            print()
        part(made)


def _text(made: dict[str, Any]) -> None:
    rows = [("tokens", f"{made['tokens']:,} in {made['windows']} windows")]
    for name in ESTIMATES:
        if name in made:
            error, low, high = (made[f"{name}_{part}"] for part in ("err", "low", "high"))
            rows.append((name, f"{made[name]:.5g} ± {error:.2g}  ({low:.5g} to {high:.5g})"))
    if "kl_max" in made:
        rows.append(("kl_max", f"{made['kl_max']:.5g}"))
    pairs(rows)


def _tasks(made: dict[str, Any]) -> None:
    tasks, against = made["tasks"], made["base"] is not None
    columns = ["task", "questions", "score", "95 % interval", "guessing"]
    columns += ["base", "difference", "95 % interval", "recovery", "flips", "p"] if against else []
    rows = [_row(name, found) for name, found in tasks.items()]
    table(columns, [row + ["-"] * (len(columns) - len(row)) for row in rows])
    for name, found in tasks.items():
        if fewer := found["items"] - found["shown"].get(str(found["shots"]), 0):
            note(f"{name}: {fewer:,} of {found['items']:,} questions had fewer than {found['shots']} examples")
    for name, found in tasks.items():
        if name == "needle":
            print()
            _grid(found["groups"])


def _row(name: str, found: dict[str, Any]) -> list[str]:
    scorer = " (generate)" if found["scored_by"] == "generate" else ""
    row = [name + scorer, f"{found['items']:,}", f"{found['accuracy']:.4f}", _interval(*found["interval"])]
    row.append(f"{found['baseline']:.3g}")
    if (pair := found.get("paired")) is not None:
        row += [f"{pair['base']:.4f}", f"{pair['difference']:+.4f}", _interval(pair["low"], pair["high"], "+")]
        row.append("-" if pair["recovery"] is None else f"{pair['recovery']:.1%}")
        row += ["-" if pair["flips"] is None else f"{pair['flips']:.1%}"]
        row += ["-" if pair["p"] is None else f"{pair['p']:.3f}"]
    return row


def _grid(groups: dict[str, float]) -> None:
    """Needles found, by length and depth."""
    lengths = sorted({int(name.partition("@")[0]) for name in groups})
    depths = sorted({int(name.partition("@")[2]) for name in groups})
    rows = [[str(n), *(_share(groups.get(f"{n}@{d}")) for d in depths)] for n in lengths]
    table(["tokens", *(f"at {d} %" for d in depths)], rows)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _gauntlet(made: dict[str, Any]) -> None:
    found, base = made["gauntlet"], made["gauntlet"].get("base")
    rows = [
        [name, f"{score:.4f}", *([f"{base['categories'][name]:.4f}"] if base else [])]
        for name, score in found["categories"].items()
    ]
    whole = [_score(found["score"]), *([_score(base["score"])] if base else [])]
    rows.append(["composite" if found["complete"] else "mean of these", *whole])
    table(["gauntlet, above guessing", "score", *(["base"] if base else [])], rows)
    if not found["complete"]:
        missing = ", ".join(name for names in found["missing"].values() for name in names)
        why = [f"no files of {missing}"] if missing else []
        why += ["only --limit questions of each task"] if made["limit"] is not None else []
        note(f"not the published composite: {', '.join(why)}")


def _harness(made: dict[str, Any]) -> None:
    from fewbit.measure.tasks.harness import shown

    rows = []
    for name, found in made["lm_eval"]["tasks"].items():
        for metric, value in shown(found["metrics"]).items():
            pair = found.get("paired", {}).get(metric)
            against = []
            if pair:
                against = [
                    f"{pair['base']:.4f}",
                    f"{pair['difference']:+.4f}",
                    _interval(pair["low"], pair["high"], "+"),
                ]
            elif (other := found.get("base", {}).get("metrics", {}).get(metric)) is not None:
                against = [f"{other:.4f}", f"{value - other:+.4f}"]
            span = found["intervals"].get(metric)
            rows.append([f"{name}, {metric}", f"{value:.4f}", _interval(*span) if span else "-", *against])
    width = max((len(row) for row in rows), default=0)
    columns = [f"lm-eval {made['lm_eval']['version']}", "score", "95 % interval", "base", "difference", "95 % interval"]
    table(columns[:width], [row + [""] * (width - len(row)) for row in rows])
    if cut := made["lm_eval"]["cut_prompts"]:
        note(f"{cut} prompts were cut at their beginning to fit the model, as lm-eval does")


def _interval(low: float, high: float, sign: str = "") -> str:
    return f"{low:{sign}.4f} to {high:{sign}.4f}"


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"

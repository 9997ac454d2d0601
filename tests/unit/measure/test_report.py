"""fewbit report: what is in a run is drawn, what is not is named, and the page asks nobody for anything."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fewbit import cli
from fewbit.measure.report import figures, page
from fewbit.measure.report.collect import base_of, collect, label, lines, recoveries
from helpers import make_model

VOID = {"meta", "link", "br", "img", "use", "path", "rect"}


class Page(HTMLParser):
    """Whether tags close each other, which ids there are, and whom the page would ask."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.asked: list[str] = []
        self.used: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self._look(attrs)

    def handle_startendtag(self, tag, attrs):
        self._look(attrs)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def _look(self, attrs):
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href") and not value.startswith("data:"):
                (self.used if value.startswith("#") else self.asked).append(value)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Two models measured at two batch sizes, and what other commands would have written, in few words."""
    folder, models = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("models")
    for name in ("base", "small"):
        model = make_model(models / name)
        words = ["--batch", "1,2", "--input", "8", "--output", "3", "--runs", "1", "--device", "cpu", "-q"]
        assert cli.run(["bench", "offline", str(model), *words, "--run-dir", str(folder), "--json"]) == 0
    for file in folder.glob("*small*.json"):  # as if it had been quantized
        file.write_text(file.read_text().replace('"bits_per_weight": 16.0', '"bits_per_weight": 4.25'))
    failed = {"model": "large", "batch": 1, "input": 8, "output": 3, "failed": "no <room>"}
    others = {
        "failed.json": {"command": "bench offline", "cells": [failed]},
        "base.json": {"command": "eval", "label": "base", "model": "/somewhere/base", "perplexity": 10.0},
        "eval/eval.json": {
            "command": "eval", "model": "/somewhere/small", "perplexity": 12.5, "perplexity_err": 0.1,
            "perplexity_base": 10.0, "base": "/somewhere/base",
        },
        "serve.json": {
            "command": "bench serve", "result_schema": "fewbit.bench.serve/1", "model_id": "m", "completed": 2,
            "failed": 1, "request_throughput": 1.0, "output_throughput": 2.0, "median_ttft_ms": 5.0,
            "median_tpot_ms": None, "ttfts": [0.01, 0.02, 0.0], "tpots": [0.001, 0.002, None],
            "e2els": [0.1, 0.2, None], "errors": ["", "", "x"], "dataset": {"sha256": "d" * 64},
            "stopped": True, "seed": 7,
        },
        "compress.json": {
            "command": "compress", "output": "small", "calibration": "none",
            "verified": {"bits_per_weight": 4.0, "layer_bits": 4.25},
            "weight_error": {f"layers.{i}.{n}": 0.01 * (i + 1) for i in range(3) for n in ("attn.q", "mlp.up")},
        },
        "strange.json": {"x": 1},
    }  # fmt: skip
    (folder / "eval").mkdir()
    for name, one in others.items():
        (folder / name).write_text(json.dumps(one))
    (folder / "cut.json").write_text('{"x')
    return folder


def test_what_a_folder_holds_is_sorted(run):
    found = collect(run)
    assert [(label(c), c["batch"]) for c in found.cells] == [("base", 1), ("base", 2), ("small", 1), ("small", 2)]
    assert found.failed == [("large, 1 x 8 + 3", "no <room>")]
    assert set(found.evals) == {"base", "small"}
    assert found.others == ["cut.json", "strange.json"]
    assert base_of(found.cells) == "base"
    assert recoveries(found) == [
        ("base", 16, 1.0, "base"), ("small", 4.25, 0.8, "perplexity of the base / the model's"),
    ]  # fmt: skip


def test_of_equal_rows_the_newest_counts_and_lines_are_told_apart(tmp_path):
    cell = {"model": None, "config": "c", "recipe": "int8", "kv": "fp8", "batch": 1, "input": 8, "output": 2}
    for number, date in enumerate(("2026-01-02", "2026-01-01")):
        one = cell | {"tokens_per_s": number, "environment": {"date": date, "device": "x"}}
        (tmp_path / f"{number}.json").write_text(json.dumps({"command": "bench offline", "cells": [one]}))
    assert [c["tokens_per_s"] for c in collect(tmp_path).cells] == [0]
    other = cell | {"input": 9, "environment": {"device": "x"}}
    assert list(lines([cell | {"environment": {"device": "x"}}, other])) == [
        "int8, fp8 K/V, 8 + 2", "int8, fp8 K/V, 9 + 2",
    ]  # fmt: skip


def test_results_of_one_name_are_told_apart(tmp_path):
    cell = {
        "config": None,
        "batch": 1,
        "input": 8,
        "output": 2,
        "bits_per_weight": 16.0,
        "environment": {"device": "x"},
    }
    for number in range(2):
        folder = tmp_path / f"run{number}"
        folder.mkdir()
        (folder / "eval.json").write_text(
            json.dumps({"command": "eval", "model": f"{number}/m", "perplexity": 2.0, "perplexity_base": 2.0})
        )
        (folder / "load.json").write_text(json.dumps({"command": "bench serve", "label": "same"}))
        row = cell | {"model": "m", "path": f"{number}/m"}
        (folder / "row.json").write_text(json.dumps({"command": "bench offline", "cells": [row]}))
    found = collect(tmp_path)
    assert set(found.evals) == {"m (run0/eval.json)", "m (run1/eval.json)"}
    assert set(found.loads) == {"same (run0/load.json)", "same (run1/load.json)"}
    assert set(lines(found.cells)) == {"m (0/m)", "m (1/m)"}
    assert [(name, bits) for name, bits, *_ in recoveries(found)] == [(name, 16.0) for name in found.evals]


def sized(name: str, path: str | None, bits: float, **more) -> dict:
    environment = {"device": more.pop("device", "x")}
    speed = {"peak_bytes": 2**30, "first_token_s": 1.0, "per_token_s": 1.0, "tokens_per_s": 1.0}
    cell = {"model": name, "path": path, "config": None, "batch": 1, "input": 8, "output": 2, "bits_per_weight": bits}
    return {"command": "bench offline", "cells": [cell | speed | more | {"environment": environment}]}


def evaluated(model: str, kept: float, device: str | None = None, **more) -> dict:
    key = {"key": {"device": device}} if device else {}
    return {"command": "eval", "model": model, "perplexity": 8.0 / kept, "perplexity_base": 8.0, **key, **more}


def written(folder: Path, *objects: dict) -> Path:
    for number, one in enumerate(objects):
        (folder / f"{number}.json").write_text(json.dumps(one))
    return folder


def test_models_of_one_name_keep_their_own_sizes(tmp_path):
    """By path; by name where only one model has it; and of two that differ under one name neither."""
    (small := tmp_path / "two").mkdir()
    found = collect(
        written(
            small, sized("m", "a/m", 4.25), sized("m", "b/m", 8.0), evaluated("b/m", 0.5), evaluated("./a/m/", 0.25),
            evaluated("c/m", 0.125),
        )
    )  # fmt: skip
    assert sorted((bits or 0, kept) for _, bits, kept, _ in recoveries(found)) == [(0, 0.125), (4.25, 0.25), (8.0, 0.5)]
    assert len({name for name, *_ in recoveries(found)}) == 3
    for number, objects in enumerate(
        (
            [sized("m", None, 4.25), sized("m", None, 8.0, input=9), evaluated("m", 0.5)],
            [sized("m", "a/m", 4.25), evaluated("b/m", 0.5), evaluated("c/m", 0.5)],
        )
    ):
        (folder := tmp_path / str(number)).mkdir()
        assert {bits for _, bits, *_ in recoveries(collect(written(folder, *objects)))} == {None}
    (moved := tmp_path / "moved").mkdir()
    found_moved = collect(written(moved, sized("m", "a/m", 4.25), evaluated("/b/m", 1)))
    assert [bits for _, bits, *_ in recoveries(found_moved)] == [4.25]
    (exact := tmp_path / "exact").mkdir()
    made = {"command": "compress", "output": "/b/m", "verified": {"layer_bits": 8.5}, "weight_error": {}}
    found_exact = collect(written(exact, sized("m", "a/m", 4.25), evaluated("/b/m", 1), made))
    assert [bits for _, bits, *_ in recoveries(found_exact)] == [8.5]
    pytest.importorskip("matplotlib", reason="NO MATPLOTLIB, so no figure was drawn: pip install 'fewbit[report]'")
    text = page.page(found, [figures._recovery(found)], "title")
    assert "so not here: m (4.json)" in text
    assert text.count("<td>12.5%</td>") == 1  # its quality is known all the same


def test_a_model_measured_alone_is_the_base_only_of_what_was_held_against_it(tmp_path):
    alone = {"command": "eval", "perplexity": 8.0}
    objects = [
        sized("m", "m", 4.25), alone | {"model": "a/base"}, evaluated("m", 0.5, base="./a/base"),
        alone | {"model": "b/other"}, {**alone, "label": "held", "key": {"model": "x 1"}},
        {"command": "eval", "label": "n", "perplexity": 16.0, "perplexity_base": 8.0,
         "key": {"model": "y 2", "against": "x 1"}},
    ]  # fmt: skip
    found = collect(written(tmp_path, *objects))
    assert {name: kept for name, _, kept, _ in recoveries(found)} == {"base": 1.0, "m": 0.5, "held": 1.0, "n": 0.5}
    pytest.importorskip("matplotlib", reason="NO MATPLOTLIB, so no figure was drawn: pip install 'fewbit[report]'")
    assert "of no known quality beside a base, so not here: other" in figures._recovery(found).words


def test_different_counts_of_tasks_are_one_scale(tmp_path):
    task = {"accuracy": 0.5, "paired": {"recovery": 0.5, "recovery_low": 0.25, "recovery_high": 0.75}}
    tasks = {"a": {"tasks": {"t": task}}, "b": {"tasks": {"t": task, "u": task, "v": task}}}
    objects = [one for name, more in tasks.items() for one in (sized(name, name, 4.25), evaluated(name, 1, **more))]
    found = collect(written(tmp_path, *objects))
    pytest.importorskip("matplotlib", reason="NO MATPLOTLIB, so no figure was drawn: pip install 'fewbit[report]'")
    assert figures._recovery(found).words.startswith("Mean over tasks of model / base (tasks: 1 to 3). Filled")
    (tmp_path / "both.json").write_text(json.dumps(evaluated("c", 0.5)))
    (tmp_path / "row.json").write_text(json.dumps(sized("c", "c", 8.0)))
    words = figures._recovery(collect(tmp_path)).words
    assert words.startswith("Mean over tasks of model / base (tasks: 1 to 3); without tasks, so not here: c. Filled")


def test_rows_of_two_devices_are_told_apart(tmp_path):
    failed = {"model": "m", "batch": 2, "input": 8, "output": 2, "failed": "no room"}
    found = collect(
        written(
            tmp_path, sized("m", "m", 4.25, device="x"), sized("m", "m", 4.25, device="y"),
            evaluated("m", 0.5, "x"), evaluated("m", 0.25, "y"),
            {"command": "bench offline", "key": {"device": "y"}, "cells": [failed]},
            *({"command": "eval", "label": "m", "key": {"device": on}, "failed": "gone"} for on in ("x", "y")),
        )
    )  # fmt: skip
    assert set(lines(found.cells)) == {"m, x", "m, y"}
    assert {name: kept for name, _, kept, _ in recoveries(found)} == {"m, x": 0.5, "m, y": 0.25}
    gone = [("m, quality, x", "gone"), ("m, quality, y", "gone")]
    assert sorted(found.failed) == [("m, 2 x 8 + 2, y", "no room"), *gone]


def test_a_failure_that_a_later_row_made_good_is_over(tmp_path):
    sizes = {"path": "m", "config": None, "input": 8, "output": 2}
    for number, (batch, date) in enumerate(((1, "2026-01-01"), (2, "2026-01-03"), (4, None))):
        cell = sizes | {"model": "m", "batch": batch}
        lost = cell | {"failed": f"lost {batch}", "environment": {"device": "x", "date": date}}
        good = cell | {"tokens_per_s": 1.0, "environment": {"device": "x", "date": "2026-01-02"}}
        for name, one in (("a", lost), ("b", good)):
            (tmp_path / f"{number}{name}.json").write_text(json.dumps({"command": "bench offline", "cells": [one]}))
    found = collect(tmp_path)
    assert found.failed == [("m, 2 x 8 + 2, x", "lost 2")]
    assert len(found.cells) == 3


def test_a_speed_up_is_over_the_base_in_the_same_sizes_on_the_same_device(tmp_path):
    fixed = {"config": None, "batch": 1, "output": 2, "peak_bytes": 2**30, "first_token_s": 1.0, "per_token_s": 1.0}
    cells = [
        fixed | {"model": name, "bits_per_weight": bits, "input": size, "tokens_per_s": speed,
                 "environment": {"device": device}}
        for name, bits, size, device, speed in (
            ("base", 16, 8, "x", 10.0), ("base", 16, 9, "x", 20.0), ("base", 16, 8, "y", 40.0),
            ("small", 4, 8, "x", 15.0), ("small", 4, 9, "x", 50.0), ("small", 4, 8, "y", 44.0),
        )
    ]  # fmt: skip
    (tmp_path / "rows.json").write_text(json.dumps({"command": "bench offline", "cells": cells}))
    text = page.page(collect(tmp_path), [], "title")
    for size, device, speed_up in ((8, "x", "1.50"), (9, "x", "2.50"), (8, "y", "1.10")):
        row = next(r for r in text.split("<tr>") if f"small, {size} + 2, {device}" in r)
        assert f"<td>{speed_up}</td>" in row


def test_each_shape_of_random_weights_has_its_own_speed_ups(tmp_path):
    rows = [
        sized("BF16", None, bits, model=None, recipe=recipe, config=config, tokens_per_s=speed)
        for config, speeds in (("one", (10.0, 15.0)), ("two", (20.0, 50.0)))
        for bits, recipe, speed in zip((16.0, 4.25), (None, "int4"), speeds, strict=True)
    ]
    text = page.page(collect(written(tmp_path, *rows)), [], "title")
    for config, speed_up in (("one", "1.50"), ("two", "2.50")):
        assert f"<td>{speed_up}</td>" in next(r for r in text.split("<tr>") if f"int4, {config}" in r)
    assert "Speed-up over BF16, in the same sizes" in text


def test_tasks_of_lm_eval_and_the_gauntlet_are_tables(tmp_path):
    one = {
        "command": "eval", "model": "m", "tasks": {},
        "gauntlet": {"categories": {"world": 0.25}, "score": 0.125, "complete": False, "missing": {},
                     "base": {"categories": {"world": 0.5}, "score": 0.375, "complete": False}},
        "lm_eval": {"version": "0.4", "cut_prompts": 0, "tasks": {"arc_easy": {
            "metrics": {"acc,none": 0.75, "acc_stderr,none": 0.0625}, "intervals": {"acc,none": [0.5, 0.875]},
            "base": {"metrics": {"acc,none": 0.8125}}}}},
    }  # fmt: skip
    (tmp_path / "eval.json").write_text(json.dumps(one))
    text = page.page(collect(tmp_path), [], "title")
    assert "<td>world</td><td>0.2500</td><td>0.5000</td>" in text
    assert "not the published composite</td><td>0.1250</td><td>0.3750</td>" in text
    assert "<td>acc,none</td><td>0.7500</td><td>0.5000 to 0.8750</td><td>0.8125</td>" in text
    assert "stderr" not in text


def test_the_page_stands_alone(run, capsys):
    pytest.importorskip("matplotlib", reason="NO MATPLOTLIB, so no report was drawn: pip install 'fewbit[report]'")
    assert cli.run(["report", str(run), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert set(said["figures"]) == {
        "throughput", "tpot", "ttft", "tradeoff", "mbu", "latency_cdf", "layer_error_0", "recovery",
    }  # fmt: skip
    assert said["left_out"] == {"Tasks won and lost": "no tasks of eval against a base"}
    for file in said["figures"].values():
        assert Path(file).read_bytes().startswith(b"\x89PNG")
    text = Path(said["html"]).read_text()
    page = Page(text)
    assert page.open == []
    assert page.asked == []
    assert not re.search(r"url\((?!#)|@import|<script", text)
    assert len(page.ids) == len(set(page.ids))
    assert {use[1:] for use in page.used} <= set(page.ids)
    assert text.count('<svg role="img" aria-label="') == 8
    assert "currentColor" in text
    assert "#010203" not in text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert "no &lt;room&gt;" in text
    assert "(stopped early)" in text
    for words in ("d" * 64, "Tasks won and lost: no tasks of eval", "cut.json, strange.json", "80.0%"):
        assert words in text


def test_a_report_of_nothing_is_one_line(tmp_path, capsys):
    for folder, said in ((tmp_path / "gone", "no such folder"), (tmp_path, "holds no results")):
        assert cli.run(["report", str(folder)]) == 2
        ended = capsys.readouterr()
        assert said in ended.err
        assert (ended.out, ended.err.count("\n")) == ("", 1)

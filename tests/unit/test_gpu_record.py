"""Kernels do not change in silence: the newest record of a GPU names them, or the page of performance says why not."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import digest

ROOT = Path(__file__).resolve().parents[2]


def records() -> list[dict]:
    found = [json.loads(file.read_text("utf8")) for file in (ROOT / "benchmarks" / "results").glob("*.json")]
    return sorted(found, key=lambda record: record["date"])


def test_every_record_is_whole():
    assert records()
    for record in records():
        assert record.keys() >= {"gpu", "commit", "ops", "date", "versions", "commands", "tests", "cells"}
        assert record["tests"]["passed"] > 100
        for cell in record["cells"]:
            assert cell["tokens_per_s"] > 0
            assert cell["difference"] < 0.25


def test_the_kernels_are_those_of_a_record_or_the_page_says_why():
    page = (ROOT / "docs" / "performance.md").read_text("utf8")
    told = dict(re.findall(r"^\| `([0-9a-f]{12})` \| (\S.*) \|$", page, re.MULTILINE))
    now = digest.ops_digest()
    assert now in {record["ops"] for record in records()} | told.keys(), (
        f"ops/ has changed since the last record (digest {now}): run benchmarks/gpu_run.py on a GPU, or give the "
        "reason in docs/performance.md under 'Kernels since the record'"
    )


def test_the_digest_sees_a_change(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(digest, "OPS", tmp_path)
    before = digest.ops_digest()
    (tmp_path / "a.py").write_text("x = 2\n")
    assert digest.ops_digest() != before

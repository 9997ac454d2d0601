"""The words of long work: how far a stage is, and when it will be done."""

from __future__ import annotations

from types import SimpleNamespace

from fewbit.cli import common


def test_a_stage_that_begins_anew_is_timed_anew(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(common, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(common.settings, "quiet", False)
    bars = common.ProgressBars()
    bars("windows", 0, 4)
    now = 1000.0
    bars("windows", 4, 4)
    bars("windows", 0, 10)  # of another model
    now = 1020.0
    bars("windows", 2, 10)
    assert "windows: 2 of 10 after 1020 s, about 80 s left" in capsys.readouterr().err

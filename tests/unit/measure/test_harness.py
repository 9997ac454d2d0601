"""What becomes of the samples that lm-evaluation-harness logs. The harness itself: tests/clients/test_lm_eval.py."""

from __future__ import annotations

import math

import pytest

from fewbit.cli.scores import show
from fewbit.measure.tasks.harness import harness_report, scores_of

METRICS = {"exact_match,strict": 0.25, "exact_match,flexible": 0.75, "word_perplexity,none": math.exp(2.0)}


def logged(strict: list[int], flexible: list[int]) -> list[dict]:
    """The samples of a task with two filters and a metric that is no mean, as the harness logs them."""
    found = []
    for number, (a, b) in enumerate(zip(strict, flexible, strict=True)):
        found += [
            {"doc_id": number, "filter": "strict", "metrics": ["exact_match"], "exact_match": a},
            {"doc_id": number, "filter": "flexible", "metrics": ["exact_match"], "exact_match": b},
            {"doc_id": number, "filter": "none", "metrics": ["word_perplexity"], "word_perplexity": -2.0},
        ]
    return found


def run_of(strict: list[int], flexible: list[int]) -> dict:
    metrics = METRICS | {"exact_match,strict": sum(strict) / 4, "exact_match,flexible": sum(flexible) / 4}
    scores = {"sums": scores_of(logged(strict, flexible), metrics)}
    return {"version": "0", "cut": 0, "shots": {}, "results": {"sums": metrics}, "scores": scores}


def test_every_filter_has_its_own_scores_and_a_perplexity_none():
    found = scores_of(logged([1, 0, 0, 0], [1, 1, 1, 0]), METRICS)
    assert found == {
        "exact_match,strict": {0: 1, 1: 0, 2: 0, 3: 0},
        "exact_match,flexible": {0: 1, 1: 1, 2: 1, 3: 0},
    }


def test_intervals_and_differences_are_those_of_the_metric_they_stand_by(capsys):
    model, base = run_of([1, 0, 0, 0], [1, 1, 1, 0]), run_of([1, 1, 0, 0], [1, 1, 1, 1])
    made = harness_report(model, base)
    found = made["tasks"]["sums"]
    assert found["intervals"].keys() == found["paired"].keys() == {"exact_match,strict", "exact_match,flexible"}
    for name, pair in found["paired"].items():
        assert pair["model"] == found["metrics"][name]
        assert pair["base"] == found["base"]["metrics"][name]
        low, high = found["intervals"][name]
        assert low <= pair["model"] <= high
    assert found["paired"]["exact_match,strict"]["difference"] == pytest.approx(-0.25)
    show({"lm_eval": made})
    (strict,) = [line for line in capsys.readouterr().out.splitlines() if "strict" in line]
    assert "0.2500" in strict
    assert "0.5000" in strict

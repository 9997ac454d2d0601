"""The parts of the page that compute, against other ways to compute the same."""

from __future__ import annotations

import random

import pytest
from prometheus_client.parser import text_string_to_metric_families
from serve_names import models_of

from fewbit.serve import create_app

pytestmark = pytest.mark.slow

DIFFERENCE = """
async ([a, b]) => {
  const { difference } = await import("/page/compare.js");
  const keyed = (text) => [...text].map((key) => ({ key }));
  const { same, only, aligned } = difference(keyed(a), keyed(b));
  return [same, [...only[0]], [...only[1]], aligned];
}
"""
FIGURES = """
async () => {
  const { Answer } = await import("/page/answer.js");
  let now = 1000;
  performance.now = () => now;
  const answer = new Answer("storyteller");
  const figures = () => {
    answer.show();
    const rows = [...answer.figures.children];
    return Object.fromEntries(rows.map((row) => [row.dataset.figure, row.lastChild.textContent]));
  };
  const seen = [];
  const take = (at, delta, more = {}) => {
    now = at;
    answer.take({ choices: [{ delta, finish_reason: null, ...more }] });
    seen.push(figures());
  };
  take(1040, { role: "assistant", content: "" });
  take(1120, { content: "un" });
  take(1170, { content: " deux" });
  take(1220, { content: " trois" }, { finish_reason: "length" });
  now = 5000;
  const usage = { prompt_tokens: 1200, completion_tokens: 5, prompt_tokens_details: { cached_tokens: 1024 } };
  answer.take({ choices: [], usage });
  answer.settle("complete");
  return [...seen, figures()];
}
"""
PARSED = """
async (text) => {
  const { parse } = await import("/page/prometheus.js");
  return [...parse(text)].map(([name, samples]) => [name, samples.map(({ labels, value }) => [labels, String(value)])]);
}
"""


def longest_common(a, b):
    """Length of the longest run of characters that both have in the same order."""
    row = [0] * (len(b) + 1)
    for x in a:
        before = row
        row = [0]
        for j, y in enumerate(b):
            row.append(before[j] + 1 if x == y else max(before[j + 1], row[j]))
    return row[-1]


def test_differences(visit, url):
    page, rng = visit(url), random.Random(0)
    pairs = [("", ""), ("ab", "ab"), ("ab", ""), ("abc", "ab"), ("abcd", "axcd"), ("the cat sat", "the black cat sat")]
    pairs += [["".join(rng.choices("abc", k=rng.randrange(30))) for _ in "ab"] for _ in range(200)]
    for a, b in pairs:
        same, only_a, only_b, aligned = page.evaluate(DIFFERENCE, [a, b])
        assert aligned
        assert a[:same] == b[:same]
        assert same == min(len(a), len(b)) or a[same] != b[same]
        common = ["".join(c for c, only in zip(t, o, strict=True) if not only) for t, o in ((a, only_a), (b, only_b))]
        assert common[0] == common[1]
        assert len(common[0]) == longest_common(a, b)


def test_figures(visit, url):
    """Sent at 0, pieces at 120, 170 and 220 ms; then the server says that these were five tokens."""
    assert visit(url).evaluate(FIGURES) == [
        {"ttft": "40 ms …", "speed": "–", "count": "~0"},
        {"ttft": "120 ms", "speed": "–", "count": "~1"},
        {"ttft": "120 ms", "speed": "20.0", "count": "~2"},
        {"ttft": "120 ms", "speed": "20.0", "count": "~3"},
        {
            "ttft": "120 ms",
            "speed": "40.0",
            "count": "5",
            "prompt": "1,200, 1,024 of them cached",
            "end": "cut at max tokens",
        },
    ]


def test_answers_that_are_too_long_to_align(visit, url):
    same, only_a, only_b, aligned = visit(url).evaluate(DIFFERENCE, ["ab" + "c" * 5000, "a" + "c" * 5000])
    assert not aligned
    assert same == 1
    assert (sum(only_a), sum(only_b)) == (2, 1), "each token against the one at its own place"


def test_metrics_are_read_as_prometheus_reads_them(visit, serve, engines, tokenizer):
    odd = 'a "quoted" name\\with\nall, {of} = it'
    app = create_app(models_of(tokenizer, **engines, **{odd: engines["storyteller"]}))
    page = visit(serve(app))
    text = page.evaluate("fetch('/metrics').then((r) => r.text())")
    expected = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            expected.setdefault(sample.name, []).append([sample.labels, sample.value])
    found = {name: [[labels, float(v)] for labels, v in samples] for name, samples in page.evaluate(PARSED, text)}
    assert found == expected
    assert odd in {labels["model_name"] for labels, _ in found["fewbit:engine_up"]}

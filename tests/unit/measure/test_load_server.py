"""The load generator on fewbit's own server: what it counts is what the server counts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.request

import pytest

from fewbit.cli import run
from fewbit.demo import demo_model
from fewbit.errors import CheckpointError


@pytest.fixture(scope="module")
def server():
    try:
        model = demo_model()
    except CheckpointError as error:
        pytest.skip(f"NO STORYTELLER, so no server was started: {error}")
    words = [sys.executable, "-m", "fewbit.cli", "serve", str(model), "--port", "0"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=os.environ)
    try:
        url = next(found[0] for line in process.stderr if (found := re.search(r"http://\S+", line)))
        yield model, url
    finally:
        process.terminate()
        process.wait(120)


def counter(url: str, name: str) -> float:
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        text = answer.read().decode()
    return sum(float(line.split()[-1]) for line in text.splitlines() if re.match(rf"{name}(\{{|\s)", line))


def loaded(capsys, url: str, model, *words: str) -> dict:
    assert run(["bench", "serve", url, "--tokenizer", str(model), "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_closed_loop_counts_what_the_server_counts(server, capsys):
    model, url = server
    before = counter(url, "fewbit:generation_tokens_total")
    lengths = ["--input-len", "40", "--output-len", "24", "--num-warmups", "0", "--num-prompts", "24"]
    made = loaded(capsys, url, model, *lengths, "--concurrency", "8")
    assert (made["completed"], made["failed"]) == (24, 0)
    assert made["total_output_tokens"] == 24 * 24 == counter(url, "fewbit:generation_tokens_total") - before
    assert made["total_input_tokens"] == 24 * 40
    assert made["tokens"]["counted_by"] == {"usage": 24}
    assert made["tokens"]["input_mismatches"] == made["tokens"]["shorter_than_asked"] == 0
    assert made["max_concurrent_requests"] == 8
    assert 0 < made["median_ttft_ms"] < made["median_e2el_ms"]
    assert made["mean_e2el_ms"] == pytest.approx(made["mean_ttft_ms"] + 23 * made["mean_tpot_ms"], rel=0.01)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_open_loop_and_the_same_server_twice(server, capsys, tmp_path):
    model, url = server
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"Once upon a time there were {n} mice"}) for n in range(12)))
    data = ["--dataset-name", "jsonl", "--dataset-path", str(path), "--output-len", "12", "--num-prompts", "12"]
    made = loaded(capsys, url, model, *data, "--request-rate", "4", "--compare", url, "--repeats", "2")
    assert made["completed"] == made["compared"]["completed"] == 12
    assert made["duration"] > 12 / 4
    # the same server twice is as fast as itself, as far as an open loop can tell, and a machine that is busy
    assert 1 / 3 < made["ratios"]["request_throughput"]["ratio"] < 3
    assert made["median_schedule_lag_ms"] >= 0

"""`fewbit bench serve` as a user meets it, against a stub in another thread."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading

import pytest
from stub_server import Script, answer, stub_server

from fewbit.cli import run

VLLM = {
    "date", "backend", "label", "model_id", "tokenizer_id", "num_prompts", "request_rate", "burstiness",
    "max_concurrency", "duration", "completed", "failed", "total_input_tokens", "total_output_tokens",
    "request_throughput",
    "request_goodput", "output_throughput", "total_token_throughput", "max_output_tokens_per_s",
    "max_concurrent_requests",
    *(f"{what}_{name}_ms" for what in ("mean", "median", "std", "p99") for name in ("ttft", "tpot", "itl", "e2el")),
    "input_lens", "output_lens", "ttfts", "itls", "start_times", "generated_texts", "errors",
}  # fmt: skip
"""What `vllm bench serve --save-result --save-detailed` writes."""
AIPERF = {
    "time_to_first_token", "time_to_second_token", "inter_token_latency", "inter_chunk_latency", "request_latency",
    "request_throughput", "output_token_throughput", "output_token_throughput_per_user", "output_sequence_length",
    "input_sequence_length", "request_count", "benchmark_duration", "goodput",
}  # fmt: skip


@pytest.fixture
def stub():
    """A server that answers three words in 20 ms; its third request fails."""
    yield from _served(lambda n, body: Script([], status=500) if n == 2 else Script(answer(0.01, [0.005, 0.005])))


@pytest.fixture
def stopping_stub():
    """A server that answers three requests, and presses Ctrl-C at the fourth."""

    def script(n: int, body: object) -> Script:
        if n == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return Script(answer(4.0 if n == 3 else 0.01, [0.005, 0.005]))

    yield from _served(script)


def _served(script):
    ready, over, found = threading.Event(), None, []

    async def main() -> None:
        nonlocal over
        over = asyncio.Event()
        async with stub_server(script) as made:
            found.extend([made, asyncio.get_running_loop()])
            ready.set()
            await over.wait()

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    assert ready.wait(30)
    yield found[0]
    found[1].call_soon_threadsafe(over.set)
    thread.join(60)
    assert not thread.is_alive()


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"word {i}"}) for i in range(8)))
    return ["--dataset-name", "jsonl", "--dataset-path", str(path), "--num-warmups", "0", "--num-prompts", "6"]


def test_the_object_is_a_superset_of_vllms(stub, prompts, tmp_path, capsys):
    out = tmp_path / "r.json"
    goal = ["--goodput", "ttft_ms=50000,e2el_ms=90000", "--save-detailed", "-o", str(out)]
    assert run(["bench", "serve", stub.url, *prompts, "--concurrency", "2", *goal, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made == json.loads(out.read_text())
    assert not VLLM - made.keys()
    assert not AIPERF - made["aiperf"].keys()
    assert (made["completed"], made["failed"], made["model_id"]) == (5, 1, "stub")
    assert made["result_schema"] == "fewbit.bench.serve/1"
    assert made["request_rate"] == "inf"
    assert made["request_goodput"] == pytest.approx(5 / made["duration"])
    assert made["failures"] == [{"reason": "HTTP 500: (an empty body)", "requests": 1}]
    assert len(made["dataset"]["sha256"]) == 64
    assert made["environment"]["python"]


def test_the_table_and_what_is_remarked(stub, prompts, capsys):
    assert run(["bench", "serve", stub.url, *prompts, "--request-rate", "inf", "--max-concurrency", "3"]) == 0
    printed = capsys.readouterr()
    assert "5 answered, 1 failed" in printed.out
    assert "6 x jsonl, open loop, inf requests/s, burstiness 1.0, 3 at a time at most" in printed.out
    assert "end to end, from schedule" in printed.out
    assert "failed: 1 x HTTP 500" in printed.err


def test_two_servers(stub, prompts, capsys):
    assert run(["bench", "serve", stub.url, "--compare", stub.url, *prompts, "--repeats", "2", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["compared"]["completed"] == 6
    assert len(made["ratios"]["output_throughput"]["values"]) == 2
    assert len(stub.seen) == 24


def test_a_server_that_answers_nothing(stub, prompts, capsys):
    stub.script = lambda n, body: Script([(0, b'{"error": "full"}')], status=429)
    assert run(["bench", "serve", stub.url, *prompts]) == 2
    assert "no request was answered; 6 of them: HTTP 429: full" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--concurrency", "2", "--request-rate", "3"], "--concurrency makes a closed loop"),
        (["--max-concurrency", "2"], "--max-concurrency bounds an open loop"),
        (["--request-rate", "3", "--ramp-up", "linear:1:2"], "both say the rate"),
        (["--ramp-up", "linea:1:2"], "expected linear:FROM:TO"),
        (["--ramp-up", "linear:0:2"], "expected rates above 0"),
        (["--request-rate", "0"], "expected numbers above 0"),
        (["--burstiness", "2"], "--burstiness shapes an open loop"),
        (["--input-len", "5"], "--input-len means nothing to data set jsonl"),
        (["--time-scale", "2"], "--time-scale means nothing to data set jsonl"),
        (["--gpu", "h100"], "give --model-dir"),
        (["--endpoint", "chats"], "did you mean 'chat'"),
        (["--extra-body", "[1]"], "expected a JSON object"),
        (["--metric-percentiles", "50,101"], "expected numbers from 0 to 100"),
        (["--goodput", "x=1"], "no figure 'x'"),
        (["-o", "/missing/r.json"], "there is no folder"),
        (["--dataset-name", "jsonll"], "did you mean 'jsonl'"),
    ],
)
def test_settings_that_make_no_sense(words, says, prompts, capsys):
    assert run(["bench", "serve", "127.0.0.1:1", *prompts, *words]) == 2
    assert says in capsys.readouterr().err


def test_nobody_there(prompts, capsys):
    assert run(["bench", "serve", "127.0.0.1:1", *prompts]) == 2
    assert "cannot connect to 127.0.0.1:1 (Connection refused); is a server running there?" in capsys.readouterr().err


@pytest.mark.parametrize("loop", [("--concurrency", "1"), ("--request-rate", "20", "--max-concurrency", "1")])
def test_ctrl_c_keeps_what_was_answered(stopping_stub, prompts, tmp_path, capsys, loop):
    out = tmp_path / "r.json"
    words = [*prompts, *loop, "--repeats", "2", "--save-detailed", "-o", str(out)]
    assert run(["bench", "serve", stopping_stub.url, *words]) == 130
    made = json.loads(out.read_text())
    assert made["stopped"] is True
    assert (made["num_prompts"], made["completed"], made["failed"]) == (3, 3, 0)
    assert len(made["ttfts"]) == len(made["errors"]) == 3
    assert made["total_output_tokens"] == 9
    ended = capsys.readouterr()
    assert "stopped" in ended.out
    assert "the figures are of the 3 requests that were over" in ended.err
    assert "Traceback" not in ended.err

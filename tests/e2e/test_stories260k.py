"""Real trained weights all the way: converted, compressed, served over HTTP, and held to the text they must write."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from fewbit import cli
from fewbit.checkpoint import open_checkpoint
from fewbit.engine.config import EngineOptions
from fewbit.engine.engine import generate, open_engine
from fewbit.engine.types import GenerateRequest, SamplingParams
from fewbit.text.tokenizer import Tokenizer
from independent_decoder import decode
from stories260k import GREEDY, convert

SERVED = ("fp8", "fp8_dynamic", "int8", "int8_wo")
GROUPS = """
rules:
  - {match: "*.mlp.down", weight: int8_row}
  - {match: "layers.*", weight: int4_g32}
"""
PROMPT = "Once upon a time, there was a big red dog who lived in a small house with a girl named Lily and her mom."


@pytest.fixture(scope="module")
def stories(shared_data, tmp_path_factory) -> Path:
    return convert(shared_data / "models" / "stories260K", tmp_path_factory.mktemp("stories") / "stories260K")


@pytest.fixture(scope="module")
def compressed(stories, tmp_path_factory):
    """`compressed(recipe)` gives the directory, each made once by the command."""
    done: dict[str, Path] = {}

    def make(recipe: str) -> Path:
        if recipe not in done:
            out = tmp_path_factory.mktemp("small") / recipe
            line = ["compress", str(stories), "--recipe", recipe, "-o", str(out), "-q", "--sample-tokens", "0"]
            assert cli.run([*line, "--samples", "4", "--length", "128"]) == 0
            done[recipe] = out
        return done[recipe]

    return make


@contextmanager
def serving(model: Path, *options: str) -> Iterator[httpx.Client]:
    """`fewbit serve` as a user starts it, on a free port; a client of it."""
    line = [sys.executable, "-m", "fewbit.cli", "serve", str(model), "--port", "0", *options]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        url = None
        for said in process.stderr:
            if found := re.search(r"http://[\d.:]+", said):
                url = found[0]
                break
        assert url, "it never said where"
        threading.Thread(target=process.stderr.read, daemon=True).start()
        with httpx.Client(base_url=url, timeout=300) as client:
            assert client.get("/health").status_code == 200
            yield client
        process.send_signal(signal.SIGTERM)
        assert process.wait(300) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def greedy(model: Path, text: str, count: int) -> str:
    """The continuation by an engine in this process."""
    tokenizer = Tokenizer.load(model)
    engine = open_engine(model, EngineOptions(max_batch=1, num_blocks=32))
    params = SamplingParams(max_tokens=count, temperature=0.0)
    (output,) = generate(engine, [GenerateRequest(id="a", prompt=tuple(tokenizer.encode(text)), params=params)])
    return tokenizer.decode([*tokenizer.encode(text), *output.tokens])


def test_greedy_text_is_the_published_one(stories, capsys):
    assert open_checkpoint(stories).dtype.itemsize == 2  # BF16
    engine = open_engine(stories, EngineOptions(max_batch=1, num_blocks=32))
    params = SamplingParams(max_tokens=120, temperature=0.0)
    (output,) = generate(engine, [GenerateRequest(id="a", prompt=(1,), params=params)])
    assert Tokenizer.load(stories).decode(output.tokens).startswith(GREEDY)
    line = ["run", str(stories), "--prompt", "Once upon a time", "--max-tokens", "100", "--temperature", "0", "-q"]
    assert cli.run(line) == 0
    assert ("Once upon a time" + capsys.readouterr().out).startswith(GREEDY)


@pytest.mark.parametrize("recipe", [pytest.param(r, marks=[pytest.mark.slow] * (r != "fp8")) for r in SERVED])
def test_compressed_and_served(recipe, stories, compressed):
    model = compressed(recipe)
    expected = greedy(model, "Once upon a time", 60).removeprefix("Once upon a time")
    with serving(model, "--name", "stories") as client:
        body = {"model": "stories", "prompt": "Once upon a time", "max_tokens": 60, "temperature": 0}
        whole = client.post("/v1/completions", json=body).json()
        assert whole["choices"][0]["text"] == expected
        assert whole["usage"]["completion_tokens"] == 60
        text = ""
        with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
            for row in response.iter_lines():
                if row.startswith("data: {"):
                    text += json.loads(row[6:])["choices"][0]["text"]
        assert text == expected
        body = {
            "text_input": "Once upon a time",
            "parameters": {"max_tokens": 60, "bad_words": [""], "stop_words": [""]},
        }
        answer = client.post("/v2/models/ensemble/generate", content=json.dumps(body)).json()
        assert answer["text_output"].startswith("Once upon a time")
    assert expected.startswith(", there was a little ")  # eight bits still know how stories begin
    theirs = decode(model)
    checkpoint = open_checkpoint(model)
    for i in range(len(checkpoint.spec.layers)):
        mine = checkpoint.tensors[f"layers.{i}.mlp.down.weight"].dequantize()
        assert mine.equal(theirs[f"model.layers.{i}.mlp.down_proj.weight"])


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        ("int4", "layers.0.attn.q: 64 columns do not divide into blocks of 128 (int4_g128)"),
        ("nvfp4", "layers.0.mlp.down: 172 columns do not divide into blocks of 16 (nvfp4)"),
        ("mxfp4", "layers.0.mlp.down: 172 columns do not divide into blocks of 32 (mxfp4)"),
    ],
)
def test_widths_that_do_not_divide_name_the_layer(recipe, sentence, stories, tmp_path, capsys):
    assert cli.run(["compress", str(stories), "--recipe", recipe, "-o", str(tmp_path / "out"), "-q"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"fewbit: {sentence}; give this layer a format with smaller groups")
    assert not (tmp_path / "out").exists()


def test_a_recipe_of_ones_own_for_those_widths(stories, tmp_path, capsys):
    (tmp_path / "groups.yaml").write_text(GROUPS)
    line = ["compress", str(stories), "--recipe", str(tmp_path / "groups.yaml"), "-o", str(tmp_path / "out"), "--json"]
    assert cli.run([*line, "-q"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 4.5 < found["verified"]["bits_per_weight"] < 6.5
    kinds = {n.rpartition(".")[2]: str(q.weight) for n, q in open_checkpoint(tmp_path / "out").quant.items()}
    assert kinds == dict.fromkeys(("q", "k", "v", "o", "gate", "up"), "int4_g32") | {"down": "int8_row"}
    assert greedy(tmp_path / "out", "Once upon a time", 8).startswith("Once upon a time, there was a")
    decode(tmp_path / "out")


def test_a_request_that_comes_later_need_not_wait(stories):
    """Over HTTP: its first token is there before the one that was decoding has ended.

    Once is enough: one that had to wait would never be there before. And more is chance, where this process comes to
    asking for the second only when the first has ended.
    """
    with serving(stories, "--name", "s") as client:
        times: dict[str, list[float]] = {}
        begun = threading.Event()

        def ask(name: str, count: int) -> None:
            body = {"model": "s", "prompt": PROMPT, "max_tokens": count, "temperature": 0, "stream": True}
            body["ignore_eos"] = True
            with client.stream("POST", "/v1/completions", json=body) as response:
                assert response.status_code == 200, response.read()
                for row in response.iter_lines():
                    if row.startswith("data: {"):
                        times[name].append(time.monotonic())
                        begun.set()

        for _ in range(10):
            times |= {"first": [], "second": []}
            begun.clear()
            long = threading.Thread(target=ask, args=("first", 400))
            long.start()
            assert begun.wait(300)
            ask("second", 3)
            long.join()
            assert len(times["first"]) > 100
            if times["second"][-1] < times["first"][-1]:
                break
        assert times["first"][0] < times["second"][0] < times["second"][-1] < times["first"][-1]


def test_a_request_that_comes_later_need_not_wait_in_the_engine(stories):
    engine = open_engine(stories, EngineOptions(num_blocks=64))
    tokenizer = Tokenizer.load(stories)
    params = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    engine.submit(GenerateRequest(id="long", prompt=tuple(tokenizer.encode("Lily")), params=params))
    for _ in range(5):
        engine.step()
    engine.submit(GenerateRequest(id="late", prompt=tuple(tokenizer.encode(PROMPT)), params=params))
    seen = []
    while engine.has_work:
        seen += [(e.id, e.ending is not None) for e in engine.step()]
    assert seen.index(("late", False)) < seen.index(("long", True))
    assert seen.index(("late", False)) <= 2


@pytest.mark.parametrize("length", [33, 40, 47, 48, 49])
def test_a_prompt_that_comes_again_computes_only_its_last_block(stories, length):
    engine = open_engine(stories, EngineOptions(num_blocks=64, block_size=16))
    prompt = tuple((Tokenizer.load(stories).encode(PROMPT) * 3)[:length])
    computed, answers = [], []
    for name in ("once", "again"):
        before = engine.runner.computed_tokens
        params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=3)
        answers += generate(engine, [GenerateRequest(id=name, prompt=prompt, params=params)])
        computed.append(engine.runner.computed_tokens - before)
    last = length % 16 or 16
    assert computed == [length, last]
    assert engine.stats().computed_tokens_total == length + last
    assert [a.ending.cached_tokens for a in answers] == [0, length - last]
    assert (answers[0].tokens, answers[0].logprobs) == (answers[1].tokens, answers[1].logprobs)

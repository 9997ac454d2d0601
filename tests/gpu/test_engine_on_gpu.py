"""The engine on a GPU gives the CPU's answers, teacher-forced: a tie may fall the other way, nothing else may."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "engine"))

from tiny_engine import engine, request

from fewbit.demo import demo_model
from fewbit.engine import score
from fewbit.engine.config import EngineOptions
from fewbit.engine.engine import Engine, generate, open_engine
from fewbit.engine.gpu import GpuRunner
from fewbit.engine.runner import free_bytes
from fewbit.text import Tokenizer, grammar

PROMPTS = [[5, 9, 1, 40], list(range(1, 23)), [7], [11, 12] * 9, list(range(1, 20))]


@pytest.mark.parametrize("kv", ["float32", "bfloat16", "int8", "fp8"])
@pytest.mark.parametrize(
    "options",
    [{"max_batch_tokens": 64}, {"max_batch_tokens": 8}, {"num_blocks": 13}, {"block_size": 16, "num_blocks": 8}],
)
def test_answers_are_those_of_the_cpu(kv, options):
    on_cpu = generate(engine(kv), [request(p, max_tokens=20, logprobs=2) for p in PROMPTS])
    cases = [
        (output.tokens[i], output.logprobs[i].top, [*prompt, *output.tokens[:i]])
        for prompt, output in zip(PROMPTS, on_cpu, strict=True)
        for i in range(20)
    ]
    machine = engine(kv, "cuda:0", **options)
    on_gpu = generate(machine, [request(tokens, max_tokens=1) for _, _, tokens in cases])
    differing = [
        (best[1] - second[1], expected, got.tokens[0])
        for (expected, (best, second), _), got in zip(cases, on_gpu, strict=True)
        if got.tokens[0] != expected
    ]
    assert len(differing) <= 0.02 * len(cases)
    assert all(gap < 0.25 for gap, _, _ in differing), differing
    machine.scheduler.check()


def test_sampling_penalties_and_logprobs_run_on_a_gpu():
    machine = engine(device="cuda:0", max_batch_tokens=8)
    params = {
        "temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "seed": 4, "logprobs": 3, "max_tokens": 12,
        "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.5, "bad_words": ((9,), (1, 2)),
    }  # fmt: skip
    first, second = (generate(machine, [request(p, **params) for p in PROMPTS]) for _ in range(2))
    assert [o.tokens for o in first] == [o.tokens for o in second]
    on_cpu = generate(engine(), [request(p, **params) for p in PROMPTS])
    same = sum(a.tokens == b.tokens for a, b in zip(first, on_cpu, strict=True))
    assert same >= 4, "the same seed draws the same tokens where the logits are the same"


@pytest.mark.parametrize("options", [{"max_batch_tokens": 64}, {"max_batch_tokens": 8}, {"num_blocks": 13}])
def test_prompts_are_looked_up_on_a_gpu(options):
    machine = engine(device="cuda:0", **options)
    asked = {"prompt_logprobs": 2, "max_tokens": 4}
    found = generate(machine, [request(p, **asked) for p in PROMPTS])
    expected = generate(engine(), [request(p, **asked) for p in PROMPTS])
    for mine, theirs in zip(found, expected, strict=True):
        assert len(mine.prompt_logprobs) == len(theirs.prompt_logprobs)
        for a, b in zip(mine.prompt_logprobs, theirs.prompt_logprobs, strict=True):
            assert a.chosen == pytest.approx(b.chosen, abs=0.05)
            assert [v for _, v in a.top] == pytest.approx([v for _, v in b.top], abs=0.05)
    only = generate(machine, [request(p, prompt_logprobs=0, max_tokens=0) for p in PROMPTS])
    assert [o.ending.reason for o in only] == ["length"] * len(PROMPTS)
    for mine, theirs in zip(only, expected, strict=True):
        values = [x.chosen for x in theirs.prompt_logprobs]
        assert [x.chosen for x in mine.prompt_logprobs] == pytest.approx(values, abs=0.05)


@pytest.fixture(scope="module")
def story():
    """`story(device, **options)`: the storyteller, on a GPU with its own kernels and graphs."""
    opened = {}

    def make(device: str, **options) -> Engine:
        if device not in opened:
            opened[device] = open_engine(demo_model(), EngineOptions(device=device, num_blocks=64, max_batch=16))
        first = opened[device]
        config = replace(first.config, **options)
        made = Engine(first.runner.decoder, config, lambda: Tokenizer.load(demo_model()))
        assert isinstance(made.runner, GpuRunner) == (device != "cpu")
        return made

    return make


def told(count: int) -> list[list[int]]:
    words = ("Once upon a time there was a", "The little fox", "One day", "She was very happy and", "He said that it")
    tokenizer = Tokenizer.load(demo_model())
    return [tokenizer.encode(words[i % len(words)] + " big" * i) for i in range(count)]


@pytest.mark.parametrize("options", [{}, {"max_batch_tokens": 24}, {"num_blocks": 6}])
def test_a_fused_model_echoes_what_it_generates(story, options):
    prompts = told(6)
    wish = {"max_tokens": 40, "logprobs": 3}
    said = generate(story("cuda:0"), [request(p, **wish) for p in prompts])
    texts = [[*p, *o.tokens] for p, o in zip(prompts, said, strict=True)]
    machine = story("cuda:0", **options)
    for count in (0, 12):
        echoed = generate(machine, [request(t, prompt_logprobs=3, max_tokens=count) for t in texts])
        for prompt, answer, echo in zip(prompts, said, echoed, strict=True):
            assert len(echo.prompt_logprobs) == len(prompt) + 39
            assert len(echo.tokens) == count
            found = echo.prompt_logprobs[len(prompt) - 1 :]
            gaps = [abs(a.chosen - b.chosen) for a, b in zip(found, answer.logprobs, strict=True)]
            assert sum(gaps) / len(gaps) < 0.03, "bfloat16 in another order"
            assert max(gaps) < 0.5
    assert machine.stats().blocks_free == machine.stats().blocks
    machine.scheduler.check()


def test_slices_of_a_prompt_change_nothing_on_a_gpu(story, monkeypatch):
    (prompt,) = told(8)[-1:]
    (whole,) = generate(story("cuda:0"), [request(prompt, prompt_logprobs=2, max_tokens=0)])
    monkeypatch.setattr(score, "SLICE_BYTES", 5 * 4096 * 4)
    (cut,) = generate(story("cuda:0"), [request(prompt, prompt_logprobs=2, max_tokens=0)])
    for a, b in zip(whole.prompt_logprobs, cut.prompt_logprobs, strict=True):
        assert a.chosen == pytest.approx(b.chosen, abs=0.1)


def test_biases_and_allowed_ids_on_a_gpu(story):
    machine = story("cuda:0")
    wishes = [{"logit_bias": ((40, 100.0),)}, {"allowed_token_ids": (7, 8)}, {}] * 2
    outputs = generate(machine, [request(p, max_tokens=8, **w) for p, w in zip(told(6), wishes, strict=True)])
    for output, wish in zip(outputs, wishes, strict=True):
        if "logit_bias" in wish:
            assert output.tokens == (40,) * 8
        elif wish:
            assert set(output.tokens) <= {7, 8}
    free = generate(story("cuda:0"), [request(p, max_tokens=8) for p in told(6)])
    for output, wish, alone in zip(outputs, wishes, free, strict=True):
        assert wish or output.tokens[:3] == alone.tokens[:3], "who has no wishes is left alone"


@pytest.mark.parametrize("options", [{}, {"max_batch_tokens": 24}, {"num_blocks": 6}])
def test_grammars_on_a_gpu(story, options):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    texts = [grammar.from_json_schema(schema), grammar.from_regex("([a-z]{2,7} ){2,3}end"), None]
    wishes = [{"grammar": texts[i % 3], "temperature": i % 2 * 1.0, "seed": i} for i in range(9)]
    machine = story("cuda:0", **options)
    asked = [
        request(p, max_tokens=80, **{"ignore_eos": w["grammar"] is None, **w})
        for p, w in zip(told(9), wishes, strict=True)
    ]
    tokenizer = Tokenizer.load(demo_model())
    for output, wish in zip(generate(machine, asked), wishes, strict=True):
        text = tokenizer.decode(output.tokens)
        if wish["grammar"] is None:
            assert output.ending.reason == "length"
        elif wish["grammar"] == texts[0]:
            assert json.loads(text).keys() == {"name", "age"}, output.ending
        else:
            assert re.fullmatch("([a-z]{2,7} ){2,3}end", text), output.ending
    assert machine.stats().blocks_free == machine.stats().blocks


def test_running_out_of_memory_ends_the_step_and_not_the_engine(monkeypatch):
    machine = engine(device="cuda:0")
    plain = machine.runner.decoder.logits
    monkeypatch.setattr(machine.runner.decoder, "logits", lambda h: torch.empty(1 << 50, device="cuda:0"))
    (output,) = generate(machine, [request([1, 2])])
    assert output.ending.reason == "error"
    assert "out of memory" in output.ending.detail
    monkeypatch.setattr(machine.runner.decoder, "logits", plain)
    (output,) = generate(machine, [request([1, 2])])
    assert output.ending.reason == "length"


def test_free_memory_counts_what_torch_keeps_for_itself():
    device = torch.device("cuda:0")
    before = free_bytes(device)
    kept = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    assert before - free_bytes(device) >= 1 << 28
    del kept
    assert abs(before - free_bytes(device)) < 1 << 26

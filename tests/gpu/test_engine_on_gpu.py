"""The engine on a GPU gives the CPU's answers, teacher-forced: a tie may fall the other way, nothing else may."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "engine"))

from tiny_engine import engine, request

from fewbit.engine.engine import generate
from fewbit.engine.runner import free_bytes

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

"""How fast the engine is on this machine: medians over runs, with their spread; and the parts they are made of."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fewbit.engine.config import EngineOptions
from fewbit.engine.engine import Engine
from fewbit.engine.types import GenerateRequest, SamplingParams
from fewbit.errors import UnsupportedError
from fewbit.measure.ceilings import finish

BLOCK = 64
"""Tokens of a block of K and V: what a GPU's kernels have."""
WARM_STEPS = 4
"""Steps of a full batch before any is timed."""


@dataclass(frozen=True)
class Speed:
    """Decode speed of one sequence.

    Attributes:
        tokens_per_s: median over runs.
        slowest, fastest: of the runs.
        runs, tokens: how often how many tokens were made.
    """

    tokens_per_s: float
    slowest: float
    fastest: float
    runs: int
    tokens: int


def decode_speed(engine: Engine, prompt: tuple[int, ...], tokens: int = 128, runs: int = 3) -> Speed:
    """Tokens per second after the first one, greedy, alone in the engine; a first run is not counted."""
    found = []
    for run in range(runs + 1):
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        engine.submit(GenerateRequest(id=f"speed-{run}", prompt=prompt, params=params))
        first = last = 0.0
        made = 0
        while engine.has_work:
            made += sum(event.token is not None for event in engine.step())
            last = time.perf_counter()
            first = first or (last if made else 0.0)
        found.append((made - 1) / (last - first))
    counted = found[1:]
    return Speed(statistics.median(counted), min(counted), max(counted), runs, tokens)


@dataclass(frozen=True)
class Run:
    """One run of a static batch, in seconds.

    Attributes:
        total: until the last token.
        first: mean time to the first token of a sequence.
        between: mean time between tokens of a sequence after its first.
        last_first: until every sequence has its first token.
    """

    total: float
    first: float
    between: float
    last_first: float


@dataclass(frozen=True)
class Batch:
    """Speed of a static batch, each figure the median over runs.

    Attributes:
        tokens_per_s: of all sequences together over the whole time, prompts included; slowest, fastest: of the runs.
        first_token_s: mean time to the first token.
        per_token_s: mean time between tokens of a sequence after its first.
    """

    tokens_per_s: float
    slowest: float
    fastest: float
    first_token_s: float
    per_token_s: float


def batch_options(device: torch.device, batch: int, longest: int, **more: Any) -> EngineOptions:
    """Room for `batch` sequences of `longest` tokens and no prefix cache; `more`: other options."""
    return EngineOptions(
        device=str(device), max_batch=batch, max_model_len=longest, prefix_cache=False, block_size=BLOCK,
        num_blocks=batch * (-(-longest // BLOCK) + 1) + 1, **more,
    )  # fmt: skip


def random_prompts(vocab: int, batch: int, length: int, seed: int = 0) -> list[list[int]]:
    """Token ids: `batch` times `length`."""
    found: list[list[int]] = torch.randint(
        0, vocab, (batch, length), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    return found


def run_batch(engine: Engine, prompts: Sequence[Sequence[int]], tokens: int, name: str) -> Run:
    """Submit prompts at once and make `tokens` of each, greedy. `name`: of the requests, once for an engine.

    Raises:
        UnsupportedError: the engine ended a request early, and why.
    """
    finish(engine.runner.device)
    begin = time.perf_counter()
    _submit(engine, prompts, tokens, name)
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    while engine.has_work:
        for event in engine.step():
            if event.token is None:
                raise UnsupportedError(f"a request ended early: {event.ending.detail if event.ending else ''}")
            last[event.id] = time.perf_counter() - begin
            first.setdefault(event.id, last[event.id])
    total = time.perf_counter() - begin
    between = statistics.mean(last[one] - first[one] for one in first) / max(tokens - 1, 1)
    return Run(total, statistics.mean(first.values()), between, max(first.values()))


def static_batch(
    engine: Engine,
    batch: int,
    prompt: int,
    tokens: int,
    runs: int = 3,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Batch:
    """`run_batch` with random prompts, several times; a first run is not counted.

    Args:
        engine: without a prefix cache.
        batch: sequences.
        prompt: tokens of each prompt.
        tokens: tokens of each answer, two at least.
        runs: that are counted.
        progress: called with a stage's name, runs done, runs in all.

    Raises:
        UnsupportedError: the engine ended a request early, and why.
    """
    prompts, found = random_prompts(engine.config.vocab, batch, prompt), []
    for run in range(runs + 1):
        progress("speed", run, runs + 1)
        found.append(run_batch(engine, prompts, tokens, f"batch-{run}"))
    counted = found[1:]
    speeds = [batch * tokens / run.total for run in counted]
    first, between = (
        statistics.median(values) for values in zip(*((r.first, r.between) for r in counted), strict=True)
    )
    return Batch(statistics.median(speeds), min(speeds), max(speeds), first, between)


def fill(engine: Engine, prompts: Sequence[Sequence[int]], tokens: int, name: str) -> None:
    """Submit prompts and step until every one is being answered, and a few steps more."""
    _submit(engine, prompts, tokens, name)
    started: set[str] = set()
    while len(started) < len(prompts):
        started |= {event.id for event in engine.step()}
    for _ in range(WARM_STEPS):
        engine.step()


def step_seconds(engine: Engine, batch: int, most: int) -> list[float]:
    """Seconds of each of the next steps in which the full batch runs. What a GPU has left at the end is in the last."""
    times: list[float] = []
    finish(engine.runner.device)
    begin = time.perf_counter()
    while engine.has_work and len(times) < most and len(engine.scheduler.running) == batch:
        engine.step()
        now = time.perf_counter()
        times.append(now - begin)
        begin = now
    finish(engine.runner.device)
    if times:
        times[-1] += time.perf_counter() - begin
    return times


def _submit(engine: Engine, prompts: Sequence[Sequence[int]], tokens: int, name: str) -> None:
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    for number, ids in enumerate(prompts):
        engine.submit(GenerateRequest(id=f"{name}-{number}", prompt=tuple(ids), params=params))

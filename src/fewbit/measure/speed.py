"""How fast the engine is on this machine: medians over runs, with their spread."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from fewbit.engine.engine import Engine
from fewbit.engine.types import GenerateRequest, SamplingParams
from fewbit.errors import UnsupportedError


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


def static_batch(
    engine: Engine,
    batch: int,
    prompt: int,
    tokens: int,
    runs: int = 3,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Batch:
    """Submit `batch` random prompts at once and make `tokens` of each, greedy; a first run is not counted.

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
    draw, params = random.Random(0), SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    prompts = [tuple(draw.choices(range(engine.config.vocab), k=prompt)) for _ in range(batch)]
    found: list[tuple[float, float, float]] = []
    for run in range(runs + 1):
        progress("speed", run, runs + 1)
        begin = time.perf_counter()
        for number, ids in enumerate(prompts):
            engine.submit(GenerateRequest(id=f"batch-{run}-{number}", prompt=ids, params=params))
        first: dict[str, float] = {}
        last: dict[str, float] = {}
        while engine.has_work:
            for event in engine.step():
                if event.token is None:
                    raise UnsupportedError(f"a request ended early: {event.ending.detail if event.ending else ''}")
                last[event.id] = time.perf_counter()
                first.setdefault(event.id, last[event.id])
        total = time.perf_counter() - begin
        between = statistics.mean(last[name] - first[name] for name in first) / (tokens - 1)
        found.append((batch * tokens / total, statistics.mean(first.values()) - begin, between))
    speeds, firsts, betweens = zip(*found[1:], strict=True)
    return Batch(
        statistics.median(speeds), min(speeds), max(speeds), statistics.median(firsts), statistics.median(betweens)
    )

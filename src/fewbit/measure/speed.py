"""How fast the engine decodes on this machine: a median over runs, with its spread."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

from fewbit.engine.engine import Engine
from fewbit.engine.types import GenerateRequest, SamplingParams


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

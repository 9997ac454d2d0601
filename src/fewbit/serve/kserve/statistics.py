"""What Triton's statistics extension says of a model: how many requests it had, and where their time went."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

_PHASES = ("queue", "compute_input", "compute_infer", "compute_output")


@dataclass
class Duration:
    """So many times, and nanoseconds in all."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        """Once more."""
        self.count += 1
        self.ns += ns

    def shown(self) -> dict[str, int]:
        """As the protocol writes it."""
        return {"count": self.count, "ns": self.ns}


class Timer:
    """One request: `phase` says which part of the work has just ended.

    queue is waiting for the model, which may have to be loaded; compute_input from inputs to tokens; compute_infer
    in the engine, its queue included; compute_output from tokens to outputs.

    Attributes:
        rows: Of the request.
    """

    def __init__(self) -> None:
        self.began = self._last = time.perf_counter_ns()
        self.spent = dict.fromkeys(_PHASES, 0)
        self.rows = 0

    def phase(self, name: str) -> None:
        """Everything since the last phase was this."""
        now = time.perf_counter_ns()
        self.spent[name] += now - self._last
        self._last = now


@dataclass
class ModelStatistics:
    """The counters of one model."""

    name: str
    version: str
    last_inference_ms: int = 0
    rows: int = 0
    requests: int = 0
    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    phases: dict[str, Duration] = field(default_factory=lambda: {name: Duration() for name in _PHASES})

    def succeeded(self, timer: Timer) -> None:
        """A request was answered."""
        self.last_inference_ms = int(time.time() * 1000)
        self.rows += timer.rows
        self.requests += 1
        self.success.add(time.perf_counter_ns() - timer.began)
        for name, duration in self.phases.items():
            duration.add(timer.spent[name])

    def failed(self, timer: Timer) -> None:
        """A request was not: an error, or its client left."""
        self.fail.add(time.perf_counter_ns() - timer.began)

    def shown(self) -> dict[str, Any]:
        """As the protocol writes it."""
        nothing = Duration().shown()
        inference = {"success": self.success.shown(), "fail": self.fail.shown()}
        inference |= {name: duration.shown() for name, duration in self.phases.items()}
        return {
            "name": self.name,
            "version": self.version,
            "last_inference": self.last_inference_ms,
            "inference_count": self.rows,
            "execution_count": self.requests,
            "inference_stats": inference | {"cache_hit": nothing, "cache_miss": nothing},
            "response_stats": {},
            "batch_stats": [],
            "memory_usage": [],
        }

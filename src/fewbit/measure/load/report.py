"""What a run found, as one object: every key that `vllm bench serve --save-result` writes, and more.

Durations count from the start of the schedule to the last content of the last answer, or to its failure.
"""

from __future__ import annotations

import platform
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib import metadata
from typing import Any

import numpy as np

from fewbit.measure.load.answer import Record
from fewbit.measure.load.datasets import Sample
from fewbit.measure.load.drive import Run
from fewbit.measure.load.metrics import (
    CountTokens,
    Figures,
    aiperf_metrics,
    figures,
    is_good,
    miscounted,
    peaks,
    vllm_summary,
)
from fewbit.version import __version__

SCHEMA = "fewbit.bench.serve/1"
LATE_MS = 5.0
"""A client whose 99th percentile of lateness is above this says so: its stamps are not to be trusted much closer."""


@dataclass(frozen=True)
class Result:
    """Everything about one run.

    Attributes:
        samples: what was asked, in the order of the records.
        records: what became of it.
        good: records without an error, with their figures.
        duration: seconds.
        late: seconds, see `Run`.
        objectives: for goodput, by figure, in seconds.
        percentiles: that are given.
        stopped: whether it was stopped early, so that requests under way then have no record.
    """

    samples: Sequence[Sample]
    records: Sequence[Record]
    good: Sequence[tuple[Record, Figures]]
    duration: float
    late: Sequence[float]
    objectives: Mapping[str, float] = field(default_factory=dict)
    percentiles: Sequence[float] = (50, 90, 95, 99)
    stopped: bool = False

    @property
    def failures(self) -> list[tuple[str, int]]:
        """Reasons why requests failed, the most frequent first."""
        return Counter(r.error for r in self.records if r.error is not None).most_common()


def result_of(
    run: Run,
    samples: Sequence[Sample],
    count_tokens: CountTokens | None = None,
    objectives: Mapping[str, float] | None = None,
    percentiles: Sequence[float] = (50, 90, 95, 99),
) -> Result:
    """Count and sort the records of a run.

    Args:
        run: from `drive`.
        samples: what each of its requests asked.
        count_tokens: tokens of an answer's text, to check what the server says.
        objectives: for goodput, by figure, in seconds.
        percentiles: to give.
    """
    good = [
        (record, figures(record, sample.prompt_tokens, count_tokens))
        for record, sample in zip(run.records, samples, strict=True)
        if record.error is None
    ]
    duration = max((r.ended if r.error is not None else r.arrivals[-1] for r in run.records), default=0.0)
    return Result(samples, run.records, good, duration, run.late, objectives or {}, percentiles, run.stopped)


def report(result: Result, detailed: bool = False) -> dict[str, Any]:
    """The figures of a run: vLLM's keys, then `tokens`, `schedule`, `client`, `failures` and `aiperf`.

    Args:
        result: the run.
        detailed: also lists with a value for each request.
    """
    found, seconds = [f for _, f in result.good], max(result.duration, sys.float_info.min)
    inputs = sum(f.prompt_tokens or 0 for f in found)
    outputs = sum(f.tokens for f in found)
    good = sum(is_good(f, result.objectives) for f in found)
    most_tokens, most_requests = peaks(result.good, result.records)
    made: dict[str, Any] = {
        "num_prompts": len(result.records),
        "stopped": result.stopped,
        "duration": result.duration,
        "completed": len(found),
        "failed": len(result.records) - len(found),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(found) / seconds,
        "request_goodput": good / seconds if result.objectives else None,
        "output_throughput": outputs / seconds,
        "total_token_throughput": (inputs + outputs) / seconds,
        "max_output_tokens_per_s": most_tokens,
        "max_concurrent_requests": most_requests,
    }
    for name, values in _figures(found).items():
        made |= vllm_summary(name, values, result.percentiles)
    made |= {
        "goodput": {
            "objectives_ms": {name: limit * 1e3 for name, limit in result.objectives.items()},
            "good_requests": good if result.objectives else None,
            "share_of_all": good / len(result.records) if result.objectives and result.records else None,
        },
        "tokens": _tokens(result),
        "client": _client(result),
        "failures": [{"reason": reason, "requests": count} for reason, count in result.failures],
        "aiperf": aiperf_metrics(result.good) | _aiperf_rates(made, good if result.objectives else None),
    }
    return made | (details(result) if detailed else {})


def details(result: Result) -> dict[str, Any]:
    """Lists with an entry for each request, failed ones included (vLLM's keys: seconds; 0 where there is nothing)."""
    of = {record.index: found for record, found in result.good}
    all_ = [of.get(record.index) for record in result.records]
    inputs = [(f.prompt_tokens if f else s.prompt_tokens) for f, s in zip(all_, result.samples, strict=True)]
    return {
        "input_lens": [tokens or 0 for tokens in inputs],
        "output_lens": [f.tokens if f else 0 for f in all_],
        "ttfts": [f.ttft if f else 0.0 for f in all_],
        "itls": [f.itls if f else [] for f in all_],
        "start_times": [r.sent for r in result.records],
        "generated_texts": [r.text for r in result.records],
        "errors": [r.error or "" for r in result.records],
        "scheduled_times": [r.scheduled for r in result.records],
        "e2els": [f.e2el if f else None for f in all_],
        "tpots": [f.tpot if f else None for f in all_],
        "finish_reasons": [r.finish_reason for r in result.records],
        "retokenized_lens": [f.retokenized if f else None for f in all_],
    }


def environment(seed: int) -> dict[str, Any]:
    """What a figure depends on beside the server: this machine and its software, as the client sees them."""
    packages = {name: metadata.version(name) for name in ("numpy", "msgspec", "tokenizers")}
    return {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "seed": seed,
        "environment": {
            "fewbit": __version__, "python": platform.python_version(), "platform": platform.platform(),
            "packages": packages,
        },
    }  # fmt: skip


def _figures(found: Sequence[Figures]) -> dict[str, list[float]]:
    waited = [f for f in found if f.waited is not None]
    late = [f.waited or 0.0 for f in waited]
    return {
        "ttft": [f.ttft for f in found],
        "tpot": [f.tpot for f in found if f.tpot is not None],
        "itl": [gap for f in found for gap in f.itls],
        "e2el": [f.e2el for f in found],
        "first_chunk": [f.first_chunk for f in found],
        "schedule_lag": late,
        "ttft_from_schedule": [f.ttft + lag for f, lag in zip(waited, late, strict=True)],
        "e2el_from_schedule": [f.e2el + lag for f, lag in zip(waited, late, strict=True)],
    }


def _tokens(result: Result) -> dict[str, Any]:
    sources = Counter(f.source for _, f in result.good)
    checked = [(r, f) for r, f in result.good if f.retokenized is not None]
    asked = [(r, s) for r, s in zip(result.records, result.samples, strict=True) if r.error is None and s.prompt_tokens]
    return {
        "counted_by": dict(sources),
        "retokenized_output_tokens": sum(f.retokenized or 0 for _, f in checked) if checked else None,
        "output_mismatches": sum(miscounted(r, f) for r, f in checked) if checked else None,
        "input_mismatches": sum(r.usage.get("prompt_tokens", s.prompt_tokens) != s.prompt_tokens for r, s in asked),
        "chunks": sum(len(r.arrivals) for r, _ in result.good),
        "shorter_than_asked": sum(f.tokens < result.samples[r.index].output_tokens for r, f in result.good),
        "without_done": sum(not r.closed for r, _ in result.good),
        "without_finish_reason": sum(r.finish_reason is None for r, _ in result.good),
    }


def _client(result: Result) -> dict[str, Any]:
    late = np.asarray(result.late if len(result.late) else [0.0]) * 1e3
    p99 = float(np.percentile(late, 99))
    return {"late_p99_ms": p99, "late_max_ms": float(late.max()), "kept_up": p99 <= LATE_MS}


def _aiperf_rates(made: Mapping[str, Any], good: int | None) -> dict[str, dict[str, Any]]:
    rates = {
        "request_throughput": (made["request_throughput"], "requests/sec"),
        "output_token_throughput": (made["output_throughput"], "tokens/sec"),
        "total_token_throughput": (made["total_token_throughput"], "tokens/sec"),
        "request_count": (made["completed"], "requests"),
        "error_request_count": (made["failed"], "requests"),
        "benchmark_duration": (made["duration"], "sec"),
    }
    if good is not None:
        rates["goodput"] = (made["request_goodput"], "requests/sec")
        rates["good_request_count"] = (good, "requests")
    return {name: {"unit": unit, "avg": value} for name, (value, unit) in rates.items()}

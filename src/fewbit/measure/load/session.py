"""A measurement from beginning to end: warm up, then the same load on one server, or on two in turns.

With two servers every round asks both the same, one after the other, and the order changes from round to round: what
slows this machine for a while slows both. Ratios are taken within a round.
"""

from __future__ import annotations

import asyncio
import gc
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fewbit.errors import RequestError
from fewbit.measure.load.answer import Record
from fewbit.measure.load.arrivals import Ramp, schedule
from fewbit.measure.load.datasets import Reader, Sample, Wanted
from fewbit.measure.load.drive import drive
from fewbit.measure.load.endpoint import Endpoint
from fewbit.measure.load.metrics import CountTokens
from fewbit.measure.load.report import Result, report, result_of

HEADLINE = (
    "request_throughput", "output_throughput", "total_token_throughput", "request_goodput",
    "median_ttft_ms", "median_tpot_ms", "median_itl_ms", "median_e2el_ms", "mean_ttft_ms", "mean_tpot_ms",
)  # fmt: skip
"""Figures of which several rounds give a spread, and two servers a ratio."""
Tell = Callable[[str], None]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Load:
    """What is asked, and when.

    Attributes:
        samples: in the order in which they are sent.
        due: open loop: seconds after the start for each; None: closed loop.
        limit: requests that may run at a time.
    """

    samples: Sequence[Sample]
    due: Sequence[float] | None
    limit: int | None


def load_of(
    reader: Reader,
    wanted: Wanted,
    *,
    rate: float | None,
    burstiness: float = 1.0,
    ramp: Ramp | None = None,
    limit: int | None = None,
    time_scale: float = 1.0,
) -> Load:
    """Draw a load.

    Args:
        reader: of the samples.
        wanted: which.
        rate: of an open loop, requests per second, infinite: all at once; None: the trace's own times, where the
            samples have some, else a closed loop.
        burstiness: see `schedule`.
        ramp: see `schedule`; makes an open loop.
        limit: requests that may run at a time.
        time_scale: seconds of this load to one of the trace.

    Raises:
        RequestError: a rate, a burstiness or a time scale that is not above 0; what the reader refuses.
    """
    if not 0 < time_scale < math.inf:
        raise RequestError(f"time scale {time_scale:g}: expected a number above 0")
    samples = reader.read(wanted)
    if rate is not None or ramp is not None:
        due = schedule(
            len(samples), math.inf if rate is None else rate, burstiness=burstiness, ramp=ramp, seed=wanted.seed
        )
        return Load(samples, due, limit)
    if samples[0].at is not None:
        return Load(samples, [time_scale * ((s.at or 0.0) - samples[0].at) for s in samples], limit)
    return Load(samples, None, limit or 1)


def warmups(reader: Reader, wanted: Wanted, count: int) -> list[Sample]:
    """Samples that are sent before anything is counted, drawn apart from those that are."""
    return reader.read(replace(wanted, count=count, seed=wanted.seed + (1 << 32))) if count else []


async def measure(
    endpoints: Sequence[Endpoint],
    loads: Sequence[Load],
    warm: Sequence[Sample],
    *,
    count_tokens: CountTokens | None = None,
    objectives: Mapping[str, float] | None = None,
    percentiles: Sequence[float] = (50, 90, 95, 99),
    progress: Progress = lambda stage, done, total: None,
    stop: asyncio.Event | None = None,
) -> list[list[Result]]:
    """Put each load on each server.

    Args:
        endpoints: one server, or two to be compared.
        loads: one for each round.
        warm: sent to each server first, all at once up to the load's limit, and not counted.
        count_tokens: see `result_of`.
        objectives: see `result_of`.
        percentiles: see `result_of`.
        progress: told the stage, requests done and all.
        stop: once it is set, the round under way ends with what has been answered, and is the last.

    Returns:
        For each server its rounds.
    """
    # What can be refused is refused before anything is sent, and nothing is left to be made when a request is due.
    prepared = [[[e.prepare(s) for s in load.samples] for load in loads] for e in endpoints]
    found: list[list[Result]] = [[] for _ in endpoints]
    gc.collect()
    gc.freeze()  # what is prepared stays: the collector need not stop the clock to look through it
    try:
        for endpoint in endpoints:
            made = [endpoint.prepare(sample) for sample in warm]
            await drive(partial(_send, endpoint, made), len(made), limit=loads[0].limit or 8, stop=stop)
        for number, load in enumerate(loads):
            turn = list(enumerate(endpoints))
            for place, endpoint in turn if number % 2 == 0 else reversed(turn):
                if stop is not None and stop.is_set():
                    break
                stage = f"round {number + 1} of {len(loads)}" + (f", {endpoint.client.url.text}" if turn[1:] else "")
                requests = prepared[place][number]
                run = await drive(
                    partial(_send, endpoint, requests), len(requests), due=load.due, limit=load.limit,
                    progress=partial(progress, stage), stop=stop,
                )  # fmt: skip
                samples = [endpoint.asking.counted(load.samples[record.index]) for record in run.records]
                for index, record in enumerate(run.records):  # of a round that was stopped some are missing
                    record.index = index
                if run.stopped and not run.records:
                    break
                found[place].append(result_of(run, samples, count_tokens, objectives, percentiles))
    finally:
        gc.unfreeze()
        for endpoint in endpoints:
            await endpoint.client.close()
    return found


async def _send(endpoint: Endpoint, requests: Sequence[bytes], index: int) -> Record:
    return await endpoint.send(requests[index])


def middle(rounds: Sequence[Result]) -> Result:
    """The round of median output throughput (of an even number the slower one of the two in the middle)."""
    ordered = sorted(rounds, key=lambda result: report(result)["output_throughput"])
    return ordered[(len(ordered) - 1) // 2]


def spread(rounds: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """Median, smallest and largest value of the headline figures over rounds."""
    reports = [report(result) for result in rounds]
    found = {}
    for name in HEADLINE:
        values = [r[name] for r in reports if r[name] is not None]
        if values:
            found[name] = {
                "median": statistics.median(values), "min": min(values), "max": max(values), "values": values
            }  # fmt: skip
    return found


def ratios(first: Sequence[Result], second: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """The second server's headline figures over the first's, round by round: geometric mean and spread."""
    pairs = [(report(one), report(other)) for one, other in zip(first, second, strict=True)]
    found = {}
    for name in HEADLINE:
        values = [other[name] / one[name] for one, other in pairs if one[name] and other[name]]
        if values:
            mean = math.exp(statistics.fmean(map(math.log, values)))
            found[name] = {"ratio": mean, "min": min(values), "max": max(values), "values": values}
    return found

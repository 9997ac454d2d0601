"""Records to figures, under the names of both schools: `vllm bench serve`'s and aiperf's (genai-perf's successor).

For one request, in seconds: **TTFT** from sending to the first content; **E2EL** from sending to the last content, not
to the end of the stream; **TPOT** = (E2EL - TTFT) / (tokens - 1), of answers of two tokens or more; **ITL** the gaps
between chunks with content, each chunk counted once however many tokens it holds. aiperf calls TPOT inter token latency
(with the first chunk's tokens in place of 1) and ITL inter chunk latency.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from fewbit.errors import RequestError, nearest_name
from fewbit.measure.load.answer import Record

CountTokens = Callable[[str], int]
Source = Literal["usage", "tokenizer", "chunks"]
OBJECTIVES = {
    "ttft": "ttft", "time_to_first_token": "ttft", "tpot": "tpot", "inter_token_latency": "tpot", "e2el": "e2el",
    "request_latency": "e2el",
}  # fmt: skip
"""What an objective may be called, and which figure it is about."""


@dataclass(frozen=True)
class Figures:
    """One good answer in numbers; times in seconds.

    Attributes:
        ttft, tpot, e2el, itls: as the module says; tpot None: undefined, with one token only.
        first_chunk: from sending to the first chunk with choices, be they empty; what `vllm bench serve` calls TTFT.
        inter_token: aiperf's inter token latency; None as tpot.
        tokens: of the answer.
        source: who counted them.
        retokenized: of the answer's text, by the tokenizer; None: there is none.
        prompt_tokens: by the server's word, else as counted beforehand; None: nobody did.
        waited: from the scheduled time to sending; None in a closed loop.
    """

    ttft: float
    tpot: float | None
    e2el: float
    itls: list[float]
    first_chunk: float
    inter_token: float | None
    tokens: int
    source: Source
    retokenized: int | None
    prompt_tokens: int | None
    waited: float | None


def figures(record: Record, prompt_tokens: int | None = None, count_tokens: CountTokens | None = None) -> Figures:
    """The numbers of a good answer.

    Args:
        record: without an error.
        prompt_tokens: as counted beforehand.
        count_tokens: tokens of a text, without special ones around it.
    """
    assert record.error is None
    assert record.first_chunk is not None
    first, last = record.arrivals[0] - record.sent, record.arrivals[-1] - record.sent
    retokenized = None if count_tokens is None else count_tokens(record.text)
    tokens, source = _tokens(record, retokenized)
    opening = 1
    if (
        count_tokens is not None and len(record.arrivals) < tokens - 1
    ):  # chunks of several tokens; the last may be silent
        opening = max(min(count_tokens(record.texts[0]), tokens), 1)
    return Figures(
        ttft=first,
        tpot=(last - first) / (tokens - 1) if tokens > 1 else None,
        e2el=last,
        itls=[after - before for before, after in pairwise(record.arrivals)],
        first_chunk=record.first_chunk - record.sent,
        inter_token=(last - first) / (tokens - opening) if tokens > opening else None,
        tokens=tokens,
        source=source,
        retokenized=retokenized,
        prompt_tokens=record.usage.get("prompt_tokens") or prompt_tokens,
        waited=None if record.scheduled is None else record.sent - record.scheduled,
    )


def _tokens(record: Record, retokenized: int | None) -> tuple[int, Source]:
    if said := record.usage.get("completion_tokens"):
        return said, "usage"
    return (len(record.arrivals), "chunks") if retokenized is None else (retokenized, "tokenizer")


def miscounted(record: Record, found: Figures) -> bool:
    """Whether the server's count is not the tokenizer's; the token that ended the text is not part of the text."""
    if found.source != "usage" or found.retokenized is None:
        return False
    ending = record.finish_reason == "stop"
    return not found.retokenized <= found.tokens <= found.retokenized + ending


def read_objectives(text: str) -> dict[str, float]:
    """Service level objectives: ``ttft_ms=200,tpot_ms=50`` or ``ttft:200 tpot:50``, to figure and seconds.

    Raises:
        RequestError: an unknown name, or no number.
    """
    found = {}
    for part in text.replace(",", " ").split():
        name, _, value = part.replace(":", "=", 1).partition("=")
        figure = name.removesuffix("_ms")
        if figure not in OBJECTIVES:
            raise RequestError(f"goodput {part}: no figure '{name}'; {nearest_name(figure, OBJECTIVES)}")
        try:
            limit = float(value)
        except ValueError:
            limit = math.nan
        if not limit > 0:
            raise RequestError(f"goodput {part}: expected milliseconds above 0, for example {name}=200")
        found[OBJECTIVES[figure]] = limit / 1e3
    if not found:
        raise RequestError("goodput names no objective; for example ttft_ms=200,tpot_ms=50")
    return found


def is_good(found: Figures, objectives: Mapping[str, float]) -> bool:
    """Whether an answer meets every objective; a TPOT that is undefined does."""
    values = {"ttft": found.ttft, "tpot": found.tpot or 0.0, "e2el": found.e2el}
    return all(values[name] <= limit for name, limit in objectives.items())


def vllm_summary(name: str, values: Sequence[float], percentiles: Sequence[float]) -> dict[str, float | None]:
    """Mean, median, standard deviation and percentiles in milliseconds under vLLM's keys; null where nothing is."""
    ms = np.asarray(values) * 1e3
    found: dict[str, float | None] = dict.fromkeys(
        [f"mean_{name}_ms", f"median_{name}_ms", f"std_{name}_ms", *(f"p{p:g}_{name}_ms" for p in percentiles)]
    )
    if len(values):
        cuts = np.percentile(ms, [50, *percentiles])
        found = dict(zip(found, map(float, (ms.mean(), cuts[0], ms.std(), *cuts[1:])), strict=True))
    return found


def aiperf_summary(values: Sequence[float], unit: str, factor: float = 1.0) -> dict[str, float | str | int] | None:
    """The statistics that aiperf gives of a figure; None where nothing is."""
    if not len(values):
        return None
    scaled = np.asarray(values) * factor
    names = (1, 5, 10, 25, 50, 75, 90, 95, 99)
    cuts = {f"p{p}": float(cut) for p, cut in zip(names, np.percentile(scaled, names), strict=True)}
    ends = {"avg": float(scaled.mean()), "min": float(scaled.min()), "max": float(scaled.max())}
    return {"unit": unit, **ends, **cuts, "std": float(scaled.std()), "count": len(values)}


def aiperf_metrics(good: Sequence[tuple[Record, Figures]]) -> dict[str, dict[str, float | str | int]]:
    """Per-request figures under aiperf's names and by its definitions."""
    found = [figures for _, figures in good]
    inter_token = [f.inter_token for f in found if f.inter_token is not None]
    seen = {
        "time_to_first_token": aiperf_summary([f.ttft for f in found], "ms", 1e3),
        "time_to_second_token": aiperf_summary([f.itls[0] for f in found if f.itls], "ms", 1e3),
        "inter_token_latency": aiperf_summary(inter_token, "ms", 1e3),
        "inter_chunk_latency": aiperf_summary([gap for f in found for gap in f.itls], "ms", 1e3),
        "request_latency": aiperf_summary([f.e2el for f in found], "ms", 1e3),
        "output_token_throughput_per_user": aiperf_summary(
            [1 / gap for gap in inter_token if gap > 0], "tokens/sec/user"
        ),
        "output_sequence_length": aiperf_summary([f.tokens for f in found], "tokens"),
        "input_sequence_length": aiperf_summary([f.prompt_tokens for f in found if f.prompt_tokens], "tokens"),
    }
    return {name: summary for name, summary in seen.items() if summary is not None}


def peaks(good: Sequence[tuple[Record, Figures]], records: Sequence[Record]) -> tuple[float, int]:
    """Most tokens in any second of the clock, and most requests at a time."""
    seconds: defaultdict[int, float] = defaultdict(float)
    for record, found in good:
        each = found.tokens / len(record.arrivals)  # a chunk's own share is not known
        for arrival in record.arrivals:
            seconds[math.floor(arrival)] += each
    ends = sorted([(r.sent, 1) for r in records] + [(r.ended, -1) for r in records])
    running = most = 0
    for _, change in ends:
        running += change
        most = max(most, running)
    return max(seconds.values(), default=0.0), most

"""The same numbers under the names that vLLM's and Triton's dashboards query: ``--metrics-compat vllm,triton``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

from prometheus_client.core import Metric
from prometheus_client.samples import Sample

Labels = Mapping[str, str]


class Alias(NamedTuple):
    """One more name of a metric.

    Attributes:
        name: The other one's.
        ours: Without ``fewbit:``.
        labels: Of the other one, besides the model's.
        scale: Of the values, or of a histogram's bounds.
        part: Which of a histogram's samples is meant, such as ``_sum``; None: all.
        over: A label of ours that the samples are added up over.
    """

    name: str
    ours: str
    labels: Labels = MappingProxyType({})
    scale: float = 1.0
    part: str | None = None
    over: str | None = None


_VLLM_SAME = (
    "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prompt_tokens", "generation_tokens",
    "request_success", "num_preemptions", "prefix_cache_queries", "prefix_cache_hits", "time_to_first_token_seconds",
    "inter_token_latency_seconds", "e2e_request_latency_seconds", "request_prompt_tokens", "request_generation_tokens",
)  # fmt: skip

VLLM = (*(Alias(f"vllm:{name}", name) for name in _VLLM_SAME), Alias("vllm:admission_rejections", "requests_rejected"))

TRITON = (
    Alias("nv_inference_request_success", "request_success", over="finished_reason"),
    Alias("nv_inference_request_failure", "requests_failed", {"reason": "BACKEND"}),
    Alias("nv_inference_request_failure", "requests_timed_out", {"reason": "OTHER"}),
    Alias("nv_inference_request_failure", "requests_cancelled", {"reason": "CANCELED"}),
    Alias("nv_inference_count", "request_success", over="finished_reason"),
    Alias("nv_inference_exec_count", "engine_steps"),
    Alias("nv_inference_pending_request_count", "num_requests_waiting"),
    Alias("nv_inference_request_duration_us", "e2e_request_latency_seconds", scale=1e6, part="_sum"),
    Alias("nv_inference_first_response_histogram_ms", "time_to_first_token_seconds", scale=1e3),
    Alias("nv_trt_llm_request_metrics", "num_requests_waiting", {"request_type": "waiting"}),
    Alias("nv_trt_llm_request_metrics", "num_requests_running", {"request_type": "scheduled"}),
    Alias("nv_trt_llm_kv_cache_block_metrics", "kv_cache_blocks", {"kv_cache_block_type": "max"}),
    Alias("nv_trt_llm_kv_cache_block_metrics", "kv_cache_blocks_used", {"kv_cache_block_type": "used"}),
    Alias("nv_trt_llm_kv_cache_block_metrics", "kv_cache_usage_perc", {"kv_cache_block_type": "fraction"}),
)


def _vllm_labels(labels: Labels) -> Labels:
    return {**labels, "engine": "0"} if "model_name" in labels else labels


def _triton_labels(labels: Labels) -> Labels:
    others = {name: value for name, value in labels.items() if name != "model_name"}
    return {"model": labels["model_name"], "version": "1", **others}


COMPAT: Mapping[str, tuple[tuple[Alias, ...], Callable[[Labels], Labels]]] = {
    "vllm": (VLLM, _vllm_labels),
    "triton": (TRITON, _triton_labels),
}


def aliased(compat: Iterable[str], metrics: Iterable[Metric]) -> Iterator[Metric]:
    """The metrics under their other names; what is not there has none.

    Args:
        compat: Of `COMPAT`.
        metrics: Our own.
    """
    ours = {metric.name.removeprefix("fewbit:"): metric for metric in metrics}
    for kind in compat:
        table, relabel = COMPAT[kind]
        made: dict[str, Metric] = {}
        for alias in table:
            if (metric := ours.get(alias.ours)) is not None:
                # Triton's counters do not end in _total: the text format then knows no type for them
                plain = (kind == "triton" and metric.type == "counter") or alias.part is not None
                other = made.setdefault(
                    alias.name, Metric(alias.name, metric.documentation, "unknown" if plain else metric.type)
                )
                other.samples += _samples(metric, alias, relabel, plain)
        yield from made.values()


def _samples(metric: Metric, alias: Alias, relabel: Callable[[Labels], Labels], plain: bool) -> list[Sample]:
    sums: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for sample in metric.samples:
        suffix = sample.name.removeprefix(metric.name)
        if suffix == "_created" or (alias.part is not None and suffix != alias.part):
            continue
        labels = {name: value for name, value in sample.labels.items() if name != alias.over} | dict(alias.labels)
        value = sample.value
        if alias.scale != 1.0 and suffix == "_bucket" and labels["le"] != "+Inf":
            labels["le"] = str(float(f"{float(labels['le']) * alias.scale:g}"))
        elif alias.scale != 1.0 and suffix in ("", "_sum"):
            value *= alias.scale
        key = "" if plain else suffix, tuple(relabel(labels).items())
        sums[key] = sums.get(key, 0.0) + value
    return [Sample(alias.name + suffix, dict(labels), value) for (suffix, labels), value in sums.items()]

"""What /metrics says: what requests waited for, measured here, and what the engine says of itself. Names: fewbit:*."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from fewbit.engine.types import Stats

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
_TOKENS = tuple(float(base * 10**power) for power in range(6) for base in (1, 2, 5))

# name: (help, field of Stats)
_GAUGES = {
    "fewbit:num_requests_running": ("Requests that are being computed.", "running"),
    "fewbit:num_requests_waiting": ("Requests that wait to be computed.", "waiting"),
    "fewbit:kv_cache_blocks": ("Blocks of the K/V cache.", "blocks"),
    "fewbit:kv_cache_blocks_used": ("Blocks of the K/V cache that requests hold.", "blocks_used"),
    "fewbit:kv_cache_bytes": ("Memory of the K/V cache.", "kv_bytes"),
}
_COUNTERS = {
    "fewbit:prompt_tokens": ("Tokens of prompts.", "prompt_tokens_total"),
    "fewbit:generation_tokens": ("Tokens generated.", "output_tokens_total"),
    "fewbit:computed_tokens": ("Tokens that went through the model.", "computed_tokens_total"),
    "fewbit:engine_steps": ("Steps of the engine.", "steps_total"),
    "fewbit:num_preemptions": ("Requests put back because blocks ran out.", "preemptions_total"),
    "fewbit:prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", "prefix_queries_total"),
    "fewbit:prefix_cache_hits": ("Prompt tokens found in the prefix cache.", "prefix_hits_total"),
}


class Metrics:
    """The metrics of one server."""

    def __init__(self, model_name: str) -> None:
        self._model = model_name
        self._stats: Stats | None = None
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(self))
        self.success = self._counter("request_success", "Requests that ended, by how they ended.", "finished_reason")
        self.cancelled = self._counter("requests_cancelled", "Requests whose client left.")
        self.failed = self._counter("requests_failed", "Requests that the engine could not finish.")
        self.answers = self._counter("http_responses", "HTTP answers by path and status.", "path", "status")
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "From submission to the first token.", _SECONDS
        )
        self.gap = self._histogram("inter_token_latency_seconds", "Between a token and the one before it.", _GAPS)
        self.latency = self._histogram("e2e_request_latency_seconds", "From submission to the end.", _SECONDS)
        self.prompt_tokens = self._histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self.output_tokens = self._histogram("request_generation_tokens", "Tokens generated for a request.", _TOKENS)

    def begin(self) -> Progress:
        """A request was submitted."""
        return Progress(self)

    def render(self, stats: Stats | None) -> bytes:
        """The text for Prometheus. stats: None when the engine does not answer."""
        self._stats = stats
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"fewbit:{name}", text, ("model_name", *labels), registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        metric = Histogram(f"fewbit:{name}", text, ("model_name",), registry=self.registry, buckets=buckets)
        return metric.labels(self._model)

    def engine_metrics(self) -> Iterator[Metric]:
        """The engine's own figures, as of the last `render`."""
        stats, labels, values = self._stats, ("model_name",), (self._model,)
        up = GaugeMetricFamily("fewbit:engine_up", "Whether the engine answers.", labels=labels)
        up.add_metric(values, float(stats is not None))
        yield up
        if stats is None:
            return
        for name, (text, key) in _GAUGES.items():
            gauge = GaugeMetricFamily(name, text, labels=labels)
            gauge.add_metric(values, getattr(stats, key))
            yield gauge
        for name, (text, key) in _COUNTERS.items():
            counter = CounterMetricFamily(name, text, labels=labels)
            counter.add_metric(values, getattr(stats, key))
            yield counter
        usage = GaugeMetricFamily("fewbit:kv_cache_usage_perc", "Used part of the K/V cache, 0 to 1.", labels=labels)
        usage.add_metric(values, stats.blocks_used / stats.blocks if stats.blocks else 0.0)
        yield usage

    def answered(self, path: str, status: int) -> None:
        """An HTTP answer began. path: of the route, never of the client's making."""
        self.answers.labels(self._model, path, str(status)).inc()

    def ended(self, reason: str) -> None:
        """A request ended well."""
        self.success.labels(self._model, reason).inc()

    def left(self, failed: bool) -> None:
        """A request ended early."""
        (self.failed if failed else self.cancelled).labels(self._model).inc()


class Progress:
    """The times of one request."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._began = time.perf_counter()
        self._last: float | None = None
        self._open = True

    def token(self) -> None:
        """A token came."""
        now = time.perf_counter()
        if self._last is None:
            self._metrics.first_token.observe(now - self._began)
        else:
            self._metrics.gap.observe(now - self._last)
        self._last = now

    def end(self, reason: str, prompt_tokens: int, output_tokens: int) -> None:
        """The text is complete."""
        self._open = False
        self._metrics.latency.observe(time.perf_counter() - self._began)
        self._metrics.prompt_tokens.observe(prompt_tokens)
        self._metrics.output_tokens.observe(output_tokens)
        self._metrics.ended(reason)

    def close(self, failed: bool = False) -> None:
        """Nobody reads any more; counts unless the text was complete."""
        if self._open:
            self._open = False
            self._metrics.left(failed)


class _EngineCollector:
    """Figures that the engine counts, read when they are asked for."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        return self._metrics.engine_metrics()

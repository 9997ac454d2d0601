"""What /metrics says: what requests waited for, measured here, and what the engine says of itself. Names: fewbit:*."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from fewbit.engine.types import Stats
from fewbit.serve.aliases import aliased
from fewbit.version import __version__

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


Left = Literal["cancelled", "failed", "timed_out"]


class Metrics:
    """The metrics of one server."""

    def __init__(self, compat: Sequence[str] = ()) -> None:
        """Begin to count.

        Args:
            compat: Whose names the metrics have besides; see `fewbit.serve.aliases`.
        """
        self._stats: Mapping[str, Stats | None] = {}
        self._compat = compat
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(self))
        self._answers = Counter(
            "fewbit:http_responses", "HTTP answers by path and status.", ("path", "status"), registry=self.registry
        )
        self.success = self._counter("request_success", "Requests that ended, by how they ended.", "finished_reason")
        self.cancelled = self._counter("requests_cancelled", "Requests whose client left.")
        self.failed = self._counter("requests_failed", "Requests that the engine could not finish.")
        self.timed_out = self._counter("requests_timed_out", "Requests whose time limit came first.")
        self.loads = self._counter("model_loads", "Times that a model was loaded, or could not be.", "outcome")
        self._rejected = Counter(
            "fewbit:requests_rejected", "Requests that were refused, by the error's type.", ("reason",),
            registry=self.registry,
        )  # fmt: skip
        build = Gauge("fewbit:build_info", "1, with the version.", ("version",), registry=self.registry)
        build.labels(__version__).set(1)
        self.restarts = self._counter("engine_restarts", "Times that an engine process was started again.")
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "From submission to the first token.", _SECONDS
        )
        self.gap = self._histogram("inter_token_latency_seconds", "Between a token and the one before it.", _GAPS)
        self.latency = self._histogram("e2e_request_latency_seconds", "From submission to the end.", _SECONDS)
        self.prompt_tokens = self._histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self.output_tokens = self._histogram("request_generation_tokens", "Tokens generated for a request.", _TOKENS)

    def of(self, model: str) -> ModelMetrics:
        """Those of one model."""
        return ModelMetrics(self, model)

    def render(self, stats: Mapping[str, Stats | None]) -> bytes:
        """The text for Prometheus.

        Args:
            stats: What the engine of each model says; None where it does not answer.
        """
        self._stats = stats
        return generate_latest(self)

    def collect(self) -> Iterator[Metric]:
        """All of them, as Prometheus' library asks a registry."""
        ours = list(self.registry.collect())
        yield from ours
        yield from aliased(self._compat, ours)

    def answered(self, path: str, status: int) -> None:
        """An HTTP answer began. path: of the route, never of the client's making."""
        self._answers.labels(path, str(status)).inc()

    def rejected(self, reason: str) -> None:
        """A request was refused. reason: the type of the error, of which there are few."""
        self._rejected.labels(reason).inc()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"fewbit:{name}", text, ("model_name", *labels), registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"fewbit:{name}", text, ("model_name",), registry=self.registry, buckets=buckets)

    def engine_metrics(self) -> Iterator[Metric]:
        """The engines' own figures, as of the last `render`."""
        alive = {model: stats for model, stats in self._stats.items() if stats is not None}

        def gauge(name: str, text: str, values: Iterable[tuple[str, float]]) -> Metric:
            family = GaugeMetricFamily(name, text, labels=("model_name",))
            for model, value in values:
                family.add_metric((model,), value)
            return family

        loaded = GaugeMetricFamily("fewbit:models_loaded", "Models that are loaded.")
        loaded.add_metric((), len(self._stats))
        yield loaded
        yield gauge("fewbit:engine_up", "Whether the engine answers.", ((m, float(m in alive)) for m in self._stats))
        for name, (text, key) in _GAUGES.items():
            yield gauge(name, text, ((model, getattr(stats, key)) for model, stats in alive.items()))
        for name, (text, key) in _COUNTERS.items():
            counter = CounterMetricFamily(name, text, labels=("model_name",))
            for model, stats in alive.items():
                counter.add_metric((model,), getattr(stats, key))
            yield counter
        used = ((model, stats.blocks_used / max(stats.blocks, 1)) for model, stats in alive.items())
        yield gauge("fewbit:kv_cache_usage_perc", "Used part of the K/V cache, 0 to 1.", used)


class ModelMetrics:
    """The requests of one model."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics, self._model = metrics, model
        self.first_token, self.gap, self.latency, self.prompt_tokens, self.output_tokens = (
            histogram.labels(model)
            for histogram in (
                metrics.first_token, metrics.gap, metrics.latency, metrics.prompt_tokens, metrics.output_tokens,
            )
        )  # fmt: skip

    def restarted(self) -> None:
        """Its engine process was started again."""
        self._metrics.restarts.labels(self._model).inc()

    def begin(self) -> Progress:
        """A request was submitted."""
        return Progress(self)

    def ended(self, reason: str) -> None:
        """A request ended well."""
        self._metrics.success.labels(self._model, reason).inc()

    def loaded(self, well: bool) -> None:
        """It was loaded, or could not be."""
        self._metrics.loads.labels(self._model, "success" if well else "failure").inc()

    def left(self, how: Left) -> None:
        """A request ended early."""
        metrics = self._metrics
        {"cancelled": metrics.cancelled, "failed": metrics.failed, "timed_out": metrics.timed_out}[how].labels(
            self._model
        ).inc()


class Progress:
    """The times of one request."""

    def __init__(self, metrics: ModelMetrics) -> None:
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

    def close(self, how: Left = "cancelled") -> None:
        """Nobody reads any more; counts unless the text was complete."""
        if self._open:
            self._open = False
            self._metrics.left(how)


class _EngineCollector:
    """Figures that the engine counts, read when they are asked for."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        return self._metrics.engine_metrics()

"""Traces of requests for OpenTelemetry: the extra ``fewbit[otel]``, imported only when an endpoint is given.

A request is a span, a child of the caller's where it sends ``traceparent``; its children are ``prefill`` (from the
submission to the first token, waiting included) and ``decode`` (from there to the last). No span holds text.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from starlette.types import Scope

from fewbit.errors import RecipeError
from fewbit.serve.exchange import Exchange
from fewbit.version import __version__

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider


class Span(Protocol):
    """The trace of one request."""

    def end(self, route: str, status: int) -> None:
        """It is answered to the last byte."""
        ...


class Traces(Protocol):
    """Where spans go."""

    def request(self, scope: Scope, exchange: Exchange) -> contextlib.AbstractContextManager[Span]:
        """A request begins."""
        ...

    def close(self) -> None:
        """Send what has not been sent."""
        ...


class NoTraces:
    """Nobody wants any."""

    @contextlib.contextmanager
    def request(self, scope: Scope, exchange: Exchange) -> Iterator[Span]:
        """See `Traces`."""
        yield self

    def end(self, route: str, status: int) -> None:
        """See `Span`."""

    def close(self) -> None:
        """See `Traces`."""


def open_traces(endpoint: str) -> Traces:
    """Traces that go to a collector over OTLP/HTTP.

    Args:
        endpoint: Its URL, such as ``http://127.0.0.1:4318/v1/traces``.

    Raises:
        RecipeError: The packages are not installed, or it is no URL.
    """
    if not endpoint.startswith(("http://", "https://")):
        raise RecipeError(f"--otlp-endpoint '{endpoint}' is no URL; expected such as http://127.0.0.1:4318/v1/traces")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise RecipeError(f"--otlp-endpoint needs the extra 'otel': pip install 'fewbit[otel]' ({error})") from None
    provider = TracerProvider(resource=Resource.create({"service.name": "fewbit", "service.version": __version__}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return OpenTelemetry(provider)


class OpenTelemetry:
    """Traces through a provider of OpenTelemetry's.

    Args:
        provider: Says where the spans go; it is shut down by `close`.
    """

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("fewbit", __version__)
        self._propagator = TraceContextTextMapPropagator()

    @contextlib.contextmanager
    def request(self, scope: Scope, exchange: Exchange) -> Iterator[Span]:
        """See `Traces`."""
        from opentelemetry.trace import SpanKind

        carrier = {
            key.decode("latin-1"): value.decode("latin-1")
            for key, value in scope["headers"]
            if key in (b"traceparent", b"tracestate")
        }
        parent = self._propagator.extract(carrier)
        span = self._tracer.start_span(scope["method"], context=parent, kind=SpanKind.SERVER)
        yield _RequestSpan(self._tracer, span, exchange)

    def close(self) -> None:
        """See `Traces`."""
        self._provider.shutdown()


class _RequestSpan:
    def __init__(self, tracer: Any, span: Any, exchange: Exchange) -> None:
        self._tracer, self._span, self._exchange = tracer, span, exchange
        self._offset_ns = time.time_ns() - time.perf_counter_ns()  # spans want the time of day

    def end(self, route: str, status: int) -> None:
        """See `Span`."""
        from opentelemetry.trace import Status, StatusCode, set_span_in_context

        asked, span = self._exchange, self._span
        span.update_name(f"{span.name} {route}")
        span.set_attributes({"http.route": route, "http.response.status_code": status, "fewbit.request_id": asked.id})
        if asked.model:
            span.set_attributes(
                {
                    "gen_ai.request.model": asked.model,
                    "gen_ai.usage.input_tokens": asked.prompt_tokens,
                    "gen_ai.usage.output_tokens": asked.output_tokens,
                }
            )
        if status >= 500 or not status:
            span.set_status(Status(StatusCode.ERROR))
        steps = (("prefill", asked.submitted, asked.first_token), ("decode", asked.first_token, asked.last_token))
        for name, began, ended in steps:
            if began is not None and ended is not None:
                step = self._tracer.start_span(name, set_span_in_context(span), start_time=self._at(began))
                step.end(self._at(ended))
        span.end()

    def _at(self, seconds: float) -> int:
        return int(seconds * 1e9) + self._offset_ns

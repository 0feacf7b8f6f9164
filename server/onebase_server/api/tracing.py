"""OpenTelemetry spans of a generation's steps, if a collector is set (ONEBASE_OTLP_ENDPOINT). No text is in them.

The spans are made at the end, with the times that were measured anyway: a generation costs nothing while it runs, and
without the setting OpenTelemetry is never imported. Needs the extra `onebase[tracing]`.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from onebase.errors import InvalidInput


@dataclass(frozen=True, slots=True)
class Trace:
    """One generation. `started_at` is Unix seconds, the others seconds since; `parent` a W3C traceparent."""

    request_id: str
    key: str
    model: str
    outcome: str
    started_at: float
    queue_s: float | None
    first_token_s: float | None
    total_s: float
    prompt_tokens: int
    generated_tokens: int
    parent: str | None


class Tracer(Protocol):
    def record(self, trace: Trace) -> None:
        """Must not block."""
        ...

    def close(self) -> None:
        """Send what is left."""
        ...


def steps_of(trace: Trace) -> list[tuple[str, float, float]]:
    """(step, begin, end) in seconds since the start, for as far as it got."""
    steps = []
    queue = trace.queue_s
    if queue is None:
        return [("queue", 0.0, trace.total_s)]
    steps.append(("queue", 0.0, queue))
    first = trace.first_token_s
    if first is None:
        return [*steps, ("prefill", queue, max(queue, trace.total_s))]
    return [*steps, ("prefill", queue, max(queue, first)), ("decode", max(queue, first), max(first, trace.total_s))]


class OtelTracer:
    """Spans to OpenTelemetry. `exporter`: where to; the SDK's batch processor sends them from a thread of its own."""

    def __init__(self, exporter: Any) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = TracerProvider(resource=Resource.create({"service.name": "onebase"}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("onebase_server")
        self._propagator = TraceContextTextMapPropagator()

    def record(self, trace: Trace) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        carrier = {} if trace.parent is None else {"traceparent": trace.parent}
        span = self._tracer.start_span(
            "generation",
            context=self._propagator.extract(carrier),
            kind=SpanKind.SERVER,
            start_time=nanoseconds(trace.started_at),
            attributes={
                "onebase.request_id": trace.request_id,
                "onebase.key": trace.key,
                "onebase.outcome": trace.outcome,
                "gen_ai.response.model": trace.model,
                "gen_ai.usage.input_tokens": trace.prompt_tokens,
                "gen_ai.usage.output_tokens": trace.generated_tokens,
            },
        )
        if trace.outcome == "error":
            span.set_status(Status(StatusCode.ERROR))
        inside = set_span_in_context(span)
        for name, begin, end in steps_of(trace):
            step = self._tracer.start_span(name, context=inside, start_time=nanoseconds(trace.started_at + begin))
            step.end(nanoseconds(trace.started_at + end))
        span.end(nanoseconds(trace.started_at + trace.total_s))

    def close(self) -> None:
        self._provider.shutdown()


def otlp_tracer(endpoint: str) -> OtelTracer:
    """To a collector that speaks OTLP over HTTP. Raises InvalidInput if the extra is not installed."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise InvalidInput(
            "ONEBASE_OTLP_ENDPOINT needs OpenTelemetry: pip install 'onebase[tracing]'", param="otlp_endpoint"
        ) from error
    return OtelTracer(OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces"))


def nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)

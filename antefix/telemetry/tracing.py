"""Trace spans, which are sent by OTLP if an endpoint is set. If tracing is off, which is the default, a span is one
shared object that does nothing.

OpenTelemetry is an optional extra (`otel`): none of its modules is imported before `start_tracing`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Final, Protocol

from antefix.errors import ConfigError
from antefix.extras import needs
from antefix.security.listening import is_loopback
from antefix.split_url import split_url

Value = str | bool | int | float


class Span(Protocol):
    """A span: a named part of the time that a request takes."""

    def set(self, **attributes: Value) -> None: ...

    def end(self) -> None: ...


class _NoSpan:
    """Where nothing is traced."""

    def set(self, **attributes: Value) -> None:
        pass

    def end(self) -> None:
        pass

    def __enter__(self) -> _NoSpan:
        return self

    def __exit__(self, *_: object) -> None:
        pass


_NO_SPAN: Final = _NoSpan()
# OpenTelemetry's tracer of this process, once it is started.
_tracer: Any = None


def span(name: str, **attributes: Value) -> AbstractContextManager[Span]:
    """A span around work that one task does without a yield in between; spans inside it become its children."""
    return _NO_SPAN if _tracer is None else _inside(name, attributes)


def begin(name: str, **attributes: Value) -> Span:
    """A span for work that continues over yields, or begins and ends in different places; the caller ends the span. Has
    no children.
    """
    return _NO_SPAN if _tracer is None else _OpenSpan(_tracer.start_span(name, attributes=attributes))


@contextlib.contextmanager
def serving(name: str, **attributes: Value) -> Iterator[Span]:
    """A span around the serving of one call, whose caller's trace context has been bound (`context.incoming`).

    The task's own context keeps the span: a generator that is closed late is closed in another context, which could not
    restore the span before it.
    """
    if _tracer is None:
        yield _NO_SPAN
        return
    from opentelemetry import context, trace

    opened = _tracer.start_span(name, context=_parent_context(), kind=trace.SpanKind.SERVER, attributes=attributes)
    context.attach(trace.set_span_in_context(opened))
    try:
        yield _OpenSpan(opened)
    except Exception as err:
        opened.set_attribute("error.type", type(err).__name__)
        opened.set_status(trace.Status(trace.StatusCode.ERROR))
        raise
    finally:
        opened.end()


def current_traceparent() -> str:
    """The id of the innermost span's trace; "" if there is no span."""
    if _tracer is None:
        return ""
    from opentelemetry import trace

    found = trace.get_current_span().get_span_context()
    if not found.is_valid:
        return ""
    return f"00-{found.trace_id:032x}-{found.span_id:016x}-{int(found.trace_flags):02x}"


def start_tracing(endpoint: str, *, role: str, share: float = 1.0) -> Callable[[], None]:
    """Send spans from now on. Returns the function that sends the remaining spans and ends tracing.

    endpoint: of an OTLP collector (gRPC), such as http://127.0.0.1:4317; empty: nothing is traced.
    share: of the requests without a trace of their own; those that bring one are traced as it says.
    Raises:  ConfigError: the extra `otel` is not installed.
    """
    global _tracer
    if not endpoint:
        return lambda: None
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
    except ModuleNotFoundError as err:
        raise ConfigError(needs("sending traces", str(err.name), "otel")) from err
    resource = Resource.create({"service.name": f"antefix-{role}", "service.instance.id": str(os.getpid())})
    provider = TracerProvider(resource=resource, sampler=ParentBased(TraceIdRatioBased(share)))
    insecure = not endpoint.startswith("https://")
    # A collector elsewhere may be behind a proxy of the environment; this host's own addresses are not.
    host = split_url(endpoint if "//" in endpoint else f"//{endpoint}", "--traces").hostname or ""
    options: Any = (("grpc.enable_http_proxy", 0),) if is_loopback(host) else ()
    exporter = OTLPSpanExporter(endpoint=endpoint, insecure=insecure, channel_options=options)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    _tracer = provider.get_tracer("antefix")

    def stop() -> None:
        global _tracer
        _tracer = None
        provider.shutdown()

    return stop


class _OpenSpan:
    def __init__(self, opened: Any) -> None:
        self._opened = opened

    def set(self, **attributes: Value) -> None:
        self._opened.set_attributes(attributes)

    def end(self) -> None:
        self._opened.end()


@contextlib.contextmanager
def _inside(name: str, attributes: dict[str, Value]) -> Iterator[Span]:
    from opentelemetry import trace

    opened = _tracer.start_span(name, attributes=attributes)
    with trace.use_span(opened, end_on_exit=True, record_exception=False):
        yield _OpenSpan(opened)


def _parent_context() -> Any:
    from opentelemetry import context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    from antefix.telemetry.context import TRACE_KEY, callers_traceparent

    # Not the innermost span: the task may have been started in the context of another request.
    header = callers_traceparent()
    carrier = {TRACE_KEY: header} if header else {}
    return TraceContextTextMapPropagator().extract(carrier, context=context.Context())

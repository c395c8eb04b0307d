"""Metrics, log lines and traces of a process. This package knows no service; each service's package defines its own
metrics.
"""

from antefix.telemetry.context import bind_request, incoming, outgoing, request_id, trace_id
from antefix.telemetry.exposition import MetricsServer, Registry
from antefix.telemetry.shown import Kind, Shown, families
from antefix.telemetry.tracing import begin, span

__all__ = [
    "Kind",
    "MetricsServer",
    "Registry",
    "Shown",
    "begin",
    "bind_request",
    "families",
    "incoming",
    "outgoing",
    "request_id",
    "span",
    "trace_id",
]

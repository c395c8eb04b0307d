"""The request that the running code works for: its id and its W3C trace context, for every log line and every call.

Between processes, the id and the trace context travel in gRPC's metadata (`outgoing`, `incoming`). Within a process
they are in context variables, which each task has of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Final

REQUEST_KEY: Final = "x-request-id"
TRACE_KEY: Final = "traceparent"
# As long as a request's id may be; what is longer is nobody's id.
_ID_CHARACTERS_MAX: Final = 256
_TRACEPARENT: Final = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}")
# Metadata takes printable ASCII; an id with anything else goes without it.
_PRINTABLE: Final = re.compile(r"[ -~]+")

_request: ContextVar[str] = ContextVar("antefix_request", default="")
_parent: ContextVar[str] = ContextVar("antefix_traceparent", default="")


def request_id() -> str:
    """The id of the request that this task works for; "" if the task works for none."""
    return _request.get()


def trace_id() -> str:
    """The id of the request's trace, 32 hex digits; "" if there is no trace."""
    return traceparent()[3:35]


def traceparent() -> str:
    """The trace context to pass on: that of the innermost span, or the caller's if this process traces nothing; "" if
    there is none.
    """
    from antefix.telemetry import tracing

    return tracing.current_traceparent() or _parent.get()


def callers_traceparent() -> str:
    """The trace context that the caller passed on with the call that is being served; "" if it passed none."""
    return _parent.get()


def bind_request(identifier: str) -> None:
    """From now on, this task and the tasks that it starts work for this request."""
    _request.set(identifier)


def bind_parent(header: str) -> None:
    """Set the caller's trace context. A malformed one is ignored."""
    _parent.set(header if is_traceparent(header) else "")


def is_traceparent(header: str) -> bool:
    found = _TRACEPARENT.fullmatch(header)
    return found is not None and int(found[1], 16) > 0 and int(found[2], 16) > 0 and not header.startswith("ff")


def outgoing() -> tuple[tuple[str, str], ...] | None:
    """Metadata for a call that this task makes; None if there is nothing to send."""
    identifier, parent = _request.get(), traceparent()
    if not identifier and not parent:
        return None
    pairs = []
    if identifier and _PRINTABLE.fullmatch(identifier):
        pairs.append((REQUEST_KEY, identifier))
    if parent:
        pairs.append((TRACE_KEY, parent))
    return tuple(pairs)


def incoming(metadata: Iterable[tuple[str, str | bytes]] | None) -> None:
    """Take over the id and trace context that a caller passed on; the task that serves the call keeps them to
    its end.
    """
    _request.set("")
    _parent.set("")
    for key, value in metadata or ():
        if key == REQUEST_KEY:
            _request.set(str(value)[:_ID_CHARACTERS_MAX])
        elif key == TRACE_KEY:
            bind_parent(str(value))

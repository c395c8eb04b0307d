"""Wraps every HTTP request: adds an id to the answer and to log lines, a trace, a line in the access log, and counts.

Access logging does not read or log bodies. The request's path is chosen by the client, so it is logged encoded and cut
to a length.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterable
from typing import Final
from urllib.parse import quote

from prometheus_client import Counter
from prometheus_client.core import Metric
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from antefix.telemetry.context import bind_parent, bind_request
from antefix.telemetry.exposition import SECONDS, histogram
from antefix.telemetry.logs import ACCESS
from antefix.telemetry.shown import gauge
from antefix.telemetry.tracing import serving
from antefix.whole_number import whole_number
from antefix_router.front import REQUEST_ID_BYTES_MAX

log = logging.getLogger(ACCESS)

REQUEST_ID: Final = "antefix.request_id"
TENANT: Final = "antefix.tenant"
KEY_ID: Final = "antefix.key_id"
# nginx's status for a client that left before its answer began.
CLIENT_GONE: Final = 499
_PATH_CHARACTERS_MAX: Final = 200
_OTHER: Final = "(other)"


class HttpMeasures:
    """paths: the addresses that are counted by name; all others are counted together."""

    def __init__(self, paths: Iterable[str] = ()) -> None:
        self._paths = frozenset(paths)
        self.num_running = 0
        self._requests = Counter(
            "antefix_http_requests", "HTTP requests, by address and status.", ("path", "status"), registry=None
        )
        self._seconds = histogram(
            "antefix_http_request_seconds",
            "Time from an HTTP request to the end of its answer.",
            ("path",),
            buckets=SECONDS,
        )

    def count(self, path: str, status: int, seconds: float) -> None:
        path = path if path in self._paths else _OTHER
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def metrics(self) -> Iterable[Metric]:
        yield gauge(
            "antefix_http_running_requests", "HTTP requests that are being answered.", {(): float(self.num_running)}
        )
        yield from self._requests.collect()
        yield from self._seconds.collect()


class Access:
    """The outermost ASGI middleware."""

    def __init__(self, app: ASGIApp, measures: HttpMeasures) -> None:
        self._app = app
        self._measures = measures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = id_of(headers)
        scope[REQUEST_ID] = request_id
        bind_request(request_id)
        bind_parent(headers.get("traceparent", ""))
        answer = _Answer(send, request_id)
        started = time.perf_counter()
        self._measures.num_running += 1
        try:
            with serving("http", method=scope["method"], path=shown_path(scope)) as span:
                try:
                    await self._app(scope, receive, answer.send)
                finally:
                    span.set(status=answer.status)
        finally:
            self._measures.num_running -= 1
            seconds = time.perf_counter() - started
            self._measures.count(scope["path"], answer.status, seconds)
            _log(scope, headers, answer, seconds)


def id_of(headers: Headers) -> str:
    """The request's id: the client's `Idempotency-Key`, which allows retries, or an id made here."""
    key = headers.get("idempotency-key", "")
    return key if key and len(key.encode()) <= REQUEST_ID_BYTES_MAX else secrets.token_hex(12)


def shown_path(scope: Scope) -> str:
    return quote(scope["path"], safe="/:")[:_PATH_CHARACTERS_MAX]


class _Answer:
    """Watches an answer go out, and adds the request's id to its headers."""

    def __init__(self, send: Send, request_id: str) -> None:
        self.status = CLIENT_GONE
        self.num_bytes = 0
        self._send = send
        self._request_id = request_id

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message).setdefault("x-request-id", self._request_id)
        elif message["type"] == "http.response.body":
            self.num_bytes += len(message.get("body", b""))
        await self._send(message)


def _log(scope: Scope, headers: Headers, answer: _Answer, seconds: float) -> None:
    extra: dict[str, str | float] = {
        "status": answer.status,
        "duration_ms": round(1000 * seconds, 1),
        "request_bytes": whole_number(headers.get("content-length")) or 0,
        "response_bytes": answer.num_bytes,
    }
    if client := (scope.get("client") or ("",))[0]:
        extra["client"] = client
    if tenant := scope.get(TENANT):
        extra["tenant"] = tenant
    log.info("%s %s", scope["method"], shown_path(scope), extra=extra)

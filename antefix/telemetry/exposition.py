"""Metrics over HTTP, one address per service, for Prometheus and similar programs: as text or OpenMetrics, whichever
the caller asks for.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import prometheus_client
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import Metric

from antefix.errors import ConfigError
from antefix.keep_running import failures
from antefix.telemetry.logs import lines
from antefix.telemetry.shown import counter, gauge

Read = Callable[[], Iterable[Metric]]

# When a series began is what nobody here asks for, and it doubles their number.
prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
# Longest that a scrape waits for the event loop to read what belongs to it.
_LOOP_WAIT_S: Final = 10.0

# From a hit in memory on a small model to a cold run of a million tokens.
SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
# Between tokens, and of a sync.
SHORT_SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


def histogram(name: str, help_text: str, labels: tuple[str, ...] = (), *, buckets: tuple[float, ...]) -> Histogram:
    """A metric that belongs to the object that measures, and is shown by that object's package."""
    return Histogram(name, help_text, labels, buckets=buckets, registry=None)


class Registry:
    """The metrics of one service. role: the service's role."""

    def __init__(self, role: str) -> None:
        self.role = role
        self.collectors = CollectorRegistry(auto_describe=False)
        prometheus_client.ProcessCollector(registry=self.collectors)
        self.add(self._about)

    def add(self, read: Read) -> None:
        """Show the metrics that `read` returns at each scrape; `read` may be called from any thread."""
        self.collectors.register(_Reading(read))

    def add_in_loop(self, read: Read) -> None:
        """As `add`, for metrics that belong to the running event loop: they are read on that loop."""
        self.collectors.register(_Reading(_in_loop(asyncio.get_running_loop(), read)))

    def text(self) -> str:
        return prometheus_client.generate_latest(self.collectors).decode()

    def _about(self) -> Iterable[Metric]:
        # The root of this package, without importing what it names for its users.
        labels = {(sys.modules["antefix"].__version__, self.role): 1.0}
        yield gauge("antefix_build_info", "Which role of which version runs here.", labels, ("version", "role"))
        yield from lines.metrics()
        failed = {(loop,): float(number) for loop, number in failures.copy().items()}
        told = "Unexpected errors of background loops, which began again."
        yield counter("antefix_background_failures", told, failed, ("loop",))


class _Reading:
    """A collector of metrics in the form that prometheus-client wants."""

    def __init__(self, read: Read) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        return self._read()

    def describe(self) -> Iterable[Metric]:
        return ()


def _in_loop(loop: asyncio.AbstractEventLoop, read: Read) -> Read:
    async def run() -> list[Metric]:
        return list(read())

    def collect() -> Iterable[Metric]:
        with contextlib.suppress(RuntimeError):
            if asyncio.get_running_loop() is loop:
                return list(read())
        return asyncio.run_coroutine_threadsafe(run(), loop).result(_LOOP_WAIT_S)

    return collect


class _ThreadingServer(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Do not log clients that closed their connection, or whose TLS handshake failed."""


class _QuietHandler(WSGIRequestHandler):
    timeout = 30.0

    def log_message(self, format: str, *args: object) -> None:
        """Do not log scrapes."""


class MetricsServer:
    """Serves a registry of metrics in threads of its own until the process ends, or until `close`."""

    def __init__(self, registry: Registry, host: str, port: int, *, tls: ssl.SSLContext | None = None) -> None:
        """Raises:  ConfigError: the address cannot be listened on."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        kind = type("_Server", (_ThreadingServer,), {"address_family": family})
        try:
            app = prometheus_client.make_wsgi_app(registry.collectors)
            server: WSGIServer = make_server(host.strip("[]"), port, app, kind, handler_class=_QuietHandler)
        except OSError as err:
            raise ConfigError(f"--metrics-address {host}:{port}: {err}") from err
        if tls is not None:
            # The handshake is left to the thread that serves the connection: a slow one holds up nobody else.
            server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        self._server = server
        self._thread = threading.Thread(target=server.serve_forever, daemon=True)
        self._thread.start()
        self.address = f"{host}:{server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

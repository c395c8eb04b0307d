"""The settings of metrics, logs and traces, which every service has."""

from __future__ import annotations

from typing import Any, Protocol

from antefix.config import require, setting
from antefix.security.listening import parse_address
from antefix.security.process_security import OPEN, ProcessSecurity
from antefix.security.tls import http_context
from antefix.telemetry.exposition import MetricsServer, Registry
from antefix.telemetry.logs import FORMATS, LEVELS


def metrics_setting() -> Any:
    return setting("", "host:port that serves metrics (/metrics, for Prometheus); port 0 takes a free one; empty: none")


def log_level_setting() -> Any:
    return setting("info", f"lowest level that is logged: {', '.join(LEVELS)}")


def log_format_setting() -> Any:
    return setting("text", "how log lines are written: text or json")


def traces_setting() -> Any:
    return setting("", "OTLP collector (gRPC) for traces, such as http://127.0.0.1:4317; empty: nothing is traced")


def trace_share_setting() -> Any:
    return setting(1.0, "share of requests to trace, from 0 to 1, among those that bring no trace of their own")


class TelemetryConfig(Protocol):
    """The part of a service's settings that concerns metrics, logs and traces."""

    @property
    def metrics_address(self) -> str: ...
    @property
    def log_level(self) -> str: ...
    @property
    def log_format(self) -> str: ...
    @property
    def traces(self) -> str: ...
    @property
    def trace_share(self) -> float: ...


def check_telemetry(config: TelemetryConfig) -> None:
    """Raises:  ConfigError: a setting is none."""
    require(config.log_level in LEVELS, f"log_level must be one of {', '.join(LEVELS)}, is {config.log_level!r}")
    require(config.log_format in FORMATS, f"log_format must be text or json, is {config.log_format!r}")
    require(
        not config.traces or config.traces.startswith(("http://", "https://")),
        f"traces must be a URL such as http://127.0.0.1:4317, is {config.traces!r}",
    )
    require(0.0 <= config.trace_share <= 1.0, f"trace_share must be from 0 to 1, is {config.trace_share}")
    if config.metrics_address:
        parse_address(config.metrics_address)


def serve_metrics(config: TelemetryConfig, registry: Registry, security: ProcessSecurity = OPEN) -> str:
    """Serve these metrics, and those of `security`, until the process ends, if the settings ask for it.

    Returns the address, or "". Raises: ConfigError: the metrics address cannot be listened on, or other hosts could
    read metrics without TLS.
    """
    registry.add(security.metrics)
    if not config.metrics_address:
        return ""
    security.check_listening(config.metrics_address, flag="--metrics-address")
    tls = http_context(security.files, mutual=True) if security.files is not None else None
    return MetricsServer(registry, *parse_address(config.metrics_address), tls=tls).address

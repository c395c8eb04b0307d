"""Metrics of how the store answers this process's calls."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import Metric

from antefix.store.breaker import Breaker
from antefix.telemetry.shown import counter


def breaker_metrics(breaker: Breaker) -> Iterable[Metric]:
    """The metrics of one client's breaker."""
    yield counter(
        "antefix_store_client_silences",
        "Times that the store did not answer at all: it hung, or could not be reached.",
        {(): float(breaker.num_silences)},
    )
    yield counter(
        "antefix_store_client_slow_calls",
        "Calls to the store that took longer than their number of bytes should take.",
        {(): float(breaker.num_slow)},
    )
    yield counter(
        "antefix_store_client_spared_calls",
        "Calls to the store that were not made, because the store hung or was too slow.",
        {(): float(breaker.num_spared)},
    )

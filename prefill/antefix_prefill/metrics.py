"""What a prefill worker's queue shows to whoever scrapes it."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import Metric

from antefix.telemetry.shown import gauge
from antefix.window import Rates
from antefix_prefill.prefill_queue import PrefillQueue


def queue_metrics(queue: PrefillQueue, rates: Rates) -> Iterable[Metric]:
    yield gauge("antefix_prefill_running_prompts", "Prompts at work.", {(): float(queue.num_running)})
    yield gauge("antefix_prefill_waiting_prompts", "Prompts behind them.", {(): float(queue.num_waiting)})
    yield gauge(
        "antefix_prefill_speed", "Tokens that prefill computes in a second.", {(): float(rates.prefill_tokens_per_s)}
    )
    yield from queue.wait_s.collect()

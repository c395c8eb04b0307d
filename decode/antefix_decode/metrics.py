"""Metrics of a decode worker's scheduler."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import Metric

from antefix.telemetry.shown import Shown, Table, counter, families, gauge
from antefix_decode.scheduler import Scheduler
from antefix_prefill.metrics import PREFETCH
from antefix_prefill.prefetch import PrefetchCounters

STEPS: Table = {
    "graphs_recorded": Shown(
        name="antefix_decode_graphs_recorded", help="Decode steps that were recorded as CUDA graphs."
    ),
    "recording_errors": Shown(
        name="antefix_decode_recording_errors",
        help=(
            "Decode steps that could not be recorded as a CUDA graph; after the first failure, each step launches "
            "its kernels one by one."
        ),
    ),
    "steps_replayed": Shown(
        name="antefix_decode_steps_replayed", help="Decode steps that ran as a recorded CUDA graph."
    ),
    "steps_launched": Shown(
        name="antefix_decode_steps_launched",
        help="Decode steps of whole batches on a card that launched kernels one by one.",
    ),
}


def scheduler_metrics(scheduler: Scheduler, prefetch: PrefetchCounters) -> Iterable[Metric]:
    """prefetch: counters of prompts that waited for a place and that the worker restores itself."""
    yield gauge(
        "antefix_decode_running_sequences", "Sequences that are being decoded.", {(): float(scheduler.num_running)}
    )
    yield gauge(
        "antefix_decode_placed_sequences",
        "Sequences that are being decoded or loaded.",
        {(): float(scheduler.num_placed)},
    )
    yield gauge(
        "antefix_decode_waiting_requests",
        "Requests that wait for a place among the running sequences.",
        {(): float(scheduler.num_waiting)},
    )
    yield counter(
        "antefix_decode_held_back_sequences",
        "Sequences left out of a decode step because other tenants have a share of the worker too, summed over steps.",
        {(): float(scheduler.shares.num_held_back)},
    )
    yield counter("antefix_decode_tokens", "Tokens that decode steps computed.", {(): float(scheduler.num_tokens)})
    drafted, kept = {(): float(scheduler.num_drafted)}, {(): float(scheduler.num_drafts_kept)}
    yield counter(
        "antefix_decode_drafted_tokens", "Tokens that were drafted ahead and checked by a decode step.", drafted
    )
    yield counter("antefix_decode_drafts_kept", "Drafted tokens that the model confirmed.", kept)
    yield counter("antefix_decode_busy_seconds", "Time that decode steps took.", {(): scheduler.busy_s})
    yield gauge(
        "antefix_decode_speed",
        "Tokens per second of the time in which the worker decodes.",
        {(): scheduler.tokens_per_s},
    )
    if scheduler.step_counters is not None:
        yield from families(STEPS, scheduler.step_counters)
    yield from families(PREFETCH, prefetch)

"""Metrics of a prefill worker's queue."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from prometheus_client.core import Metric

from antefix.telemetry.shown import Shown, Table, families, gauge
from antefix.window import Rates
from antefix_prefill.prefetch import PrefetchCounters
from antefix_prefill.prefill_queue import PrefillQueue

# Metrics of the fields of `prefetch.PrefetchCounters`.
PREFETCH: Final[Table] = {
    "num_prefetched": Shown(
        name="antefix_prefill_prefetched_prompts",
        help="Prompts whose stored blocks were loaded while the prompts waited for their turn.",
    ),
    "num_blocks_prefetched": Shown(
        name="antefix_prefill_prefetched_blocks",
        help="Stored blocks that were loaded for prompts that waited for their turn.",
    ),
    "num_checkpoints_prefetched": Shown(
        name="antefix_prefill_prefetched_checkpoints",
        help="Checkpoints of window state that were read for prompts that waited for their turn.",
    ),
    "num_blocks_wanted": Shown(
        name="antefix_prefill_waited_blocks",
        help=(
            "Stored blocks of prompts that waited for a second or more. The blocks should be in memory at the "
            "prompt's turn."
        ),
    ),
    "num_blocks_found": Shown(
        name="antefix_prefill_waited_blocks_found",
        help=(
            "Stored blocks of prompts that waited for a second or more, if the blocks were in memory at the "
            "prompt's turn."
        ),
    ),
    "num_skipped": Shown(
        name="antefix_prefill_unprefetched_prompts",
        help=(
            "Prompts that waited and had no blocks loaded early, because memory was short or nothing was worth loading."
        ),
    ),
}


def queue_metrics(queue: PrefillQueue, rates: Rates, prefetch: PrefetchCounters) -> Iterable[Metric]:
    yield gauge("antefix_prefill_running_prompts", "Prompts that are being computed.", {(): float(queue.num_running)})
    yield gauge("antefix_prefill_waiting_prompts", "Prompts that wait for their turn.", {(): float(queue.num_waiting)})
    yield gauge(
        "antefix_prefill_speed", "Tokens that prefill computes per second.", {(): float(rates.prefill_tokens_per_s)}
    )
    yield from families(PREFETCH, prefetch)
    yield from queue.wait_s.collect()

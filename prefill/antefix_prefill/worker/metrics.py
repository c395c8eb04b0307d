"""Metrics that every worker has, about its store, its pools and its restore plans. The counters themselves belong to
the parts that count.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from prometheus_client.core import Metric

from antefix.objects.object_metrics import object_metrics
from antefix.objects.object_tier import ObjectTier
from antefix.store.breaker_metrics import breaker_metrics
from antefix.store.many_stores import ManyStores
from antefix.telemetry import Registry
from antefix.telemetry.shown import Kind, Shown, Table, counter, families, gauge
from antefix.window_pool import RedisWindowPool
from antefix_prefill.worker.engine import Engine

# Metrics of the fields of `store_counters.StoreCounters`; the last words of each name what is counted.
STORE: Final[Table] = {
    "errors": Shown(
        name="antefix_worker_store_errors",
        help="Failed calls to the store; each made the worker compute again what it could not read.",
    ),
    "by_kind": Shown(
        name="antefix_worker_store_errors_by_kind", help="Failed calls to the store, by the error's class.", key="error"
    ),
    "refused": Shown(
        name="antefix_worker_unstored_records", help="Records that a worker offered and the store did not accept."
    ),
    "refused_by_reason": Shown(
        name="antefix_worker_unstored_records_by_reason",
        help="Records that the store refused, by the reason of the refusal.",
        key="reason",
    ),
    "short_reads": Shown(
        name="antefix_worker_short_reads",
        help="Reads that returned fewer blocks than the look-up before them had promised.",
    ),
    "late_by_outcome": Shown(
        name="antefix_worker_late_store_calls",
        help=(
            "Times that a worker did not wait for a late store: what was restored or computed in the end, or written "
            "after the answer."
        ),
        key="outcome",
    ),
    "pool_refused": Shown(
        name="antefix_worker_pool_refused_checkpoints",
        help="Checkpoints of window state that the window pool did not accept.",
    ),
    "tokens_by_tier": Shown(
        name="antefix_worker_tier_read_tokens",
        help="Tokens whose KV was read from each tier, if there are several tiers.",
        key="tier",
    ),
    "bytes_by_tier": Shown(
        name="antefix_worker_tier_read_bytes",
        help="Payload bytes that were read from each tier, if there are several tiers.",
        key="tier",
    ),
}
# Metrics of the fields of `antefix.store.local_copies.CopyCounters`.
COPIES: Final[Table] = {
    "num_copied": Shown(
        name="antefix_worker_local_copies", help="Records copied from another host's store to the store on this host."
    ),
    "bytes_copied": Shown(
        name="antefix_worker_local_copy_bytes",
        help="Payload bytes copied from another host's store to the store on this host.",
    ),
    "num_over_budget": Shown(
        name="antefix_worker_local_copies_over_budget",
        help="Records not copied to this host's store, because the byte limit of copies was reached.",
    ),
    "num_failed": Shown(
        name="antefix_worker_local_copies_failed",
        help="Failed copies between stores: one store did not give, or the other did not accept, the record.",
    ),
}
# Metrics of the fields of `antefix.window.planner.KindRecord`, by plan.
PLANS: Final[Table] = {
    "num_plans": Shown(
        name="antefix_plans",
        help="Planned restores of prefixes, by the restore plan that was predicted to be the fastest.",
    ),
    "num_outcomes": Shown(
        name="antefix_plan_outcomes", help="Restores of prefixes that were carried out, by restore plan."
    ),
    "predicted_s": Shown(
        name="antefix_plan_predicted_seconds", help="Predicted time of the restores of prefixes that were carried out."
    ),
    "actual_s": Shown(
        name="antefix_plan_actual_seconds",
        help="Actual time of the restores that were carried out, until the whole prompt was computed.",
    ),
    "mean_error": Shown(
        name="antefix_plan_mean_error_ratio",
        help="Mean relative error |actual - predicted| / predicted of restore times; older restores count less.",
        kind=Kind.GAUGE,
    ),
    "stated_error": Shown(
        name="antefix_plan_stated_error_ratio",
        help="Relative error that the restore planner expects of its next predictions.",
        kind=Kind.GAUGE,
    ),
}
# Metrics of the fields of `antefix.events.kv_publisher.KvPublisherCounters`.
KV_EVENTS: Final[Table] = {
    "num_batches": Shown(name="antefix_worker_kv_event_batches", help="Messages of KV events that were published."),
    "num_events": Shown(name="antefix_worker_kv_events", help="KV events in the messages that were published."),
    "num_replays": Shown(name="antefix_worker_kv_event_replays", help="Requests of readers to send KV events again."),
}


def worker_metrics(engine: Engine) -> Iterable[Metric]:
    """Metrics of the objects that belong to the worker's event loop."""
    yield from families(STORE, engine.counters)
    yield from _tier_metrics(engine)
    records = {kind.value: record for kind, record in engine.planner.records.items()}
    for field, shown in PLANS.items():
        rows = {(kind,): float(getattr(record, field)) for kind, record in records.items()}
        make = counter if shown.kind is Kind.COUNTER else gauge
        yield make(shown.name, shown.help, rows, ("plan",))
    yield from engine.plans.errors.collect()
    yield from engine.compute.wait_s.collect()
    yield from engine.compute.busy_s.collect()
    yield counter(
        "antefix_compute_joined_chunks",
        "Chunks of prompts that shared a call of the model with another prompt's chunk.",
        {(): float(engine.compute.num_joined)},
    )
    blocks = engine.blocks
    yield gauge("antefix_pool_blocks", "Blocks of the worker's pool.", {(): float(engine.pool.num_blocks)})
    yield gauge(
        "antefix_pool_resident_blocks", "Finished blocks in the worker's pool.", {(): float(blocks.num_resident)}
    )
    yield gauge(
        "antefix_pool_available_blocks", "Free or idle blocks in the worker's pool.", {(): float(blocks.num_available)}
    )
    yield counter(
        "antefix_pool_evicted_blocks",
        "Idle blocks that were dropped to make room for others.",
        {(): float(blocks.num_evicted)},
    )
    yield counter(
        "antefix_worker_too_large_requests",
        "Requests that could never fit this worker's pool.",
        {(): float(engine.num_too_large)},
    )
    yield from _of_ranks(engine)
    yield from _of_offload(engine)
    seals = engine.seals.num_broken + getattr(engine.store, "num_broken_seals", 0)
    yield counter(
        "antefix_worker_broken_seals",
        "Records that were read and had no valid seal of this deployment.",
        {(): float(seals)},
    )
    breaker = getattr(engine.store, "breaker", None)
    if breaker is not None:
        yield from breaker_metrics(breaker)
    yield gauge(
        "antefix_worker_checkpoint_bytes",
        "Bytes of checkpoints in the store, as the strategy's budget counts them.",
        {(): float(engine.budget.state.used_bytes)},
    )
    if engine.kv_events is not None:
        yield from families(KV_EVENTS, engine.kv_events.counters)
    pool = engine.window_pool
    if isinstance(pool, RedisWindowPool):
        yield counter(
            "antefix_window_pool_corrupt_records",
            "Checkpoints in Redis that were damaged or forged.",
            {(): float(pool.num_corrupt)},
        )
        yield counter(
            "antefix_window_pool_forged_records",
            "Checkpoints in Redis without a valid seal of this deployment.",
            {(): float(pool.num_forged)},
        )
        yield gauge(
            "antefix_window_pool_limit_bytes",
            "Redis memory that the window pool may take.",
            {(): float(pool.bytes_max)},
        )


def _of_ranks(engine: Engine) -> Iterable[Metric]:
    ranks = engine.model.ranks
    yield gauge(
        "antefix_worker_ranks", "Processes that run the worker's model.", {(): float(ranks.size if ranks else 1)}
    )
    if ranks is None:
        return
    yield counter("antefix_worker_rank_calls", "Calls of the model over all ranks.", {(): float(ranks.time.num_calls)})
    times = {("exchange",): ranks.time.exchange_s, ("all",): ranks.time.call_s}
    yield counter(
        "antefix_worker_rank_seconds",
        "Time of the model's calls (on a card, of a sample of them), and the time in which ranks exchange numbers.",
        times,
        ("part",),
    )


def _of_offload(engine: Engine) -> Iterable[Metric]:
    offload = engine.model.offload
    if offload is None:
        return
    layers = {("fetched",): float(offload.num_fetched), ("awaited",): float(offload.num_waits)}
    yield counter(
        "antefix_worker_offloaded_layers",
        "Layers whose experts were fetched from host memory, and layers that had to wait for that.",
        layers,
        ("what",),
    )


def worker_registry(role: str, engine: Engine) -> Registry:
    """The metrics that every worker has, besides its own service's. Needs a running event loop."""
    registry = Registry(role)
    registry.add_in_loop(lambda: worker_metrics(engine))
    return registry


def _tier_metrics(engine: Engine) -> Iterable[Metric]:
    """If there are several stores: the state and the speed that the worker assumes for each store."""
    store = engine.store
    if not isinstance(store, ManyStores):
        return
    tiers = {(tier.label,): tier for tier in store.tiers}
    yield gauge(
        "antefix_tier_latency_seconds",
        "Predicted time of a read of zero bytes.",
        {name: tier.speed.latency_s for name, tier in tiers.items()},
        ("tier",),
    )
    yield gauge(
        "antefix_tier_bytes_per_second",
        "Predicted speed of a read.",
        {name: tier.speed.bytes_per_s for name, tier in tiers.items()},
        ("tier",),
    )
    yield counter(
        "antefix_tier_failures",
        "Times that a tier did not answer, or not in time; each became a miss or a read from another tier.",
        {name: float(tier.num_failures) for name, tier in tiers.items()},
        ("tier",),
    )
    yield counter(
        "antefix_tier_late_answers",
        "Times that a reader stopped waiting for a tier; after three in a row the tier is left alone for a moment.",
        {name: float(tier.standing.num_late) for name, tier in tiers.items()},
        ("tier",),
    )
    for tier in store.tiers:
        if isinstance(tier.source, ObjectTier):
            yield from object_metrics(tier.source)
    if store.copies is not None:
        yield from families(COPIES, store.copies.counters)

"""The store's metrics, as a scraper reads them: names and descriptions for the engine's counters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from prometheus_client.core import Metric

from antefix.record import MEMORY_KINDS
from antefix.telemetry.shown import Kind, Shown, Table, counter, families, gauge
from antefix_kvstore.engine_stats import collect
from antefix_kvstore.group_commit import GroupCommitter
from antefix_kvstore.memory_records import MemoryRecords
from antefix_kvstore.scrubber import Scrubber
from antefix_kvstore.storage_engine import StorageEngine

_RECORDS = "antefix_store_records"
_EVICTED = "antefix_store_evicted_records"
_EVICTED_HELP = "Records that were dropped, by reason: space (for others), expired, or asked (by a call)."
_CORRUPT = "antefix_store_quarantined_records"
_CORRUPT_HELP = (
    "Records that failed a check and are misses now: corrupt, forged (no seal of this deployment) or unusable (right"
    " bytes that hold NaN, infinity or far too large numbers)."
)

# Fields of `engine_stats.StoreStats.numbers`, which are also fields of StatsResponse.
STATS: Final[Table] = {
    "budget_bytes": Shown(
        name="antefix_store_budget_bytes", help="Disk space that the store may use.", kind=Kind.GAUGE
    ),
    "limit_bytes": Shown(
        name="antefix_store_limit_bytes",
        help="Bytes of the store's size limit for which its file system has room now.",
        kind=Kind.GAUGE,
    ),
    "used_bytes": Shown(
        name="antefix_store_used_bytes", help="Disk space that segments, index and reserve use.", kind=Kind.GAUGE
    ),
    "index_bytes": Shown(name="antefix_store_index_bytes", help="Bytes that the index takes.", kind=Kind.GAUGE),
    "dead_bytes": Shown(
        name="antefix_store_dead_bytes",
        help="Bytes of deleted records in segments that compaction has not freed yet.",
        kind=Kind.GAUGE,
    ),
    "segments": Shown(name="antefix_store_segments", help="Segment files.", kind=Kind.GAUGE),
    "free_bytes": Shown(
        name="antefix_store_disk_free_bytes", help="Free bytes on the store's file system.", kind=Kind.GAUGE
    ),
    "free_bytes_min": Shown(
        name="antefix_store_disk_free_min_bytes",
        help="Free bytes that the store leaves on its file system for other programs.",
        kind=Kind.GAUGE,
    ),
    "quarantined": Shown(
        name="antefix_store_quarantine_records",
        help="Damaged records that are set aside and still in the store.",
        kind=Kind.GAUGE,
    ),
    "evictions": Shown(name=_EVICTED, help=_EVICTED_HELP, labels=(("cause", "space"),)),
    "expirations": Shown(name=_EVICTED, help=_EVICTED_HELP, labels=(("cause", "expired"),)),
    "corrupt": Shown(name=_CORRUPT, help=_CORRUPT_HELP, labels=(("cause", "corrupt"),)),
    "forged": Shown(name=_CORRUPT, help=_CORRUPT_HELP, labels=(("cause", "forged"),)),
    "hits": Shown(name="antefix_store_read_records", help="Records that readers found."),
    "misses": Shown(
        name="antefix_store_missed_records", help="Records that readers asked for and the store did not return."
    ),
    "bytes_read": Shown(name="antefix_store_read_bytes", help="Payload bytes that were read."),
    "bytes_written": Shown(name="antefix_store_written_bytes", help="Bytes that puts appended to segment files."),
    "refused": Shown(
        name="antefix_store_refused_records", help="Records that a put offered and the store did not keep."
    ),
    "impossible_writes": Shown(
        name="antefix_store_impossible_writes", help="Writes that the store can never accept, whatever its state."
    ),
    "compacted_bytes": Shown(name="antefix_store_compacted_bytes", help="Bytes that compaction copied."),
    "syncs": Shown(name="antefix_store_syncs", help="Syncs of segments for puts."),
}
# Fields of `storage_engine.Counters` that StatsResponse does not have.
ENGINE: Final[Table] = {
    "puts": Shown(name="antefix_store_put_records", help="Records that puts stored."),
    "payload_bytes_written": Shown(
        name="antefix_store_written_payload_bytes", help="Uncompressed payload bytes that puts stored."
    ),
    "unusable": Shown(name=_CORRUPT, help=_CORRUPT_HELP, labels=(("cause", "unusable"),)),
    "heals": Shown(
        name="antefix_store_heals", help="Times that the index was rebuilt because files of the store were damaged."
    ),
    "asked": Shown(name=_EVICTED, help=_EVICTED_HELP, labels=(("cause", "asked"),)),
}
# Fields of `space.SpaceCounters` that StatsResponse does not have.
SPACE: Final[Table] = {
    "dropped_segments": Shown(
        name="antefix_store_dropped_segments", help="Segment files whose disk space was given back."
    ),
}
# Fields of `scrubber.ScrubCounters`.
SCRUBBER: Final[Table] = {
    "passes": Shown(name="antefix_store_scrub_passes", help="Complete passes of the scrubber over all records."),
    "records": Shown(name="antefix_store_scrubbed_records", help="Records that the scrubber read."),
    "bytes": Shown(name="antefix_store_scrubbed_bytes", help="Bytes that the scrubber read."),
    "corrupt": Shown(name="antefix_store_scrub_corrupt_records", help="Damaged records that the scrubber found."),
}


def store_metrics(engine: StorageEngine, scrubber: Scrubber, writer: GroupCommitter) -> Iterable[Metric]:
    """Metrics that any thread may read."""
    if not engine.is_open:
        return
    stats, counters, space = collect(engine), engine.counters, engine.space.counters
    own = {name: getattr(counters, name) for name in ENGINE} | {name: getattr(space, name) for name in SPACE}
    yield from families({**STATS, **ENGINE, **SPACE}, {**stats.numbers, **own})
    yield from families(SCRUBBER, scrubber.counters)
    kinds = {(kind.name.lower(),): counted for kind, counted in stats.kinds.items()}
    yield gauge(_RECORDS, "Records on disk.", {kind: counted.records for kind, counted in kinds.items()}, ("kind",))
    yield gauge(
        "antefix_store_stored_bytes",
        "Bytes of records on disk, with headers, after compression.",
        {kind: counted.stored_bytes for kind, counted in kinds.items()},
        ("kind",),
    )
    yield gauge(
        "antefix_store_payload_bytes",
        "Payload bytes of records on disk, before compression.",
        {kind: counted.payload_bytes for kind, counted in kinds.items()},
        ("kind",),
    )
    yield gauge(
        "antefix_store_stopped",
        "1 while the store accepts no records, because its disk is full.",
        {(): float(bool(stats.texts["stopped"]))},
    )
    yield gauge(
        "antefix_store_queued_bytes", "Bytes of puts that wait for the writer.", {(): float(writer.queued_bytes)}
    )
    yield counter(
        "antefix_store_log_lost_lines",
        "Lines of the store's log of hits that could not be written.",
        {(): float(engine.num_log_lines_lost)},
    )
    yield from engine.writer.sync_s.collect()
    fresh = engine.segments.fresh
    yield counter(
        "antefix_store_direct_written_bytes",
        "Bytes that puts wrote past the page cache.",
        {(): float(fresh.written_bytes)},
    )
    yield counter(
        "antefix_store_read_back_bytes",
        "Bytes that were read into the page cache after puts had written them past it.",
        {(): float(fresh.read_bytes)},
    )
    cache = engine.reader.page_cache
    yield counter(
        "antefix_store_page_cache_samples",
        "Blocks that look-ups sampled, by whether the page cache of this host had them.",
        {("yes",): float(cache.num_cached), ("no",): float(cache.num_sampled - cache.num_cached)},
        ("cached",),
    )


def memory_metrics(pool: MemoryRecords, num_streams: int) -> Iterable[Metric]:
    """Metrics that only the event loop may read."""
    counts = {(kind.name.lower(),): pool.count(kind) for kind in MEMORY_KINDS}
    records = {kind: float(number) for kind, (number, _) in counts.items()}
    nbytes = {kind: float(total) for kind, (_, total) in counts.items()}
    yield gauge("antefix_store_memory_records", "Handoffs and pooled checkpoints in memory.", records, ("kind",))
    yield gauge("antefix_store_memory_bytes", "Bytes that handoffs and pooled checkpoints take.", nbytes, ("kind",))
    yield gauge(
        "antefix_store_memory_limit_bytes",
        "Bytes that handoffs and pooled checkpoints may take.",
        {(): float(pool.bytes_max)},
    )
    yield counter(
        "antefix_store_memory_dropped_records",
        "Handoffs and pooled checkpoints that were dropped to make room, or expired.",
        {(cause,): float(number) for cause, number in pool.num_dropped.items()},
        ("cause",),
    )
    yield gauge("antefix_store_streams", "Payload streams that are being served.", {(): float(num_streams)})

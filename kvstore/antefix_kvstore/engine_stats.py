"""What a store holds and has done, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

from antefix.record import RecordKind
from antefix_kvstore.storage_engine import StorageEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class KindCount:
    records: int
    stored_bytes: int
    payload_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreStats:
    """numbers, texts: named like the fields of StatsResponse in kvstore.proto; counters since the engine was opened."""

    kinds: dict[RecordKind, KindCount]
    numbers: dict[str, int]
    texts: dict[str, str]


def collect(engine: StorageEngine) -> StoreStats:
    totals = engine.totals()
    kinds = {}
    for kind in (RecordKind.BLOCK, RecordKind.CHECKPOINT):
        records, stored_bytes, payload_bytes = totals.get(b"k" + bytes([kind]), (0, 0, 0))
        kinds[kind] = KindCount(records=records, stored_bytes=stored_bytes, payload_bytes=payload_bytes)
    with engine.index.txn() as txn:
        quarantined = engine.index.num_quarantined(txn)
    counters, space = engine.counters, engine.space
    numbers = {
        "budget_bytes": space.budget_bytes,
        "used_bytes": space.used_bytes,
        "index_bytes": space.index_bytes,
        "segments": len(engine.segments.sizes),
        "dead_bytes": max(0, engine.segments.used_bytes - sum(count.stored_bytes for count in kinds.values())),
        "quarantined": quarantined,
        "evictions": space.counters.evictions,
        "expirations": space.counters.expirations,
        "compacted_bytes": space.counters.compacted_bytes,
        "corrupt": counters.corrupt,
        "forged": counters.forged,
        "hits": counters.hits,
        "misses": counters.misses,
        "bytes_read": counters.bytes_read,
        "bytes_written": counters.bytes_written,
        "refused": counters.refused,
        "syncs": counters.syncs,
        "limit_bytes": max(0, space.limit_bytes),
        "free_bytes": space.free.nbytes,
        "free_bytes_min": space.free.margin_bytes,
        "impossible_writes": counters.impossible,
    }
    texts = {"stopped": space.stopped, "impossible_write": counters.last_impossible}
    return StoreStats(kinds=kinds, numbers=numbers, texts=texts)

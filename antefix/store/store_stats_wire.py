"""Converts a store's totals from protobuf."""

from __future__ import annotations

from antefix.record import RecordKind
from antefix.store.store_stats import KindTotals, StoreTotals
from antefix.v1 import kvstore_pb2


def totals_from_wire(answer: kvstore_pb2.StatsResponse) -> StoreTotals:
    """The totals of a store in an answer that has already been validated."""
    kinds = dict.fromkeys(RecordKind, KindTotals())
    for kind in answer.kinds:
        kinds[RecordKind(kind.kind)] = KindTotals(
            num_records=kind.records, stored_bytes=kind.stored_bytes, payload_bytes=kind.payload_bytes
        )
    return StoreTotals(
        kinds=kinds,
        budget_bytes=answer.budget_bytes,
        used_bytes=answer.used_bytes,
        hits=answer.hits,
        misses=answer.misses,
        bytes_read=answer.bytes_read,
        bytes_written=answer.bytes_written,
        evictions=answer.evictions,
        corrupt=answer.corrupt,
        limit_bytes=answer.limit_bytes,
        free_bytes=answer.free_bytes,
        free_bytes_min=answer.free_bytes_min,
        stopped=answer.stopped,
        impossible_writes=answer.impossible_writes,
        impossible_write=answer.impossible_write,
    )

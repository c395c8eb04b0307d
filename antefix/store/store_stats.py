"""A store service's numbers, as values."""

from __future__ import annotations

from dataclasses import dataclass

from antefix import rpc
from antefix.record import RecordKind
from antefix.store.client import RemoteStore
from antefix.v1 import kvstore_pb2

_DEADLINE_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class KindTotals:
    """stored_bytes: on disk, headers and compression included.  payload_bytes: what reads return."""

    num_records: int = 0
    stored_bytes: int = 0
    payload_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreTotals:
    """used_bytes: of the budget, segments and index together. Counters are since the service started.

    limit_bytes: what it may use now, of the budget; free_bytes, free_bytes_min: of its file system, and what it leaves
    of that.  stopped: why nothing is stored now, or empty.  impossible_writes: could never be stored; the last reason.
    """

    kinds: dict[RecordKind, KindTotals]
    budget_bytes: int
    used_bytes: int
    hits: int
    misses: int
    bytes_read: int
    bytes_written: int
    evictions: int
    corrupt: int
    limit_bytes: int = 0
    free_bytes: int = 0
    free_bytes_min: int = 0
    stopped: str = ""
    impossible_writes: int = 0
    impossible_write: str = ""


async def read_stats(store: RemoteStore) -> StoreTotals:
    """Ask the service.

    Raises:  Unavailable: it does not answer.
    """
    with rpc.rpc_errors():
        answer = await store.stub.Stats(kvstore_pb2.StatsRequest(), timeout=_DEADLINE_S)
    kinds = {
        RecordKind(kind.kind): KindTotals(
            num_records=kind.records, stored_bytes=kind.stored_bytes, payload_bytes=kind.payload_bytes
        )
        for kind in answer.kinds
    }
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

"""Keeps the store within its budget: expiry, leaf-first eviction, and when to compact (`antefix_kvstore.compaction`).

The budget covers everything under the directory. How much of the budget can be used depends on the free space of the
file system (`antefix_kvstore.free_space`). A reserve of two segments inside the budget is never given to puts, so that
compaction, which copies before it deletes, always has room.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import Final

from antefix.errors import StoreFull
from antefix.miss_reason import MissReason
from antefix.record import RecordKind, RecordName
from antefix.store_files.gone_blocks import GoneWriter
from antefix.store_files.index import Index
from antefix.store_files.record_format import (
    BATCH_ALIGN,
    SEGMENT_HEADER_BYTES,
    RecordFlag,
)
from antefix_kvstore.compaction import Compactor, SpaceCounters
from antefix_kvstore.disk_reserve import DiskReserve
from antefix_kvstore.eviction import ahead_bytes, victims
from antefix_kvstore.free_space import FreeSpace
from antefix_kvstore.index_writer import IndexTxn
from antefix_kvstore.segments import Segments

log = logging.getLogger("antefix_kvstore.space")

# The share of the usable space that live data may fill. The rest is dead space that waits for compaction; with less
# dead space, compaction copies more for each byte it frees. Measured: bytes written per byte put into a full store,
# with shares of 0.75, 0.80 and 0.85: 1.35, 1.47 and 1.64 for conversations that are used again now and then; 1.52, 1.72
# and 2.74 for small blocks.
LIVE_SHARE_MAX: Final = 0.80
EXPIRE_RECORDS_MAX: Final = 4096
# A segment that frees less than this share is not worth compacting, even when space is short.
COMPACT_GAIN_MIN: Final = 1 / 16


class Space:
    """The object is not thread-safe, because the engine's lock protects it."""

    def __init__(
        self,
        segments: Segments,
        index: Index,
        budget_bytes: int,
        *,
        now_ms: Callable[[], int],
        free: FreeSpace,
    ) -> None:
        self._segments = segments
        self._index = index
        self._now_ms = now_ms
        self.budget_bytes = budget_bytes
        self.reserve = DiskReserve(index.directory.parent, budget_bytes)
        self._gone = GoneWriter(index.directory.parent, budget_bytes)
        self._limit_bytes_max = budget_bytes - 2 * segments.segment_bytes
        self.limit_bytes = self._limit_bytes_max
        self.free = free
        # Why the store stores nothing now; empty while it does.
        self.stopped = ""
        self.counters = SpaceCounters()
        self.compactor = Compactor(segments, index, self.counters, now_ms=now_ms)

    @property
    def index_bytes(self) -> int:
        return (self._index.directory / "data.mdb").stat().st_size

    @property
    def used_bytes(self) -> int:
        return self._segments.used_bytes + self.index_bytes + self.reserve.nbytes + self._gone.nbytes

    def make_room(self, nbytes: int, keep: Collection[RecordName]) -> None:
        """Make sure that a batch of `nbytes` may be appended.

        keep: records that the batch depends on, which may not be evicted. Raises: StoreFull: the batch does not fit the
        budget.
        """
        nbytes += BATCH_ALIGN + SEGMENT_HEADER_BYTES
        if self.free.is_sudden:
            self._leave_margin(nbytes)
        if self.used_bytes + nbytes > self.limit_bytes:
            self._free_up(nbytes, keep)
        self._leave_margin(nbytes)

    def follow_disk(self) -> None:
        """Adjust the limit to the free space of the file system, for example when a ledger on it grows."""
        free = self.free
        self._segments.wait_freed()
        if not free.is_sudden:
            can_hold = self.used_bytes + free.room() - 2 * self._segments.segment_bytes
            self.limit_bytes = min(self._limit_bytes_max, max(can_hold, free.fair_share_bytes))
        if self.stopped and free.room() > 0:
            self._leave_margin(0)  # logs that storing continues

    def _leave_margin(self, nbytes: int) -> None:
        """Raises:  StoreFull: writing `nbytes` would leave too little free space on the disk for others."""
        free = self.free
        if not free.has_room(nbytes):
            self._segments.wait_freed()
        stopped = "" if free.has_room(nbytes) else f"the file system has no more than {free.nbytes} bytes free"
        if bool(stopped) != bool(self.stopped):
            if stopped:
                log.warning(
                    "nothing is stored now: %s, and %d bytes must stay free for other programs",
                    stopped,
                    free.margin_bytes,
                )
            else:
                log.warning("the file system has room again, so the store stores again")
        self.stopped = stopped
        if stopped:
            raise StoreFull(stopped)

    def _free_up(self, nbytes: int, keep: Collection[RecordName]) -> None:
        self.expire()
        fixed = self.index_bytes + self.reserve.nbytes + self._gone.nbytes
        live_max = int(LIVE_SHARE_MAX * (self.limit_bytes - fixed))
        ahead = ahead_bytes(self.limit_bytes)
        while self.used_bytes + nbytes > self.limit_bytes:
            if self.compactor.drop_dead():
                continue
            live = sum(state.live_bytes for state in self.compactor.states().values())
            excess = live + nbytes - live_max
            if excess > 0:
                if self.evict(excess + ahead, keep):
                    continue
                raise StoreFull(
                    f"the store's budget of {self.budget_bytes} bytes is full of records that may not be evicted"
                )
            wanted = self.used_bytes + nbytes + ahead - self.limit_bytes
            if self.compactor.compact_together(COMPACT_GAIN_MIN, wanted) is None:
                # Segments have so little dead space that none is worth compacting until more live data is evicted.
                if live_max <= 0:
                    raise StoreFull(f"the store's budget of {self.budget_bytes} bytes is too small for this record")
                live_max -= ahead + nbytes

    def evict(self, nbytes: int, keep: Collection[RecordName] = (), *, owners: Collection[bytes] | None = None) -> int:
        """Evict leaves, lowest rank first, until `nbytes` are dead. Returns the number of records evicted.

        owners: evict only these owners' records.
        """
        now_ms = self._now_ms()
        num_taken = freed = 0
        with self._gone.together(), self.compactor.transaction() as txn:
            numbers = None if owners is None else {txn.known_owner_id(owner) for owner in owners} - {None}
            if numbers is not None and not numbers:
                return 0

            def evictable(name: RecordName) -> bool:
                entry = txn.get(name)
                if entry is None or entry.children or entry.pinned_ms > now_ms or name in keep:
                    return False
                return numbers is None or entry.tenant_id in numbers

            def remove(name: RecordName) -> tuple[int, RecordName] | None:
                nonlocal freed
                entry = txn.get(name)
                freed += entry.extent_bytes if entry else 0
                return self.remove(txn, name)

            if nbytes > 0:
                for _ in victims(txn.leaves(), remove=remove, evictable=evictable):
                    num_taken += 1
                    if freed >= nbytes:
                        break
        self.compactor.delete(txn.dropped)
        self.counters.evictions += num_taken
        return num_taken

    def expire(self) -> int:
        """Drop expired leaves, and ancestors that become leaves and have expired too."""
        now_ms = self._now_ms()
        num_taken = 0
        with self._index.txn() as probe, probe.cursor(db=self._index.db["expiry"]) as cursor:
            due = cursor.first() and int.from_bytes(cursor.key()[:8], "big") <= now_ms
        if not due:
            return 0
        with self._gone.together(), self.compactor.transaction() as txn:
            waiting = txn.expiring(now_ms)[:EXPIRE_RECORDS_MAX]
            while waiting:
                name = waiting.pop()
                entry = txn.get(name)
                if entry is None or entry.children or entry.pinned_ms > now_ms:
                    continue
                if not entry.expires_ms or entry.expires_ms > now_ms:
                    continue
                parent = self.remove(txn, name)
                num_taken += 1
                if parent is not None:
                    waiting.append(parent[1])
        self.compactor.delete(txn.dropped)
        self.counters.expirations += num_taken
        return num_taken

    def remove(self, txn: IndexTxn, name: RecordName) -> tuple[int, RecordName] | None:
        """Remove a leaf. Returns the parent of the removed leaf with its rank if the parent is a leaf now, else None.

        The parent inherits time of last use and time to live: a use of a record is a use of its ancestors.
        """
        entry = txn.get(name)
        assert entry is not None and entry.children == 0, "only leaves are removed"
        if name[0] is RecordKind.BLOCK:
            is_over = entry.expires_ms and entry.expires_ms <= self._now_ms()
            self._gone.note(name[1], MissReason.EXPIRED if is_over else MissReason.EVICTED)
        parent_name = parent_of(name, entry.parent)
        # A record stored apart, before its parent, is not counted among that parent's children.
        parent = None if entry.flags & RecordFlag.APART else txn.get(parent_name)
        txn.delete(name)
        if parent is None:
            return None
        parent.children -= 1
        if name[0] is RecordKind.BLOCK:
            parent.rank_ms = max(parent.rank_ms, entry.rank_ms)
            if parent.expires_ms:
                parent.expires_ms = max(parent.expires_ms, entry.expires_ms)
        return None if parent.children else (parent.rank_ms, parent_name)


def parent_of(name: RecordName, parent: bytes) -> RecordName:
    """The record that this one depends on: for a block the block before it, for a checkpoint the block of the same
    hash.
    """
    return (RecordKind.BLOCK, parent if name[0] is RecordKind.BLOCK else name[1])

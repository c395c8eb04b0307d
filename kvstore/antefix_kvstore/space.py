"""Keeping the store inside its budget: expiry, leaf-first eviction, and when to compact (`antefix_kvstore.compaction`).

The budget covers everything under the directory; how much of it may be used follows what the file system has free
(`antefix_kvstore.free_space`). A reserve of two segments inside it is never given to puts, so that
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

# Live data may fill this much of what puts may use. The rest is dead space waiting for compaction: less of it means
# that compaction copies more for each byte it frees. Bytes written per byte put into a full store, of conversations
# that are used again now and then, with 0.75, 0.80 and 0.85: 1.35, 1.47 and 1.64; of small blocks 1.52, 1.72 and 2.74.
LIVE_SHARE_MAX: Final = 0.80
EXPIRE_RECORDS_MAX: Final = 4096
# Below this gain a segment is not worth copying, even when space is short.
COMPACT_GAIN_MIN: Final = 1 / 16


class Space:
    """Not thread-safe: the engine's lock covers it."""

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
        # Why nothing is stored now; empty while it is.
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
        """See to it that a batch of `nbytes` may be appended.

        keep: records that the batch depends on.  Raises:  StoreFull: the budget cannot hold it.
        """
        nbytes += BATCH_ALIGN + SEGMENT_HEADER_BYTES
        if self.free.is_sudden:
            self._leave_margin(nbytes)
        if self.used_bytes + nbytes > self.limit_bytes:
            self._free_up(nbytes, keep)
        self._leave_margin(nbytes)

    def follow_disk(self) -> None:
        """Let the limit follow what the file system has, as when a ledger next to the store grows."""
        free = self.free
        self._segments.wait_freed()
        if not free.is_sudden:
            can_hold = self.used_bytes + free.room() - 2 * self._segments.segment_bytes
            self.limit_bytes = min(self._limit_bytes_max, max(can_hold, free.fair_share_bytes))
        if self.stopped and free.room() > 0:
            self._leave_margin(0)  # says that it continues

    def _leave_margin(self, nbytes: int) -> None:
        """Raises:  StoreFull: writing so much would leave too little of the disk to others."""
        free = self.free
        if not free.has_room(nbytes):
            self._segments.wait_freed()
        stopped = "" if free.has_room(nbytes) else f"the file system has no more than {free.nbytes} bytes free"
        if bool(stopped) != bool(self.stopped):
            if stopped:
                log.warning("nothing is stored now: %s, and %d are for others", stopped, free.margin_bytes)
            else:
                log.warning("the file system has room again: the store stores again")
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
                raise StoreFull(f"the store's budget of {self.budget_bytes} bytes is taken by records that must stay")
            wanted = self.used_bytes + nbytes + ahead - self.limit_bytes
            if self.compactor.compact_together(COMPACT_GAIN_MIN, wanted) is None:
                # Live data lies so densely that only evicting more of it makes segments worth compacting.
                if live_max <= 0:
                    raise StoreFull(f"the store's budget of {self.budget_bytes} bytes is too small for this record")
                live_max -= ahead + nbytes

    def evict(self, nbytes: int, keep: Collection[RecordName] = (), *, owners: Collection[bytes] | None = None) -> int:
        """Take leaves, lowest rank first, until `nbytes` are dead. Returns how many records went.

        owners: take these owners' only.
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
        """Drop leaves past their time, and the ancestors that this exposes and that are past theirs."""
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
        """Take a leaf out. Returns its parent with its rank, if that is a leaf now.

        The parent inherits recency and time to live: using a record was using its ancestors.
        """
        entry = txn.get(name)
        assert entry is not None and entry.children == 0, "only leaves are removed"
        if name[0] is RecordKind.BLOCK:
            is_over = entry.expires_ms and entry.expires_ms <= self._now_ms()
            self._gone.note(name[1], MissReason.EXPIRED if is_over else MissReason.EVICTED)
        parent_name = parent_of(name, entry.parent)
        # A parent that came after its child does not count it.
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
    """What a record depends on: a block on the block before it, a checkpoint on the block of the same hash."""
    return (RecordKind.BLOCK, parent if name[0] is RecordKind.BLOCK else name[1])

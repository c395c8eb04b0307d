"""Keeping the store inside its budget: expiry, leaf-first eviction, dropping dead segments, compacting half-dead ones.

The budget covers everything under the directory; how much of it may be used follows what the file system has free
(`antefix_kvstore.free_space`). A reserve of two segments inside it is never given to puts, so that
compaction, which copies before it deletes, always has room. Order everywhere: the index lets go first, then the file
goes; a crash between leaves an unreferenced file, which opening drops.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Final

from antefix.errors import StoreFull
from antefix.miss_reason import MissReason
from antefix.record import STORED_KINDS, RecordKind, RecordName
from antefix.store_files.gone_blocks import GoneWriter
from antefix.store_files.index import Index
from antefix.store_files.record_format import (
    BATCH_ALIGN,
    RECORD_HEADER_BYTES,
    SEGMENT_HEADER_BYTES,
    RecordFlag,
    align,
    payload_checksum,
)
from antefix.store_files.record_header import RecordHeader
from antefix_kvstore.disk_reserve import DiskReserve
from antefix_kvstore.eviction import victims
from antefix_kvstore.free_space import FreeSpace
from antefix_kvstore.index_writer import IndexTxn, SegmentState, read_segments
from antefix_kvstore.segments import Draft, Segments

log = logging.getLogger("antefix_kvstore.space")

# Live data may fill this much of what puts may use. The rest is dead space waiting for compaction: less of it means
# that compaction copies more for each byte it frees.
LIVE_SHARE_MAX: Final = 0.85
# Eviction frees a little more than asked, so that not every put has to evict.
EVICT_STEP_SHARE: Final = 1 / 128
EXPIRE_RECORDS_MAX: Final = 4096
# Below this gain a segment is not worth copying, even when space is short.
COMPACT_GAIN_MIN: Final = 1 / 16


@dataclasses.dataclass(slots=True)
class SpaceCounters:
    evictions: int = 0
    expirations: int = 0
    compacted_bytes: int = 0
    dropped_segments: int = 0


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
        # The segment being compacted and what of it has not been looked at yet.
        self._compacting: tuple[int, deque[RecordHeader]] | None = None
        self.on_corrupt: Callable[[RecordName], object] = lambda _name: None
        self.on_dropped: Callable[[], object] = lambda: None

    @property
    def index_bytes(self) -> int:
        return (self._index.directory / "data.mdb").stat().st_size

    @property
    def used_bytes(self) -> int:
        return self._segments.used_bytes + self.index_bytes + self.reserve.nbytes + self._gone.nbytes

    def restart(self) -> None:
        """The directory holds other files now."""
        self._compacting = None

    def make_room(self, nbytes: int, keep: Collection[RecordName]) -> None:
        """See to it that a batch of `nbytes` may be appended.

        keep: records that the batch hangs on.  Raises:  StoreFull: the budget cannot hold it.
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
        if not free.is_sudden:
            can_hold = self.used_bytes + free.room() - 2 * self._segments.segment_bytes
            self.limit_bytes = min(self._limit_bytes_max, max(can_hold, free.fair_share_bytes))
        if self.stopped and free.room() > 0:
            self._leave_margin(0)  # says that it goes on

    def _leave_margin(self, nbytes: int) -> None:
        """Raises:  StoreFull: writing so much would leave too little of the disk to others."""
        free = self.free
        stopped = "" if free.has_room(nbytes) else f"the file system has no more than {free.nbytes} bytes free"
        if bool(stopped) != bool(self.stopped):
            if stopped:
                log.warning("nothing is stored now: %s, and %d are for others", stopped, free.margin_bytes)
            else:
                log.warning("the file system has room again: the store goes on storing")
        self.stopped = stopped
        if stopped:
            raise StoreFull(stopped)

    def _free_up(self, nbytes: int, keep: Collection[RecordName]) -> None:
        self.expire()
        fixed = self.index_bytes + self.reserve.nbytes + self._gone.nbytes
        live_max = int(LIVE_SHARE_MAX * (self.limit_bytes - fixed))
        while self.used_bytes + nbytes > self.limit_bytes:
            if self._drop_dead():
                continue
            live = sum(state.live_bytes for state in self._states().values())
            excess = live + nbytes - live_max
            if excess > 0:
                step = excess + int(EVICT_STEP_SHARE * self.limit_bytes)
                if self.evict(step, keep):
                    continue
                raise StoreFull(f"the store's budget of {self.budget_bytes} bytes is taken by records that must stay")
            if self.compact_one(COMPACT_GAIN_MIN) is None:
                # Live data lies so densely that only evicting more of it makes segments worth compacting.
                if live_max <= 0:
                    raise StoreFull(f"the store's budget of {self.budget_bytes} bytes is too small for this record")
                live_max -= int(EVICT_STEP_SHARE * self.limit_bytes) + nbytes

    def evict(self, nbytes: int, keep: Collection[RecordName] = (), *, owners: Collection[bytes] | None = None) -> int:
        """Take leaves, lowest rank first, until `nbytes` are dead. Returns how many records went.

        owners: take these owners' only.
        """
        now_ms = self._now_ms()
        num_taken = freed = 0
        with self._gone.together(), IndexTxn(self._index) as txn:
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
        with self._gone.together(), IndexTxn(self._index) as txn:
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

    def compact_one(self, gain_min: float) -> int | None:
        """Copy what is live of the deadest segment, then drop it. Returns the bytes copied, None if none pays."""
        copied = self.compact_step(gain_min, self._segments.segment_bytes)
        while self._compacting is not None:
            copied = (copied or 0) + (self.compact_step(gain_min, self._segments.segment_bytes) or 0)
        return copied

    def compact_step(self, gain_min: float, nbytes: int) -> int | None:
        """Go on compacting, or begin with the deadest segment; copies about `nbytes`. None if no segment pays."""
        if self._compacting is None or self._compacting[0] not in self._segments.sizes:
            number = self._deadest(gain_min)
            if number is None:
                self._compacting = None
                return None
            if number == self._segments.active:
                self._segments.roll(self._now_ms())
            headers = list(self._segments.scan(number, check_payloads=False))
            self._compacting = (number, deque(self._live(headers)))
        number, waiting = self._compacting
        share: list[RecordHeader] = []
        while waiting and nbytes > 0:
            share.append(waiting.popleft())
            nbytes -= share[-1].extent_bytes
        copied = self._copy(share)
        if not waiting:
            self._compacting = None
            self._drop_dead()
        return copied

    def _deadest(self, gain_min: float) -> int | None:
        """The segment whose compaction frees most, if that is at least `gain_min` of it."""
        best, best_gain = None, 0
        for number, state in self._states().items():
            size = self._segments.sizes[number]
            # What a fresh copy would take less; without the alignment, one compaction would call for the next.
            gain = size - SEGMENT_HEADER_BYTES - align(state.live_bytes, BATCH_ALIGN)
            if gain > max(best_gain, gain_min * size) and (number != self._segments.active or gain > size // 2):
                best, best_gain = number, gain
        return best

    def _copy(self, headers: Sequence[RecordHeader]) -> int:
        """Move those records that the index still names to the active segment. Returns the bytes copied."""
        drafts = [draft for header in self._live(headers) if (draft := self._load(header)) is not None]
        if not drafts:
            return 0
        placed = self._segments.append(drafts, self._now_ms())
        try:
            self._segments.sync()
            with IndexTxn(self._index) as txn:
                for header in placed:
                    entry = txn.get((header.kind, header.hash))
                    assert entry is not None, "the engine's lock is held"
                    entry.segment, entry.offset = header.segment, header.offset
                note_end(txn, self._segments)
        except BaseException:
            self._segments.rollback(placed[0].offset)
            raise
        copied = sum(header.extent_bytes for header in placed)
        self.counters.compacted_bytes += copied
        return copied

    def _live(self, headers: Sequence[RecordHeader]) -> list[RecordHeader]:
        """Those that the index names."""
        with self._index.txn() as txn:
            entries = [
                (header, self._index.entry(txn, header.kind, header.hash))
                for header in headers
                if header.kind in STORED_KINDS
            ]
        return [
            header
            for header, entry in entries
            if entry and (entry.segment, entry.offset) == (header.segment, header.offset) and not entry.quarantined
        ]

    def _load(self, header: RecordHeader) -> Draft | None:
        stored = self._segments.read(header.segment, header.offset + RECORD_HEADER_BYTES, header.stored_bytes)
        if payload_checksum(stored) != header.payload_checksum:
            self.on_corrupt((header.kind, header.hash))
            return None
        return Draft(header, stored, sealed=True)

    def _drop_dead(self) -> int:
        """Drop segments that the index names nothing in. Returns how many."""
        dead = [n for n, state in self._states().items() if not state.live_records and n != self._segments.active]
        if not dead:
            return 0
        with IndexTxn(self._index) as txn:
            for number in dead:
                txn.set_segment(number, None)
        for number in dead:
            self._segments.drop(number)
        self.on_dropped()
        self.counters.dropped_segments += len(dead)
        return len(dead)

    def _states(self) -> dict[int, SegmentState]:
        with self._index.txn() as txn:
            states = read_segments(self._index, txn)
        return {number: states.get(number, SegmentState()) for number in self._segments.sizes}


def parent_of(name: RecordName, parent: bytes) -> RecordName:
    """What a record hangs on: a block on the block before it, a checkpoint on the block of the same hash."""
    return (RecordKind.BLOCK, parent if name[0] is RecordKind.BLOCK else name[1])


def note_end(txn: IndexTxn, segments: Segments) -> None:
    """Record how far the active segment is committed."""
    assert segments.active is not None
    state = txn.segment(segments.active) or SegmentState()
    txn.set_segment(segments.active, dataclasses.replace(state, end=segments.sizes[segments.active]))

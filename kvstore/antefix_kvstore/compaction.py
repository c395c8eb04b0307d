"""Compaction: copies the live records of segments that are mostly dead, then deletes these segments.

The segment is removed from the index first; its file is deleted after that. If the store crashes between the two steps,
a file stays that nothing refers to, and the next start deletes it. A segment in which a transaction leaves no live
record is forgotten in that same transaction, because each further commit would wait for the disk.
"""

from __future__ import annotations

import dataclasses
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, groupby
from typing import Final

from antefix.record import STORED_KINDS, RecordName
from antefix.store_files.index import Index
from antefix.store_files.record_format import (
    BATCH_ALIGN,
    RECORD_HEADER_BYTES,
    SEGMENT_HEADER_BYTES,
    align,
    payload_checksum,
)
from antefix.store_files.record_header import RecordHeader
from antefix_kvstore.index_writer import IndexTxn, SegmentState, read_segments
from antefix_kvstore.segments import Draft, Segments, groups_of

# Groups that are read from the disk while one is checked and written.
_GROUPS_AHEAD: Final = 2


@dataclasses.dataclass(slots=True)
class SpaceCounters:
    evictions: int = 0
    expirations: int = 0
    compacted_bytes: int = 0
    dropped_segments: int = 0


class Compactor:
    """The object is not thread-safe, because the engine's lock protects it."""

    def __init__(self, segments: Segments, index: Index, counters: SpaceCounters, *, now_ms: Callable[[], int]) -> None:
        self._segments = segments
        self._index = index
        self._now_ms = now_ms
        self._counters = counters
        # The segment that is being compacted in steps, and those of its records that have not been looked at yet.
        self._begun: tuple[int, deque[RecordHeader]] | None = None
        self.on_corrupt: Callable[[RecordName], object] = lambda _name: None
        self.on_dropped: Callable[[], object] = lambda: None

    def restart(self) -> None:
        """Forget the segment that was being compacted, because the directory holds other files now."""
        self._begun = None

    def transaction(self) -> IndexTxn:
        """An index transaction that also forgets segments in which it leaves no live record; `delete` deletes their
        files after the commit.
        """
        return IndexTxn(self._index, may_drop=lambda number: number != self._segments.active)

    def delete(self, numbers: Sequence[int]) -> None:
        """Delete segments that a committed transaction has forgotten."""
        for number in numbers:
            if number in self._segments.sizes:
                self._segments.drop(number)
                self._counters.dropped_segments += 1
        if numbers:
            self.on_dropped()
            self._segments.let_go()

    def drop_dead(self) -> int:
        """Drop segments of which the index names no record any more. Returns how many."""
        dead = [n for n, state in self.states().items() if not state.live_records and n != self._segments.active]
        if not dead:
            return 0
        with IndexTxn(self._index) as txn:
            for number in dead:
                txn.set_segment(number, None)
        self.delete(dead)
        return len(dead)

    def states(self) -> dict[int, SegmentState]:
        """The state of each segment, by number."""
        with self._index.txn() as txn:
            states = read_segments(self._index, txn)
        return {number: states.get(number, SegmentState()) for number in self._segments.sizes}

    def compact_one(self, gain_min: float) -> int | None:
        """Copy the live records of the segment with most dead bytes, then drop it. Returns the bytes copied; None if no
        segment is worth compacting.
        """
        copied = self.compact_step(gain_min, self._segments.segment_bytes)
        while self._begun is not None:
            copied = (copied or 0) + (self.compact_step(gain_min, self._segments.segment_bytes) or 0)
        return copied

    def compact_step(self, gain_min: float, nbytes: int) -> int | None:
        """Continue to compact a segment, or begin with the segment that frees most bytes. About `nbytes` are copied;
        None if no segment is worth compacting.
        """
        if self._begun is None or self._begun[0] not in self._segments.sizes:
            deadest = self._by_gain(gain_min)[:1]
            if not deadest:
                self._begun = None
                return None
            self._begun = (deadest[0][1], deque(self._live_of([deadest[0][1]])))
        _, waiting = self._begun
        share: list[RecordHeader] = []
        while waiting and nbytes > 0:
            share.append(waiting.popleft())
            nbytes -= share[-1].extent_bytes
        copied = self.copy(share)
        if not waiting:
            self._begun = None
            self.drop_dead()
        return copied

    def compact_together(self, gain_min: float, wanted_bytes: int) -> int | None:
        """Compact the segments that free most until `wanted_bytes` are free, with one sync and one commit for all of
        them.

        All copies must fit into one segment, so less may be freed. Returns the bytes copied; None if no segment is
        worth compacting.
        """
        if self._begun is not None:
            return self.compact_one(gain_min)
        states = self.states()
        chosen: list[int] = []
        freed_bytes = 0
        room_bytes = self._segments.segment_bytes - SEGMENT_HEADER_BYTES - BATCH_ALIGN
        for gain, number in self._by_gain(gain_min):
            room_bytes -= states[number].live_bytes
            if chosen and (room_bytes < 0 or freed_bytes >= wanted_bytes):
                break
            chosen.append(number)
            freed_bytes += gain
        if not chosen:
            return None
        copied = self.copy(self._live_of(chosen))
        # Records that failed their check stay in the index until they are quarantined.
        self.drop_dead()
        return copied

    def _by_gain(self, gain_min: float) -> list[tuple[int, int]]:
        """Pairs of the bytes that compacting frees and the segment's number, where these bytes are at least `gain_min`
        of the segment; most first.
        """
        found = []
        for number, state in self.states().items():
            size = self._segments.sizes[number]
            # The copy is padded to BATCH_ALIGN: without counting that, one compaction would call for the next.
            gain = size - SEGMENT_HEADER_BYTES - align(state.live_bytes, BATCH_ALIGN)
            if gain > gain_min * size and gain > 0 and (number != self._segments.active or gain > size // 2):
                found.append((gain, number))
        return sorted(found, key=lambda pair: -pair[0])

    def _live_of(self, numbers: Iterable[int]) -> list[RecordHeader]:
        """The live records of these segments, to which nothing is appended any more."""
        found: list[RecordHeader] = []
        for number in numbers:
            if number == self._segments.active:
                self._segments.roll(self._now_ms())
            found += self._live(list(self._segments.scan(number, check_payloads=False)))
        return found

    def copy(self, headers: Sequence[RecordHeader]) -> int:
        """Move the records that the index still names to the active segment. Returns the bytes copied."""
        return sum(self._copy_part(part) for part in self._parts(self._live(headers)))

    def _parts(self, headers: Sequence[RecordHeader]) -> Iterator[Sequence[RecordHeader]]:
        """Cut the records into parts that each fit one segment, as groups that each begin at BATCH_ALIGN."""
        first = nbytes = 0
        for number, header in enumerate(headers):
            # Each group has at most one alignment gap, and each group has at least one record.
            extent = header.extent_bytes + BATCH_ALIGN
            if number > first and nbytes + extent > self._segments.segment_bytes - SEGMENT_HEADER_BYTES - BATCH_ALIGN:
                yield headers[first:number]
                first, nbytes = number, 0
            nbytes += extent
        if headers:
            yield headers[first:]

    def _copy_part(self, headers: Sequence[RecordHeader]) -> int:
        """Copy one part with one sync and one commit. A group of records is small enough to stay in the core's caches
        until it is written.
        """
        now_ms, segments = self._now_ms(), self._segments
        groups = list(groups_of(headers, lambda header: header.extent_bytes))
        segments.make_way(sum(header.extent_bytes for header in headers) + len(groups) * BATCH_ALIGN, now_ms)
        arena = memoryview(bytearray(max(sum(header.stored_bytes for header in group) for group in groups)))
        placed: list[RecordHeader] = []
        try:
            self._read_ahead(groups[:_GROUPS_AHEAD])
            for number, group in enumerate(groups, start=_GROUPS_AHEAD):
                self._read_ahead(groups[number : number + 1])
                placed += segments.append(self._drafts(group, arena), now_ms)
            if not placed:
                return 0
            segments.sync()
            with self.transaction() as txn:
                for header in placed:
                    entry = txn.get((header.kind, header.hash))
                    assert entry is not None, "the engine's lock is held"
                    entry.segment, entry.offset = header.segment, header.offset
                note_end(txn, segments)
        except BaseException:
            if placed:
                segments.rollback(placed[0].offset)
            raise
        self.delete(txn.dropped)
        copied = sum(header.extent_bytes for header in placed)
        self._counters.compacted_bytes += copied
        return copied

    def _read_ahead(self, groups: Iterable[Sequence[RecordHeader]]) -> None:
        """Tell the kernel which records are read next. Large puts bypass the page cache, so they may be on the disk
        alone.
        """
        for number, of_segment in groupby(chain.from_iterable(groups), key=lambda header: header.segment):
            with self._segments.reading(number) as fd:
                for header in of_segment:
                    os.posix_fadvise(fd, header.offset, header.extent_bytes, os.POSIX_FADV_WILLNEED)

    def _live(self, headers: Sequence[RecordHeader]) -> list[RecordHeader]:
        """The records that the index still names."""
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

    def _drafts(self, headers: Sequence[RecordHeader], arena: memoryview) -> list[Draft]:
        """The records to be written again, with their bytes in `arena`. Records that fail their check are not copied
        but reported.
        """
        drafts: list[Draft] = []
        broken: list[RecordName] = []
        at = 0
        for number, of_segment in groupby(headers, key=lambda header: header.segment):
            with self._segments.reading(number) as fd:
                for header in of_segment:
                    stored = arena[at : at + header.stored_bytes]
                    num_read = os.preadv(fd, [stored], header.offset + RECORD_HEADER_BYTES)
                    if num_read == len(stored) and payload_checksum(stored) == header.payload_checksum:
                        drafts.append(Draft(header, stored, sealed=True))
                        at += len(stored)
                    else:
                        broken.append((header.kind, header.hash))
        for name in broken:
            self.on_corrupt(name)
        return drafts


def note_end(txn: IndexTxn, segments: Segments) -> None:
    """Record the offset up to which the active segment is committed."""
    assert segments.active is not None
    state = txn.segment(segments.active) or SegmentState()
    txn.set_segment(segments.active, dataclasses.replace(state, end=segments.sizes[segments.active]))

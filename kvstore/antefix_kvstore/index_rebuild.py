"""An index from the segments' headers, in memory that does not grow with the store.

Headers are read in the order in which they were written, so that nearly every record comes after its parent. One that
does not, as compaction may have moved its parent, waits for it. Where more wait than may, their segments are read again
once everything else is there.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from antefix.record import STORED_KINDS, RecordName
from antefix.store_files.index import Index
from antefix.store_files.record_format import RecordFlag
from antefix.store_files.record_header import RecordHeader
from antefix_kvstore.eviction import EvictionPolicy
from antefix_kvstore.index_forest import insert_entry
from antefix_kvstore.index_writer import IndexTxn
from antefix_kvstore.segments import Segments
from antefix_kvstore.space import parent_of

# Segments scanned at once: headers of large records lie far apart, and a disk answers many such reads as fast as one.
_SCAN_THREADS: Final = 8
_CHUNK_RECORDS: Final = 2_000
_TXN_RECORDS: Final = 10_000
# A header takes about a kilobyte.
_WAITING_MAX: Final = 50_000
_FIRST: Final = int(RecordFlag.FIRST)
_ELSEWHERE: Final = int(RecordFlag.ELSEWHERE)


def fill_index(index: Index, segments: Segments, *, check_all: bool) -> dict[int, int]:
    """Index all records of which the parents are there, or may be in another store.

    check_all: read every payload, and leave out those that are wrong. Else those of the last segment are read: it may
    end in a batch that was never acknowledged; the others were synced before it began.
    Returns per segment where its last record ends.
    """
    filling = _Filling(index)
    last = max(segments.sizes, default=0)
    numbers: Sequence[int] = sorted(segments.sizes)
    while numbers:
        before = filling.num_indexed
        for chunk in _chunks(segments, numbers, last, check_all):
            filling.add(chunk)
        filling.flush()
        if filling.num_indexed == before or not filling.crowded:
            # What still waits has no parent here: it stands apart, or is nobody's.
            numbers = () if filling.takes_apart else sorted(filling.crowded)
            filling.take_apart()
        else:
            numbers = filling.start_again()
    return filling.ends


class _Filling:
    """takes_apart: whether a record whose parent may be in another store is indexed without it."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._policy = EvictionPolicy()
        self._gathered: list[RecordHeader] = []
        self._waiting: dict[RecordName, list[RecordHeader]] = {}
        self._num_waiting = 0
        self.crowded: set[int] = set()
        self.takes_apart = False
        self.num_indexed = 0
        self.ends: dict[int, int] = {}

    def add(self, headers: Sequence[RecordHeader]) -> None:
        for header in headers:
            end = header.offset + header.extent_bytes
            self.ends[header.segment] = max(self.ends.get(header.segment, 0), end)
        self._gathered += (header for header in headers if header.kind in STORED_KINDS)
        if len(self._gathered) >= _TXN_RECORDS:
            self.flush()

    def flush(self) -> None:
        # Parents have smaller positions; a checkpoint comes after the block that it hangs on.
        self._gathered.sort(key=lambda header: (header.position, header.kind))
        with IndexTxn(self._index) as txn:
            for header in self._gathered:
                self._index_one(txn, header)
        self._gathered = []

    def start_again(self) -> Sequence[int]:
        """The segments that must be read once more, without what of them waits already."""
        numbers, self.crowded = sorted(self.crowded), set()
        known = set(numbers)
        for name, waiting in list(self._waiting.items()):
            kept = [header for header in waiting if header.segment not in known]
            self._num_waiting -= len(waiting) - len(kept)
            if kept:
                self._waiting[name] = kept
            else:
                del self._waiting[name]
        return numbers

    def take_apart(self) -> None:
        """Index what waits for a parent that may be in another store, with what waits for it."""
        self.takes_apart = True
        self._gathered = [header for waiting in self._waiting.values() for header in waiting]
        self._gathered = [header for header in self._gathered if int(header.flags) & _ELSEWHERE]
        self.flush()

    def _index_one(self, txn: IndexTxn, header: RecordHeader) -> None:
        """This one, and what has waited for it."""
        found = [header]
        while found:
            header = found.pop()
            name = (header.kind, header.hash)
            old = txn.get(name)
            # Of copies the last one counts: what was put again has taken the place of what was damaged.
            if old is not None and (old.segment, old.offset) >= (header.segment, header.offset):
                continue
            parent = parent_of(name, header.parent)
            flags = int(header.flags)
            may_stand = flags & _FIRST or old is not None or (self.takes_apart and flags & _ELSEWHERE)
            if not may_stand and txn.get(parent) is None:
                self._wait(parent, header)
                continue
            # When it was last used is lost with the index; when it was written is the best guess.
            self.num_indexed += insert_entry(txn, header, self._policy, used_ms=header.created_ms)
            waited = self._waiting.pop(name, ())
            self._num_waiting -= len(waited)
            found += waited

    def _wait(self, parent: RecordName, header: RecordHeader) -> None:
        if self._num_waiting >= _WAITING_MAX:
            self.crowded.add(header.segment)
            return
        self._waiting.setdefault(parent, []).append(header)
        self._num_waiting += 1


def _chunks(segments: Segments, numbers: Sequence[int], last: int, check_all: bool) -> Iterator[Sequence[RecordHeader]]:
    """The headers of these segments, in order; a few segments are read ahead, a chunk of each."""

    def next_of(scan: Iterator[RecordHeader]) -> list[RecordHeader]:
        return list(itertools.islice(scan, _CHUNK_RECORDS))

    scans = (segments.scan(number, check_payloads=check_all or number == last) for number in numbers)
    ahead: deque[tuple[Iterator[RecordHeader], Future[list[RecordHeader]]]] = deque()
    with ThreadPoolExecutor(_SCAN_THREADS) as pool:
        while True:
            for scan in itertools.islice(scans, _SCAN_THREADS - len(ahead)):
                ahead.append((scan, pool.submit(next_of, scan)))
            if not ahead:
                return
            scan, reading = ahead.popleft()
            chunk = reading.result()
            if chunk:
                ahead.appendleft((scan, pool.submit(next_of, scan)))
                yield chunk

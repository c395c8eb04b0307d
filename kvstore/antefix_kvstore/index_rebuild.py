"""Rebuilds an index from the segments' headers, in memory that does not grow with the store.

Headers are read in the order in which they were written, so nearly every record comes after its parent. A group of
headers at a time is indexed as rows. A record whose parent has not come yet (compaction may have moved the parent)
waits for the next group. If too many records wait, their segments are read again after all others.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from antefix.record import STORED_KINDS
from antefix.store_files.index import Index
from antefix.store_files.record_format import RECORD_HEADER_BYTES
from antefix.store_files.record_header import unpack_record_header
from antefix_kvstore.eviction import EvictionPolicy
from antefix_kvstore.header_rows import ROW, extents_of, first_words, rows_of
from antefix_kvstore.index_bulk import BulkIndex
from antefix_kvstore.index_forest import insert_entry
from antefix_kvstore.index_writer import IndexTxn
from antefix_kvstore.segments import Segments

Array = npt.NDArray[Any]

# By number of a kind.
_IS_STORED: Final = np.isin(np.arange(256), [int(kind) for kind in STORED_KINDS])

# Segments scanned at once: headers of large records lie far apart, and a disk answers several such reads as fast as
# one.
_SCAN_THREADS: Final = 8
_CHUNK_RECORDS: Final = 2_000
# A group rewrites nearly every page of the index, so larger groups are faster. A record takes some 400 bytes in a
# group.
_GROUP_RECORDS: Final = 1 << 16
_WAITING_MAX: Final = 50_000


def fill_index(open_index: Callable[[], Index], segments: Segments, *, check_all: bool) -> dict[int, int]:
    """Index all records whose parents are indexed, or may be in another store.

    open_index: opens the new index, which no other process has open.
    check_all: verify every payload and leave out damaged records. Without it, only the last segment's payloads are
    verified: that segment may end in a batch that was never acknowledged, and all earlier segments were synced before
    it began. Returns for each segment the offset at which its last record ends.
    """
    bulk = BulkIndex(open_index, sum(segments.sizes.values()) // RECORD_HEADER_BYTES)
    try:
        filling = _Filling(bulk, segments)
        last = max(segments.sizes, default=0)
        numbers: Sequence[int] = sorted(segments.sizes)
        while numbers:
            before = bulk.num_indexed
            for rows in _chunks(segments, numbers, last, check_all):
                filling.add(rows)
            filling.flush()
            if bulk.num_indexed == before or not filling.crowded:
                # Records that still wait have no parent in this store: they are indexed apart, or not at all.
                numbers = () if filling.takes_apart else sorted(filling.crowded)
                filling.take_apart()
            else:
                numbers = filling.start_again()
        return filling.ends
    finally:
        bulk.index.close()


class _Filling:
    """takes_apart: whether records whose parent may be in another store are indexed without it."""

    def __init__(self, bulk: BulkIndex, segments: Segments) -> None:
        self._bulk = bulk
        self._segments = segments
        self._gathered: list[Array] = []
        self._num_gathered = 0
        self._waiting = np.empty(0, ROW)
        self.crowded: set[int] = set()
        self.takes_apart = False
        self.ends: dict[int, int] = {}

    def add(self, rows: Array) -> None:
        """rows: the rows of one segment, in order."""
        number, end = int(rows["segment"][-1]), int(rows["offset"][-1]) + int(extents_of(rows[-1:])[0])
        self.ends[number] = max(self.ends.get(number, 0), end)
        is_stored = _IS_STORED[rows["kind"]]
        self._gathered.append(rows if is_stored.all() else rows[is_stored])
        self._num_gathered += len(rows)
        if self._num_gathered >= _GROUP_RECORDS:
            self.flush()

    def flush(self) -> None:
        rows = _last_copies(np.concatenate([self._waiting, *self._gathered]))
        self._gathered, self._num_gathered = [], 0
        rows, newer_copies = self._apart_from_known(rows)
        waiting = self._bulk.add(rows, takes_apart=self.takes_apart)
        self._waiting, crowd = waiting[:_WAITING_MAX], waiting[_WAITING_MAX:]
        self.crowded |= set(np.unique(crowd["segment"]).tolist())
        self._replace(newer_copies)

    def start_again(self) -> Sequence[int]:
        """The numbers of the segments that must be read once more. Waiting rows of these segments are dropped, because
        they come again.
        """
        numbers, self.crowded = sorted(self.crowded), set()
        self._waiting = self._waiting[~np.isin(self._waiting["segment"], numbers)]
        return numbers

    def take_apart(self) -> None:
        """Index the waiting records whose parent may be in another store, and the records that wait for them."""
        self.takes_apart = True
        self.flush()

    def _apart_from_known(self, rows: Array) -> tuple[Array, Array]:
        """Split the rows into names that are not indexed, and names that are indexed from an earlier copy."""
        is_new, is_later = np.ones(len(rows), bool), np.zeros(len(rows), bool)
        for number, entry in self._bulk.known_copies(rows):
            is_new[number] = False
            place = (int(rows["segment"][number]), int(rows["offset"][number]))
            is_later[number] = place > (entry.segment, entry.offset)
        return rows if is_new.all() else rows[is_new], rows[is_later]

    def _replace(self, rows: Array) -> None:
        """Index the last copy of each name: a record that was put again replaces the damaged copy."""
        if not len(rows):
            return
        policy = EvictionPolicy()
        with IndexTxn(self._bulk.index) as txn:
            for number, offset in zip(rows["segment"].tolist(), rows["offset"].tolist(), strict=True):
                raw = self._segments.read(number, offset, RECORD_HEADER_BYTES)
                header = unpack_record_header(raw, self._segments.identity.seed)
                insert_entry(txn, header, policy, used_ms=header.created_ms)
        self._bulk.num_indexed += len(rows)


def _last_copies(rows: Array) -> Array:
    """For each name, the row that comes last in the segments."""
    order = np.lexsort((rows["offset"], rows["segment"]))
    if (order[1:] < order[:-1]).any():
        rows = rows[order]
    kept = np.ones(len(rows), bool)
    for kind in STORED_KINDS:
        numbers = np.flatnonzero(rows["kind"] == kind)
        # Hashes are uniform: if none of their first words is there twice, no name is.
        words = np.sort(first_words(rows["hash"][numbers]))
        if (words[1:] != words[:-1]).all():
            continue
        last = dict(zip(rows["hash"][numbers].tolist(), numbers.tolist(), strict=True))
        if len(last) < len(numbers):
            kept[numbers] = False
            kept[list(last.values())] = True
    return rows if kept.all() else rows[kept]


def _chunks(segments: Segments, numbers: Sequence[int], last: int, check_all: bool) -> Iterator[Array]:
    """The rows of these segments, in the order of the files. A few segments are read ahead, one chunk of each at a
    time.
    """

    def next_of(scan: Iterator[bytes]) -> Array | None:
        raws, num_bytes = [], 0
        for raw in scan:
            raws.append(raw)
            num_bytes += len(raw)
            if num_bytes >= _CHUNK_RECORDS * RECORD_HEADER_BYTES:
                break
        return rows_of(raws, segments.identity.seed) if raws else None

    scans = (segments.raw_headers(number, check_payloads=check_all or number == last) for number in numbers)
    ahead: deque[tuple[Iterator[bytes], Future[Array | None]]] = deque()
    with ThreadPoolExecutor(_SCAN_THREADS) as pool:
        while True:
            for scan in itertools.islice(scans, _SCAN_THREADS - len(ahead)):
                ahead.append((scan, pool.submit(next_of, scan)))
            if not ahead:
                return
            scan, reading = ahead.popleft()
            chunk = reading.result()
            if chunk is not None:
                ahead.appendleft((scan, pool.submit(next_of, scan)))
                yield chunk

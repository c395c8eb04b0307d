"""Opens a store after a clean close or a crash: identity, lock, index checked or rebuilt, segment tails cut.

After a crash the index may be older than the segments. The index is never newer than the segments, because records are
durable before the index names them. So whole records behind the indexed end of a segment are indexed, and the rest is
cut off. A segment of which the index names no record is dropped. An index that is lost, damaged or inconsistent with
the files is rebuilt from the headers. docs/FORMAT.md lists the cases one by one.
"""

from __future__ import annotations

import contextlib
import logging
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import lmdb

from antefix.directory_lock import DirectoryLock
from antefix.errors import BlockCorrupt
from antefix.record import STORED_KINDS
from antefix.store_files.index import Index
from antefix.store_files.record_format import (
    RECORD_HEADER_BYTES,
    SEGMENT_DIR,
    SEGMENT_HEADER_BYTES,
    IndexEntry,
    StoreIdentity,
)
from antefix.store_files.record_header import RecordHeader
from antefix.store_files.segment_reader import wall_ms
from antefix_kvstore.disk import Disk
from antefix_kvstore.disk_reserve import is_full
from antefix_kvstore.identity import CLEAN_FILE, lock_directory, prepare_directory, put_aside_misplaced, read_identity
from antefix_kvstore.index_repair import (
    ends_of,
    index_bytes_max,
    index_headers,
    index_sum,
    open_index,
    rebuild_index,
    remove_leftovers,
    set_end,
)
from antefix_kvstore.index_writer import IndexTxn, read_segments
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.segments import Segments

log = logging.getLogger("antefix_kvstore.recovery")

# Address space, not memory. Large, because a repair does not know the service's budget.
_REPAIR_INDEX_BYTES: Final = 16 << 30


@dataclass(slots=True)
class OpenStore:
    """The parts of an opened store that the engine works with."""

    directory: Path
    identity: StoreIdentity
    index: Index
    segments: Segments
    disk: Disk
    lock: DirectoryLock

    def close(self) -> None:
        """Close the store cleanly: the index's checksum is stored, so that the next opening need not examine
        the index.
        """
        self.segments.close()
        self.index.env.sync(True)
        self.index.close()
        try:
            self.disk.replace_file(self.directory / CLEAN_FILE, index_sum(self.directory))
        except OSError as err:
            log.warning("the store's index could not be marked as complete: %s; the next start checks the index", err)
        self.lock.close()

    def abandon(self) -> None:
        """Close the files without storing the checksum, as a crash would."""
        self.segments.close()
        self.index.close()
        self.lock.close()

    def renew(self, config: KvStoreConfig, clock_ms: Callable[[], int]) -> None:
        """Index whatever the directory holds now, after its files were damaged or replaced. For the store's owner only.

        `index` and `segments` stay the same objects. Nobody may write during this call.
        Raises:  ConfigError, OSError: the directory cannot be used, or another process writes there now.
        """
        with contextlib.suppress(OSError):
            self.segments.close()
        prepare_directory(self.directory)
        if not self.lock.is_of_the_present:
            taken = lock_directory(self.directory)
            self.lock.close()
            self.lock = taken
        put_aside_misplaced(self.directory)
        self.identity = read_identity(self.directory, self.disk, clock_ms)
        self.segments.read_directory(self.identity)
        (self.directory / CLEAN_FILE).unlink(missing_ok=True)
        remove_leftovers(self.directory)
        self.index.take_over(rebuild_index(self.directory, index_bytes_max(config), self.segments))
        _settle_segments(self.index, self.segments)

    @property
    def is_open(self) -> bool:
        return self.lock.is_held


def open_store(config: KvStoreConfig, disk: Disk, clock_ms: Callable[[], int]) -> OpenStore:
    """Raises:  ConfigError: not a store, another format version, or open in another process."""
    directory = Path(config.dir)
    prepare_directory(directory)
    lock = lock_directory(directory)
    try:
        put_aside_misplaced(directory)
        # 1. Whose directory this is.
        identity = read_identity(directory, disk, clock_ms)
        segments = Segments(directory / SEGMENT_DIR, identity, disk, segment_bytes=config.segment_bytes_in_force)
        # 2. An index that is sound.
        index = open_index(directory, config, segments, disk)
        # 3. Make segments and index agree.
        try:
            _settle(index, segments)
        except (_IndexAtOdds, BlockCorrupt, struct.error, lmdb.Error) as err:
            if isinstance(err, lmdb.Error) and is_full(err, directory):
                raise
            log.warning("rebuilding the index: %s", err)
            index = rebuild_index(directory, index_bytes_max(config), segments)
            _settle(index, segments)
        return OpenStore(directory, identity, index, segments, disk, lock)
    except BaseException:
        lock.close()
        raise


def _settle(index: Index, segments: Segments) -> None:
    """Call `_settle_segments`; close both if that fails."""
    try:
        _settle_segments(index, segments)
    except BaseException:
        segments.close()
        index.close()
        raise


class _IndexAtOdds(Exception):
    """Index and segments contradict each other. In this case the segments are taken as right."""


def _settle_segments(index: Index, segments: Segments) -> None:
    """Index whole records behind the committed ends, cut off the rest, drop segments that nothing refers to."""
    with index.txn() as txn:
        states = read_segments(index, txn)
    for number, state in states.items():
        if state.live_records and segments.sizes.get(number, 0) < state.end:
            raise _IndexAtOdds(f"segment {number} is missing or shorter than {state.end} bytes")
    with IndexTxn(index) as txn:
        for number in set(states) - set(segments.sizes):
            txn.set_segment(number, None)
    found: list[RecordHeader] = []
    ends: dict[int, int] = {}
    for number, size in segments.sizes.items():
        known = states[number].end if number in states else 0
        start = max(known, SEGMENT_HEADER_BYTES)
        tail = list(segments.scan(number, start, check_payloads=True)) if size > start else []
        if tail:
            # Bytes read from the page cache may not be on the disk yet, and the index must not be ahead of the
            # segments.
            segments.sync_file(number)
        found += tail
        ends[number] = min(size, max(start, ends_of(tail).get(number, 0)))
    _index_tails(index, found)
    with IndexTxn(index) as txn:
        for number, end in ends.items():
            set_end(txn, number, end)
        # Earlier versions kept the name of every owner that ever stored something.
        txn.forget_empty_owners()
    _close_segments(index, segments, ends, max(states, default=0))


def _index_tails(index: Index, found: list[RecordHeader]) -> None:
    with index.txn() as txn:
        stored = [header for header in found if header.kind in STORED_KINDS]
        new = [header for header in stored if _is_news(index.entry(txn, header.kind, header.hash))]
    index_headers(index, sorted(new, key=lambda header: (header.position, header.kind)))


def _is_news(entry: IndexEntry | None) -> bool:
    return entry is None or entry.quarantined


def _close_segments(index: Index, segments: Segments, ends: dict[int, int], last_known: int) -> None:
    """Cut the tails, drop dead segments, and continue appending to the last segment if it has room."""
    with index.txn() as txn:
        states = read_segments(index, txn)
    segments.start_after(last_known)
    for number in sorted(ends):
        if states[number].live_records == 0:
            segments.drop(number)
            with IndexTxn(index) as txn:
                txn.set_segment(number, None)
        elif segments.sizes[number] > ends[number]:
            segments.resume(number, ends[number])
    segments.let_go()
    last = max(segments.sizes, default=None)
    if last is not None and segments.sizes[last] + RECORD_HEADER_BYTES < segments.segment_bytes:
        segments.resume(last, segments.sizes[last])
    else:
        segments.close()


def rebuild_store(directory: Path, disk: Disk, *, index_bytes: int = _REPAIR_INDEX_BYTES) -> None:
    """Rebuild the index from the records whose payloads are sound. This method is for repair; the caller holds the
    store's lock.
    """
    identity = read_identity(directory, disk, wall_ms)
    segments = Segments(directory / SEGMENT_DIR, identity, disk, segment_bytes=0)
    for number in list(segments.sizes):
        segments.rewrite_header(number, wall_ms())
    (directory / CLEAN_FILE).unlink(missing_ok=True)
    remove_leftovers(directory)
    index = rebuild_index(directory, index_bytes, segments, check_all=True)
    try:
        _settle_segments(index, segments)
    finally:
        segments.close()
        index.close()

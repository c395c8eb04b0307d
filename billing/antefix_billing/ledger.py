"""The ledger: an append-only chain of files that records, once and permanently, what each request used.

    admit -> OPEN entry (durable before the first token)  ...  end -> SETTLE entry (durable before the response ends)

The ledger allocates disk space ahead of its end (ledger_reserve.py), so that it can still write for a while after other
programs fill the disk.

One process writes. Entries are appended in batches, with one write and one fdatasync per batch. A crash leaves at worst
an incomplete batch at the end, which was never acknowledged; opening the ledger cuts it off. If the files are
inconsistent in any other way, the ledger refuses to open. It never repairs them.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

import lmdb

from antefix.errors import Unavailable
from antefix.telemetry.exposition import SHORT_SECONDS, histogram
from antefix_billing.adjustment import Adjusted, Adjustment, Change
from antefix_billing.ledger_batch import LedgerBatch, LedgerTail
from antefix_billing.ledger_files import (
    RESTORE,
    SOURCE_PREFIX,
    Settled,
    adjusted_of,
    check_header,
    check_mark,
    first_sequence_of,
    hash_before,
    prepare_directory,
    read_entries,
    read_entry_at,
    read_segment,
    segment_path,
    segments_of,
    settled_of,
    source_of,
    sync_directory,
    take_lock,
)
from antefix_billing.ledger_format import (
    SEGMENT_HEADER_BYTES,
    Entry,
    EntryKind,
    LedgerCorrupt,
    SegmentHeader,
    chain_hash,
    entries_of,
    has_later_batch,
    unpack_segment_header,
)
from antefix_billing.ledger_index import EntryPlace, LedgerIndex, LedgerIndexDamaged
from antefix_billing.ledger_mark import Mark, MarkFile
from antefix_billing.ledger_reserve import LedgerReserve
from antefix_billing.progress_slots import ProgressJournal
from antefix_billing.pruned import pruned_to
from antefix_billing.usage_record import OpenEntry, UsageRecord

log = logging.getLogger("antefix_billing")

Item = OpenEntry | UsageRecord | Adjustment | Change
Written = Settled | OpenEntry | Adjusted | Change

# Opening the ledger reads its whole last segment. 16 MiB are some 15,000 requests and take half a second to read.
SEGMENT_BYTES = 16 << 20


class Ledger:
    """The writer of one ledger directory. The ledger's methods may be called from any thread; they run one at a
    time.
    """

    def __init__(self, directory: str | Path, *, segment_bytes: int = SEGMENT_BYTES) -> None:
        """Raises:  ConfigError: another process writes this ledger, or the directory cannot hold one.  LedgerCorrupt:
        the ledger was damaged or edited.
        """
        self.directory = Path(directory)
        self._segment_bytes = segment_bytes
        self._mutex = threading.Lock()
        self._broken = ""
        self.sync_s = histogram("antefix_ledger_sync_seconds", "Syncs of the ledger.", buckets=SHORT_SECONDS)
        self._tail = LedgerTail()
        self._fd = -1
        prepare_directory(self.directory)
        self._reserve = LedgerReserve(self.directory)
        self._lock = take_lock(self.directory)
        try:
            self.source = source_of(self.directory)
            self._index = LedgerIndex(self.directory / "index", self.source)
        except BaseException:
            self._lock.close()
            raise
        self._mark = MarkFile(self.directory)
        self.progress = ProgressJournal(self.directory)
        try:
            try:
                self._recover()
            except LedgerIndexDamaged:
                self._index.clear()
                self._recover()
        except BaseException:
            self.close()
            raise

    @property
    def source_name(self) -> str:
        """The ledger's name as it stands in records and CloudEvents."""
        return f"{SOURCE_PREFIX}{self.source.hex()}"

    @property
    def sequence(self) -> int:
        """The number of the last entry; 0 for an empty ledger."""
        return self._tail.sequence

    @property
    def head(self) -> tuple[int, bytes]:
        """The number and the hash of the last durable entry."""
        with self._mutex:
            return self._tail.sequence, self._tail.hash

    @property
    def reserve_bytes(self) -> int:
        """Bytes that can still be written when the rest of the disk is full."""
        return self._reserve.held(self._tail.offset)

    def unsettled(self) -> list[OpenEntry]:
        """Requests that were admitted and not settled: running now or, right after opening, lost in a crash."""
        with self._mutex:
            return list(self._tail.unsettled.values())

    def find(self, key: str) -> Settled | None:
        """The last settled attempt of a request, however long ago it was settled.  key: `record.request_key`."""
        with self._mutex:
            if not self._lock.is_held:
                raise Unavailable("the ledger is closed")
            return self._find(key)

    def find_adjustment(self, adjustment: Adjustment) -> Adjusted | None:
        """The adjustment that was written before under the same id."""
        with self._mutex:
            if not self._lock.is_held:
                raise Unavailable("the ledger is closed")
            return self._find_adjusted(adjustment.key)

    def append(self, items: Sequence[Item]) -> list[Written]:
        """Write entries; they are durable when this returns. Returns the result for each entry, in order.

        Nothing is written twice: if the request of a record is settled for good, or its attempt is settled, the
        existing entry is returned. The same holds for an open entry of a request that is open, and for an adjustment
        whose id is taken.
        Raises:  Unavailable: the entries could not be written; none were.  InvalidRequest: a payload is too large.
        """
        with self._mutex:
            if self._broken:
                raise Unavailable(
                    "the ledger takes no more entries because of an earlier fault; the router's log has it"
                )
            try:
                self._make_room()
            except (lmdb.Error, OSError) as err:
                log.exception("the ledger in %s cannot start a new segment file", self.directory)
                raise Unavailable("the ledger cannot start a new segment file; the router's log says why") from err
            batch = LedgerBatch(self._tail)
            answers = [self._add(batch, item) for item in items]
            if batch.data:
                self._write(bytes(batch.data))
                batch.accept()
                self._note_acknowledged()
                self._reserve.hold(self._fd, self._tail.offset)
            return answers

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1
        self._lock.close()
        self._broken = self._broken or "it is closed"
        self._index.close()
        self._mark.close()
        self.progress.close()

    def _note_acknowledged(self) -> None:
        """Write the mark: the batch is synced and is about to be acknowledged."""
        tail = self._tail
        if tail.sequence:
            with contextlib.suppress(OSError):
                self._mark.write(Mark(sequence=tail.sequence, segment=tail.segment, end=tail.offset, hash=tail.hash))

    def _add(self, batch: LedgerBatch, item: Item) -> Written:
        if isinstance(item, OpenEntry):
            return batch.unsettled(item.key) or batch.open(item)
        if isinstance(item, Change):
            return batch.change(item)
        if isinstance(item, Adjustment):
            return batch.adjusted(item.key) or self._find_adjusted(item.key) or batch.adjust(item)
        standing = batch.settled(item.key) or self._find(item.key)
        if standing is not None and (standing.record.is_final or standing.record.attempt >= item.attempt):
            return standing
        return batch.settle(item)

    def _find(self, key: str) -> Settled | None:
        found = self._find_entry(key)
        if found is None or found[1].kind is not EntryKind.SETTLE:
            return None
        settled = settled_of(*found)
        return settled if settled.record.key == key else None

    def _find_adjusted(self, key: str) -> Adjusted | None:
        found = self._find_entry(key)
        if found is None or found[1].kind is not EntryKind.ADJUST:
            return None
        adjusted = adjusted_of(*found)
        return adjusted if adjusted.adjustment.key == key else None

    def _find_entry(self, key: str) -> tuple[bytes, Entry] | None:
        """Find a request's entry. Returns None also if the entry was pruned: an id is known only as long as its record
        is in the ledger.
        """
        place = self._tail.places.get(key) or self._find_sealed(key)
        if place is None:
            return None
        path = segment_path(self.directory, place.segment)
        if not path.exists() and place.segment <= pruned_to(self.directory)[0]:
            return None
        entry = read_entry_at(path, place.offset)
        return hash_before(path, entry), entry

    def _find_sealed(self, key: str) -> EntryPlace | None:
        try:
            return self._index.find(key)
        except LedgerIndexDamaged as err:
            self._index_again(str(err))
            return self._index.find(key)

    def _index_again(self, why: str) -> None:
        """Rebuild the index from the sealed segments, reading each completely."""
        log.warning("the index of the ledger in %s is rebuilt: %s", self.directory, why)
        self._index.clear()
        firsts = [first_sequence_of(path) for path in segments_of(self.directory)]
        sealed = LedgerTail()
        for _, entry in read_entries(self.directory):
            first = firsts[bisect_right(firsts, entry.sequence) - 1]
            if first != sealed.segment:
                self._seal(sealed, entry.sequence - 1)
                sealed.places = {}
            if first == self._tail.segment:
                return
            sealed.segment, sealed.sequence = first, entry.sequence
            sealed.note(entry)
        if sealed.places:
            self._seal(sealed, sealed.sequence)

    def _seal(self, tail: LedgerTail, covered: int, size: int | None = None) -> None:
        """size: the length of a segment that is still open, behind whose end space is allocated; None: the file's
        length.
        """
        if size is None:
            size = segment_path(self.directory, tail.segment).stat().st_size
        self._index.seal(tail.places, tail.unsettled, covered, {tail.segment: size})

    def _write(self, data: bytes) -> None:
        try:
            written = 0
            while written < len(data):
                written += os.write(self._fd, data[written:])
            with self.sync_s.time():
                os.fdatasync(self._fd)
        except OSError as err:
            # After a failed fdatasync nobody knows what the disk holds, and a second fdatasync would report success. So
            # the batch must be cut off, durably, before the ledger may continue.
            try:
                self._reserve.moved()
                os.ftruncate(self._fd, self._tail.offset)
                os.fsync(self._fd)
            except OSError as second:
                self._broken = str(second)
                log.exception("the ledger in %s takes no more entries", self.directory)
            log.exception("the ledger in %s cannot be written", self.directory)
            raise Unavailable("the ledger cannot be written; the router's log says why") from err
        self._check_in_place(self._tail.offset + len(data))

    def _check_in_place(self, size: int) -> None:
        """Check that the synced entries are in the file that readers will find. If the segment file were deleted, new
        entries in it would vanish with this process.

        Raises:  Unavailable: nothing of the batch counts, and the ledger accepts no more entries.
        """
        path, ours = segment_path(self.directory, self._tail.segment), os.fstat(self._fd)
        try:
            there = path.stat()
            why = "" if os.path.samestat(there, ours) else "was replaced"
        except OSError:
            why = "is gone"
        if not why and ours.st_size != size:
            why = f"has {ours.st_size} bytes and must have {size}"
        if why:
            self._broken = f"{path} {why}: another process changed it; {RESTORE}"
            log.error("the ledger takes no more entries: %s", self._broken)
            raise Unavailable("the ledger takes no more entries: its file was changed; the router's log says how")

    def _make_room(self) -> None:
        if self._fd >= 0 and self._tail.offset < self._segment_bytes:
            return
        try:
            self._start_segment()
        except (OSError, lmdb.Error):
            # On a full disk the open segment keeps growing into its reserve. The next segment starts when there is
            # space again.
            if self._fd < 0 or not self._reserve.held(self._tail.offset):
                raise

    def _start_segment(self) -> None:
        """Open the next segment, then seal the one before. If either step fails, the old segment stays open for
        writing.
        """
        tail = self._tail
        path = segment_path(self.directory, tail.sequence + 1)
        header = SegmentHeader(first_sequence=tail.sequence + 1, previous_hash=tail.hash, source=self.source).pack()
        reserve = LedgerReserve(self.directory)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            if os.write(fd, header) < len(header):
                raise OSError(errno.ENOSPC, "no space for a segment's header")
            reserve.hold(fd, len(header))
            if self._fd >= 0 and reserve.held(len(header)) < self._reserve.held(tail.offset):
                raise OSError(errno.ENOSPC, "no space for a segment's reserve")
            os.fsync(fd)
            sync_directory(self.directory)
            if self._fd >= 0:
                self._seal_tail()
        except (OSError, lmdb.Error):
            os.close(fd)
            path.unlink()
            raise
        if self._fd >= 0:
            # Give back the space that was allocated behind the segment's end.
            os.ftruncate(self._fd, tail.offset)
            os.close(self._fd)
        self._fd, self._reserve = fd, reserve
        tail.segment, tail.offset, tail.places = tail.sequence + 1, len(header), {}

    def _seal_tail(self) -> None:
        try:
            if self._index.covered != self._tail.segment - 1:
                raise LedgerIndexDamaged("it does not cover all sealed segments")
            self._seal(self._tail, self._tail.sequence, self._tail.offset)
        except (LedgerIndexDamaged, lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.InvalidError) as err:
            self._index_again(str(err))
            self._seal(self._tail, self._tail.sequence, self._tail.offset)

    def _recover(self) -> None:
        """Bring the index up to date, read the last segment, and cut off its incomplete end. Entries that were
        acknowledged must be in the segment.
        """
        mark = Mark.of(self.directory)
        paths = segments_of(self.directory)
        for path in paths:
            if not path.is_file():
                raise LedgerCorrupt(f"{path} is no file; {RESTORE}")
        if paths and paths[-1].stat().st_size <= SEGMENT_HEADER_BYTES:
            paths.pop().unlink()  # it was created and never used, perhaps only in part; it is created again when needed
        self._check_segments(paths, mark)
        if not paths:
            self._start_segment()
            return
        last = paths[-1]
        self._catch_up([first_sequence_of(path) for path in paths])
        data = read_segment(last)
        header = unpack_segment_header(data)
        tail = self._tail
        tail.sequence, tail.hash = header.first_sequence - 1, header.previous_hash
        tail.segment, tail.offset, tail.places = header.first_sequence, SEGMENT_HEADER_BYTES, {}
        for entry in entries_of(data):
            if entry.hash != chain_hash(tail.hash, tail.sequence + 1, entry.kind, entry.payload):
                raise LedgerCorrupt(f"entry {tail.sequence + 1} does not continue the chain")
            tail.note(entry)
            tail.sequence, tail.hash, tail.offset = entry.sequence, entry.hash, entry.end
        check_mark(mark, tail.sequence)
        if has_later_batch(data, tail.offset) or self._index.covered > tail.sequence:
            raise LedgerCorrupt(f"{last.name} is damaged at byte {tail.offset}, and durable entries followed")
        self._fd = os.open(last, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        if len(data) != tail.offset:
            os.ftruncate(self._fd, tail.offset)
        os.fsync(self._fd)
        self._reserve.hold(self._fd, tail.offset)

    def _check_segments(self, paths: Sequence[Path], mark: Mark | None) -> None:
        """Raises:  LedgerCorrupt: a sealed or acknowledged segment is missing or too short, or is another one."""
        sizes = {first_sequence_of(path): path.stat().st_size for path in paths}
        begin = pruned_to(self.directory)[0] + 1
        sealed = {first: nbytes for first, nbytes in self._index.segments().items() if first >= begin}
        expected = sealed.keys() | ({mark.segment} if mark is not None else set()) | ({begin} if sizes else set())
        if missing := sorted(expected - sizes.keys()):
            names = ", ".join(segment_path(Path(), first).name for first in missing)
            raise LedgerCorrupt(f"segments of the ledger in {self.directory} are missing: {names}; {RESTORE}")
        for first, nbytes in sealed.items():
            if sizes[first] < nbytes:
                name = segment_path(Path(), first).name
                raise LedgerCorrupt(f"{name} was sealed with {nbytes} bytes and has {sizes[first]}; {RESTORE}")
        for path in paths:
            check_header(path, self.source)

    def _catch_up(self, firsts: Sequence[int]) -> None:
        """Add sealed segments to the index that are missing there because of a crash or because the index was lost."""
        covered, tail = self._index.covered, self._tail
        tail.unsettled = self._index.unsettled()
        for _, entry in read_entries(self.directory, after=covered) if covered < firsts[-1] - 1 else ():
            first = firsts[bisect_right(firsts, entry.sequence) - 1]
            if first != tail.segment and tail.places:
                self._seal(tail, entry.sequence - 1)
                tail.places = {}
            if first == firsts[-1]:
                return
            tail.segment = first
            tail.note(entry)
        if tail.places:
            self._seal(tail, firsts[-1] - 1)

"""Segment files as the writer sees them: append, sync, roll over, scan, drop. This module knows files and headers,
never the index.

A batch (one group commit) starts at a multiple of 4,096 bytes, so that a torn write of a later batch cannot reach the
sectors of an acknowledged one. Records inside a batch follow each other at multiples of 8.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from antefix.errors import BlockCorrupt
from antefix.own_files import open_to_read, put_aside
from antefix.record import Buffer
from antefix.store_files.record_format import (
    BATCH_ALIGN,
    RECORD_ALIGN,
    RECORD_HEADER_BYTES,
    SEGMENT_HEADER_BYTES,
    StoreIdentity,
    align,
    pack_segment_header,
    payload_checksum,
    segment_name,
    segment_number,
    unpack_segment_header,
)
from antefix.store_files.record_header import RecordHeader, pack_record_header, unpack_record_header
from antefix_kvstore.direct_writer import DirectWriter
from antefix_kvstore.disk import Disk
from antefix_kvstore.fresh_bytes import FreshBytes
from antefix_kvstore.segment_scan import raw_headers

# Bytes checksummed, copied and written at once: measured 1.2 times as fast as handling a whole batch of 57 MB at once.
_WRITE_BYTES: Final = 4 << 20
# The same for direct writes, where each large record is copied while the processor's cache has it from its checksum.
_DIRECT_GROUP_BYTES: Final = 256 << 10
_PADDING: Final = bytes(BATCH_ALIGN)
# Direct writes are faster from 4 MB on (docs/results/store.md). Batches of less than this are mostly turns of
# conversations, which are often hit within seconds: they go through the page cache and stay there.
DIRECT_BYTES_MIN: Final = 16 << 20

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Draft:
    """A record that has no place in a segment yet: `header` without segment and offset, and the bytes to store.

    sealed: whether the header already has the payload's checksum, computed when the payload was first written.
    """

    header: RecordHeader
    stored: Buffer
    sealed: bool = False


class Segments:
    """The segment files of one store. One writer; not thread-safe."""

    def __init__(self, directory: Path, identity: StoreIdentity, disk: Disk, *, segment_bytes: int) -> None:
        self.directory = directory
        self.identity = identity
        self.segment_bytes = segment_bytes
        self.disk = disk
        self._direct = DirectWriter(disk)
        # Batches of at least this size bypass the page cache.
        self.direct_bytes_min = DIRECT_BYTES_MIN
        self.fresh = FreshBytes()
        # Sizes of the files, which count against the budget.
        self.sizes: dict[int, int] = {}
        self.active: int | None = None
        self._fd = -1
        # True while the active segment's directory entry may not be durable.
        self._is_new = False
        self._next = 1
        # Open descriptors of deleted files.
        self._dropped: list[int] = []
        self._freeing: threading.Thread | None = None
        self.read_directory(identity)

    def read_directory(self, identity: StoreIdentity) -> None:
        """List the segments in the directory. After this, no segment is open for writing."""
        self.identity = identity
        self.active, self._fd, self._is_new = None, -1, False
        self.sizes.clear()
        for path in self.directory.iterdir():
            number = segment_number(path.name)
            if number is None:
                continue
            self._next = max(self._next, number + 1)
            if not put_aside(path):
                self.sizes[number] = path.stat().st_size

    @property
    def used_bytes(self) -> int:
        return sum(self.sizes.values())

    def path(self, number: int) -> Path:
        return self.directory / segment_name(number)

    def start_after(self, number: int) -> None:
        """Give new segments numbers above this one. A segment number is never used again, because a reader may still
        have the old file open.
        """
        self._next = max(self._next, number + 1)

    def resume(self, number: int, end: int) -> None:
        """Continue to append to a segment at `end`; bytes behind this offset are cut off."""
        self._close_active()
        self._fd = self.disk.open(self.path(number))
        self.active = number
        self._truncate(end)

    def make_way(self, nbytes: int, created_ms: int) -> None:
        """Start a new segment if `nbytes` do not fit the active one."""
        if self.active is None or self.sizes[self.active] + nbytes > self.segment_bytes:
            self.roll(created_ms)

    def append(self, drafts: Sequence[Draft], created_ms: int) -> list[RecordHeader]:
        """Write a batch behind the last one; the batch is not durable yet. Returns the records' headers, now with
        segment and offset.

        A large batch bypasses the page cache, and may still be on its way to the disk until `written` or `sync`.

        Raises:  OSError: nothing of the batch is stored; bytes written for it were cut off again.
        """
        if not drafts:
            return []
        batch_bytes = sum(draft.header.extent_bytes for draft in drafts)
        self.make_way(batch_bytes, created_ms)
        assert self.active is not None
        # Recovery may have cut the file off inside a sector.
        start = align(self.sizes[self.active], BATCH_ALIGN)
        end = start
        headers: list[RecordHeader] = []
        try:
            directly = batch_bytes >= self.direct_bytes_min
            directly = directly and self._direct.begin(self._fd, start, align(batch_bytes, BATCH_ALIGN))
            group_bytes = _DIRECT_GROUP_BYTES if directly else _WRITE_BYTES
            for group in groups_of(drafts, lambda draft: draft.header.extent_bytes, group_bytes):
                placed, buffers = self._place(group, self.active, end)
                headers += placed
                nbytes = placed[-1].offset + placed[-1].extent_bytes - end
                if len(headers) == len(drafts):
                    gap = align(end + nbytes, BATCH_ALIGN) - end - nbytes
                    buffers.append(_PADDING[:gap])
                    nbytes += gap
                if directly:
                    self._direct.write(buffers)
                else:
                    self.disk.write(self._fd, buffers, end)
                    # Start writeback with the first group, so that the disk is busy from then on.
                    self.disk.start_writeback(self._fd, end, nbytes)
                end += nbytes
            if directly:
                self._direct.end()
                self.fresh.note(self.path(self.active), start, end - start)
        except BaseException:
            # Of any kind: a piece that is still on its way would overwrite the next batch.
            self.rollback(start)
            raise
        self.sizes[self.active] = end
        return headers

    def _place(self, drafts: Sequence[Draft], segment: int, start: int) -> tuple[list[RecordHeader], list[Buffer]]:
        headers: list[RecordHeader] = []
        buffers: list[Buffer] = []
        offset = start
        for draft in drafts:
            checksum = draft.header.payload_checksum if draft.sealed else payload_checksum(draft.stored)
            header = dataclasses.replace(draft.header, payload_checksum=checksum, segment=segment, offset=offset)
            headers.append(header)
            padding = align(header.stored_bytes, RECORD_ALIGN) - header.stored_bytes
            buffers += [pack_record_header(header, self.identity.seed), draft.stored]
            if padding:
                buffers.append(_PADDING[:padding])
            offset += header.extent_bytes
        return headers, buffers

    def sync(self) -> None:
        """Make the appended bytes durable, then the segment's directory entry. Syncing the bytes does most of the work
        for the directory entry too.

        Raises:  OSError: they could not be written; the caller calls `rollback`.
        """
        self.written()
        self.disk.sync_data(self._fd)
        self.sync_name()

    def written(self) -> None:
        """Wait until all appended bytes can be read.  Raises:  OSError: they could not be written."""
        self._direct.finish()

    def sync_name(self) -> None:
        """Make the active segment's directory entry durable. The sync must happen before anything refers to the
        segment.
        """
        if self._is_new:
            self.disk.sync_directory(self.directory)
            self._is_new = False

    def sync_file(self, number: int) -> None:
        """Make a segment that is not active durable, with its directory entry, which a crash may have left unsynced."""
        fd = self.disk.open(self.path(number))
        try:
            self.disk.sync_data(fd)
        finally:
            self.disk.close(fd)
        self.disk.sync_directory(self.directory)

    def rollback(self, end: int) -> None:
        """Cut the active segment back to `end` after an append or its index transaction failed."""
        # A write that is still on its way would make the file longer again.
        with contextlib.suppress(OSError):
            self.written()
        if self.active is not None:
            self._truncate(end)

    def roll(self, created_ms: int) -> None:
        """Start a new segment. The new segment's directory entry is durable after the next sync."""
        number = self._next
        self._next += 1
        fd = self.disk.create(self.path(number))
        try:
            self.disk.write(fd, [pack_segment_header(self.identity, number, created_ms)], 0)
        except OSError:
            self.disk.close(fd)
            with contextlib.suppress(OSError):
                self.disk.unlink(self.path(number))
            raise
        self._close_active()
        self._fd, self.active, self._is_new = fd, number, True
        self.sizes[number] = SEGMENT_HEADER_BYTES

    def rewrite_header(self, number: int, created_ms: int) -> None:
        """Replace a damaged segment header. The records are still valid: their own headers name segment and offset."""
        with os.fdopen(open_to_read(self.path(number)), "rb") as file:
            try:
                found, named = unpack_segment_header(file.read(SEGMENT_HEADER_BYTES))
                if (found.store_id, named) == (self.identity.store_id, number):
                    return
            except BlockCorrupt:
                pass  # it is damaged; that is why it is written again
        fd = self.disk.open(self.path(number))
        try:
            self.disk.write(fd, [pack_segment_header(self.identity, number, created_ms)], 0)
            self.disk.sync_data(fd)
        finally:
            self.disk.close(fd)

    def drop(self, number: int) -> None:
        """Delete a segment that nothing refers to. The segment's space is freed by `let_go`, or when this object is
        closed.
        """
        if number == self.active:
            self._close_active()
        # Closing a deleted file's last descriptor blocks until all its pages and extents are freed.
        with contextlib.suppress(OSError):
            self._dropped.append(os.open(self.path(number), os.O_RDONLY | os.O_CLOEXEC))
        self.disk.unlink(self.path(number))
        del self.sizes[number]

    def let_go(self) -> None:
        """Free the space of dropped segments, in a separate thread."""
        self.wait_freed()
        if self._dropped:
            self._freeing = threading.Thread(target=_close_all, args=(self._dropped,), name="antefix-free")
            self._dropped = []
            self._freeing.start()

    def wait_freed(self) -> None:
        """Wait until the file system has freed the dropped segments, except those that a reader still has open."""
        if self._freeing is not None:
            self._freeing.join()
            self._freeing = None

    def close(self) -> None:
        self._close_active()
        self._direct.close()
        self.let_go()
        self.wait_freed()

    @contextlib.contextmanager
    def reading(self, number: int) -> Iterator[int]:
        """Open a segment for the writer's own reads. Readers use antefix.store_files.segment_reader."""
        fd = open_to_read(self.path(number))
        try:
            yield fd
        finally:
            os.close(fd)

    def read(self, number: int, offset: int, nbytes: int) -> bytes:
        with self.reading(number) as fd:
            return os.pread(fd, nbytes, offset)

    def scan(self, number: int, start: int = SEGMENT_HEADER_BYTES, *, check_payloads: bool) -> Iterator[RecordHeader]:
        """Headers of the whole records from `start` on; damaged bytes are skipped.

        check_payloads: verify every payload as well, and leave out records whose payload is damaged.
        """
        for raws in self.raw_headers(number, start, check_payloads=check_payloads):
            for at in range(0, len(raws), RECORD_HEADER_BYTES):
                yield unpack_record_header(raws[at : at + RECORD_HEADER_BYTES], self.identity.seed)

    def raw_headers(self, number: int, start: int = SEGMENT_HEADER_BYTES, *, check_payloads: bool) -> Iterator[bytes]:
        """`scan`, but yields raw bytes: one or more headers at a time."""
        return raw_headers(self.path(number), number, self.identity.seed, start, check_payloads=check_payloads)

    def _truncate(self, end: int) -> None:
        assert self.active is not None
        self.disk.truncate(self._fd, end)
        self.sizes[self.active] = end

    def _close_active(self) -> None:
        with contextlib.suppress(OSError):
            self.written()
        if self.active is not None:
            self.disk.close(self._fd)
            self.active, self._fd, self._is_new = None, -1, False


def groups_of(
    items: Sequence[T], nbytes_of: Callable[[T], int], group_bytes: int = _WRITE_BYTES
) -> Iterator[Sequence[T]]:
    """Cut the records into groups of at least `group_bytes`: by default enough for the disk to start writing."""
    first = nbytes = 0
    for number, item in enumerate(items, start=1):
        nbytes += nbytes_of(item)
        if nbytes >= group_bytes or number == len(items):
            yield items[first:number]
            first, nbytes = number, 0


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)

"""Reads records of segments in an object store with range requests: neighbouring records in one request, many requests
at a time, and each record verified.

Where the bucket can, a range is read straight into its records' buffers, and each record is checked as soon as it is
there. Otherwise, and after an answer that broke off, the bucket's library reads the range as a whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from antefix.errors import BlockCorrupt, Unavailable
from antefix.objects.bucket import Bucket
from antefix.objects.object_index import Place
from antefix.objects.range_source import MemoryRange, RangeSource
from antefix.objects.segment_object import SEGMENT_NUMBER
from antefix.objects.usual_time import UsualTime
from antefix.record import Buffer, RecordKind
from antefix.store_files import codec
from antefix.store_files.read_runs import Decrypt
from antefix.store_files.record_format import (
    RECORD_HEADER_BYTES,
    Codec,
    RecordFlag,
    extent_bytes,
    payload_checksum,
)
from antefix.store_files.record_header import RecordHeader, plain_record, sealed_part, unpack_record_header
from antefix.store_files.seal import Seals

# The largest range of one read. Larger ranges lose more when a read breaks off; smaller ranges need more requests.
RANGE_BYTES_MAX: Final = 4 << 20
# A gap up to this size is read along with its neighbours, because a second request would take longer.
GAP_BYTES_MAX: Final = 128 << 10
# How many reads one process has in flight; they take 64 MiB of memory at most.
READS_IN_FLIGHT: Final = 16
# The time limit for the bytes of one range that are read straight into their buffers: this many times the mean of other
# ranges, but at least and at most so many seconds.
_LATE: Final = 8.0
_LATE_S: Final = 2.0
_DIRECT_S: Final = 30.0


@dataclass(slots=True)
class ObjectReadCounters:
    """num_ranges: including num_direct_ranges, which were read straight into their buffers.  num_broken_ranges: direct
    reads that broke off; the rest was read in the other way.  num_asked_again: as of the bucket.  num_gone: segments
    that were deleted while they were read.  num_read_again: records that failed a check once.  num_bad: records that
    failed twice, or whose segment is gone.
    """

    num_blocks: int = 0
    num_ranges: int = 0
    num_direct_ranges: int = 0
    num_broken_ranges: int = 0
    num_asked_again: int = 0
    bytes_read: int = 0
    num_gone: int = 0
    num_read_again: int = 0
    num_bad: int = 0


@dataclass(slots=True, eq=False)
class ObjectWanted:
    """A record to read.  into: gives the buffer for its payload, once the length is known.

    is_good: whether the record was read and passed all checks. problem: why a check failed; empty if no check has
    failed.
    """

    hash: bytes
    place: Place
    into: Callable[[int], memoryview]
    is_good: bool = False
    sealed: bytes = b""
    problem: str = ""


def ranges_of(wanted: Sequence[ObjectWanted]) -> list[list[ObjectWanted]]:
    """Group records into ranges that are read with one request: records near each other in one segment, in ranges that
    are not too large.
    """
    order = sorted(wanted, key=lambda each: (each.place.segment.created_ms, each.place.segment.id, each.place.offset))
    found: list[list[ObjectWanted]] = []
    for want in order:
        last = found[-1] if found else []
        if last and last[0].place.segment.id == want.place.segment.id:
            gap = want.place.offset - last[-1].place.stop
            nbytes = want.place.stop - last[0].place.offset
            if 0 <= gap <= GAP_BYTES_MAX and nbytes <= RANGE_BYTES_MAX:
                last.append(want)
                continue
        found.append([want])
    return found


class ObjectReads:
    """Reads ranges. Reads are started from one event loop. seals: if given, only sealed records are accepted. decrypt:
    decrypts encrypted records.
    """

    def __init__(self, bucket: Bucket, *, seals: Seals | None = None, decrypt: Decrypt | None = None) -> None:
        self._bucket = bucket
        self._seals = seals
        self._decrypt = decrypt
        self._turns = asyncio.Semaphore(READS_IN_FLIGHT)
        self._threads = ThreadPoolExecutor(READS_IN_FLIGHT, thread_name_prefix="antefix-objects")
        # How long the bytes of a range take.
        self._usual = UsualTime(None, factor=_LATE, least_s=_LATE_S, most_s=_DIRECT_S)
        self.counters: Final = ObjectReadCounters()

    async def read(self, kind: RecordKind, wanted: list[ObjectWanted], *, fingerprint: bytes, tenant: bytes) -> None:
        """Read one range. Afterwards each record's `problem` says whether it passed the checks.

        No thread writes into a record's buffer after this returned, raised or was cancelled.
        Raises:  ObjectGone, Unavailable.
        """
        async with self._turns:
            left = await self._read_direct(kind, wanted, fingerprint, tenant)
            if left:
                start, stop = left[0].place.offset, left[-1].place.stop
                data = await self._bucket.read(left[0].place.segment.name, start, stop)
                self._count(memoryview(data).nbytes)
                await self._take_in_thread(kind, left, MemoryRange(data), fingerprint, tenant)

    async def _read_direct(
        self, kind: RecordKind, wanted: list[ObjectWanted], fingerprint: bytes, tenant: bytes
    ) -> list[ObjectWanted]:
        """Read a range while it arrives, if the bucket can do that. Returns the records to read in the other way."""
        segment, start, stop = wanted[0].place.segment, wanted[0].place.offset, wanted[-1].place.stop
        for want in wanted:
            want.problem = ""
        try:
            source = await self._bucket.open_range(segment.name, start, stop)
        finally:
            # Also after a failure or a cancellation.
            self.counters.num_asked_again = self._bucket.num_asked_again
        if source is None:
            return wanted
        limit_s, began_s = self._usual.late_s, time.monotonic()
        try:
            async with asyncio.timeout(limit_s):
                await self._take_in_thread(kind, wanted, source, fingerprint, tenant)
        except (Unavailable, TimeoutError) as err:
            if isinstance(err, TimeoutError):
                # If all ranges have become slow, the next ones get more time.
                self._usual.note(limit_s)
            self.counters.num_broken_ranges += 1
            return [want for want in wanted if not want.is_good and not want.problem]
        self._usual.note(time.monotonic() - began_s)
        self.counters.num_direct_ranges += 1
        self._count(stop - start)
        return []

    def _count(self, nbytes: int) -> None:
        self.counters.num_ranges += 1
        self.counters.bytes_read += nbytes

    async def _take_in_thread(
        self,
        kind: RecordKind,
        wanted: Sequence[ObjectWanted],
        source: RangeSource,
        fingerprint: bytes,
        tenant: bytes,
    ) -> None:
        """`_take`. Ends when the thread has ended, even if it is cancelled: the thread writes into callers' buffers."""
        work = asyncio.get_running_loop().run_in_executor(
            self._threads, self._take, kind, wanted, source, fingerprint, tenant
        )
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            source.abort()
            while not work.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([work])
            # Read, so that asyncio does not report an error that nobody saw.
            work.exception()
            raise
        finally:
            source.close()

    def close(self) -> None:
        self._threads.shutdown()

    def _take(
        self,
        kind: RecordKind,
        wanted: Sequence[ObjectWanted],
        source: RangeSource,
        fingerprint: bytes,
        tenant: bytes,
    ) -> None:
        """Check and copy the records of one range, whose bytes `source` has.  Raises:  Unavailable: it broke off."""
        at = wanted[0].place.offset
        for want in wanted:
            source.skip(want.place.offset - at)
            record = _RecordBytes(source, want.place.extent_bytes)
            at = want.place.stop
            want.problem = ""
            try:
                self._take_one(kind, want, record, fingerprint, tenant)
            except (BlockCorrupt, ValueError) as err:
                want.problem = str(err) or type(err).__name__
            record.skip_rest()
        source.finish()

    def _take_one(
        self, kind: RecordKind, want: ObjectWanted, record: _RecordBytes, fingerprint: bytes, tenant: bytes
    ) -> None:
        """Check one record and copy its payload.  Raises:  BlockCorrupt, ValueError: a check failed.  Unavailable."""
        place = want.place
        head = bytes(record.take(RECORD_HEADER_BYTES))
        plain = plain_record(
            head,
            place.segment.seed,
            kind=kind,
            block_hash=want.hash,
            fingerprint=fingerprint,
            segment=SEGMENT_NUMBER,
            offset=place.offset,
        )
        if plain is not None and extent_bytes(plain[0]) == place.extent_bytes:
            payload_bytes, checksum = plain
            stored = into = _buffer(want, payload_bytes)
            record.fill(into)
            # With seals, a plain payload is checked by its seal alone, which proves more than a checksum.
            if self._seals is None:
                _check_sum(stored, checksum)
        else:
            header = self._header(kind, want, head, fingerprint)
            into, checksum = _buffer(want, header.payload_bytes), header.payload_checksum
            stored = record.take(header.stored_bytes)
            _check_sum(stored, checksum)
            self._decode(header, stored, into)
        sealed = sealed_part(head)
        if self._seals is not None and not self._seals.fits(
            sealed, into, kind=kind, block_hash=want.hash, fingerprint=fingerprint, tenant=tenant
        ):
            # Check the checksum first, so that damage in transit is not reported as a forgery.
            _check_sum(stored, checksum)
            self._seals.num_broken += 1
            raise BlockCorrupt("the record was not sealed by this deployment")
        want.is_good, want.sealed = True, sealed

    def _header(self, kind: RecordKind, want: ObjectWanted, head: bytes, fingerprint: bytes) -> RecordHeader:
        """The header of an encoded record.  Raises:  BlockCorrupt: another record's, or not an encoded record's."""
        place = want.place
        header = unpack_record_header(head, place.segment.seed)
        found = (header.kind, header.hash, header.fingerprint, header.segment, header.offset, header.extent_bytes)
        if found != (kind, want.hash, fingerprint, SEGMENT_NUMBER, place.offset, place.extent_bytes):
            raise BlockCorrupt("the record in the object store is not the one that the index names")
        if header.codec == Codec.RAW and not header.flags & RecordFlag.ENCRYPTED:
            raise BlockCorrupt("a raw payload of another length than its header says")
        return header

    def _decode(self, header: RecordHeader, stored: memoryview, into: memoryview) -> None:
        body: Buffer = stored
        if header.flags & RecordFlag.ENCRYPTED:
            if self._decrypt is None:
                raise BlockCorrupt("the record is encrypted, and there is no key for it")
            body = self._decrypt(header, stored)
        if header.codec == Codec.PLANES_ZSTD:
            codec.decode(body, into)
        else:
            into[:] = body


class _RecordBytes:
    """The bytes of one record in a source, so that what a failed check leaves unread can be skipped."""

    def __init__(self, source: RangeSource, extent_bytes: int) -> None:
        self._source = source
        self._nbytes_left = extent_bytes

    def take(self, nbytes: int) -> memoryview:
        self._nbytes_left -= nbytes
        return self._source.take(nbytes)

    def fill(self, into: memoryview) -> None:
        self._nbytes_left -= into.nbytes
        self._source.fill(into)

    def skip_rest(self) -> None:
        self._source.skip(self._nbytes_left)


def _buffer(want: ObjectWanted, payload_bytes: int) -> memoryview:
    """The memory for the record's payload.  Raises:  BlockCorrupt: the memory has another size."""
    into = want.into(payload_bytes)
    if into.nbytes != payload_bytes:
        raise BlockCorrupt(f"the record's payload has {payload_bytes} bytes, but {into.nbytes} were expected")
    return into


def _check_sum(stored: memoryview, checksum: bytes) -> None:
    """Raises:  BlockCorrupt: the bytes do not have the header's checksum."""
    if payload_checksum(stored) != checksum:
        raise BlockCorrupt("a wrong checksum")

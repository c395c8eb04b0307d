"""Reads records of segments in an object store with range requests: neighbouring records in one request, many requests
at a time, and each record verified.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from antefix.errors import BlockCorrupt
from antefix.objects.bucket import Bucket
from antefix.objects.object_index import Place
from antefix.objects.segment_object import SEGMENT_NUMBER
from antefix.record import Buffer, RecordKind
from antefix.store_files import codec
from antefix.store_files.read_runs import Decrypt
from antefix.store_files.record_format import RECORD_HEADER_BYTES, Codec, RecordFlag, payload_checksum
from antefix.store_files.record_header import RecordHeader, sealed_part, unpack_record_header
from antefix.store_files.seal import Seals

# The largest range of one read. Larger ranges lose more when a read breaks off; smaller ranges need more requests.
RANGE_BYTES_MAX: Final = 4 << 20
# A gap up to this size is read along with its neighbours, because a second request would take longer.
GAP_BYTES_MAX: Final = 128 << 10
# How many reads one process has in flight; they take 64 MiB of memory at most.
READS_IN_FLIGHT: Final = 16
_DECODING_THREADS: Final = 4


@dataclass(slots=True)
class ObjectReadCounters:
    """num_gone: segments that were deleted while they were read. num_read_again: records that failed a check once.
    num_bad: records that failed twice, or whose segment is gone.
    """

    num_blocks: int = 0
    num_ranges: int = 0
    bytes_read: int = 0
    num_gone: int = 0
    num_read_again: int = 0
    num_bad: int = 0


@dataclass(slots=True, eq=False)
class ObjectWanted:
    """A record to read.  into: gives the buffer for its payload, once the length is known.

    header: set when the header has been read. problem: why a check failed; empty if no check has failed."""

    hash: bytes
    place: Place
    into: Callable[[int], memoryview]
    header: RecordHeader | None = None
    sealed: bytes = b""
    problem: str = ""


def ranges_of(wanted: Sequence[ObjectWanted]) -> list[list[ObjectWanted]]:
    """Group records into ranges that are read with one request: records near each other in one segment, in ranges that
    are not too large.
    """
    order = sorted(wanted, key=lambda each: (each.place.segment.name, each.place.offset))
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
        self._threads = ThreadPoolExecutor(_DECODING_THREADS, thread_name_prefix="antefix-objects")
        self.counters: Final = ObjectReadCounters()

    async def read(self, kind: RecordKind, wanted: list[ObjectWanted], *, fingerprint: bytes, tenant: bytes) -> None:
        """Read one range. Afterwards each record's `problem` says whether it passed the checks.

        No thread writes into a record's buffer after this returned, raised or was cancelled.
        Raises:  ObjectGone, Unavailable.
        """
        segment, start, stop = wanted[0].place.segment, wanted[0].place.offset, wanted[-1].place.stop
        async with self._turns:
            data = await self._bucket.read(segment.name, start, stop)
            self.counters.num_ranges += 1
            self.counters.bytes_read += memoryview(data).nbytes
            work = asyncio.get_running_loop().run_in_executor(
                self._threads, self._take, kind, wanted, data, start, fingerprint, tenant
            )
            try:
                await asyncio.shield(work)
            except asyncio.CancelledError:
                await asyncio.wait([work])
                raise

    def close(self) -> None:
        self._threads.shutdown()

    def _take(
        self,
        kind: RecordKind,
        wanted: Sequence[ObjectWanted],
        data: Buffer,
        start: int,
        fingerprint: bytes,
        tenant: bytes,
    ) -> None:
        view = memoryview(data).cast("B")
        for want in wanted:
            at = want.place.offset - start
            try:
                want.problem = ""
                self._take_one(kind, want, view[at : at + want.place.extent_bytes], fingerprint, tenant)
            except (BlockCorrupt, ValueError) as err:
                want.problem = str(err) or type(err).__name__

    def _take_one(
        self, kind: RecordKind, want: ObjectWanted, raw: memoryview, fingerprint: bytes, tenant: bytes
    ) -> None:
        """Check one record and copy its payload.  Raises:  BlockCorrupt, ValueError: a check failed."""
        place = want.place
        head = bytes(raw[:RECORD_HEADER_BYTES])
        header = unpack_record_header(head, place.segment.seed)
        found = (header.kind, header.hash, header.fingerprint, header.segment, header.offset, header.extent_bytes)
        if found != (kind, want.hash, fingerprint, SEGMENT_NUMBER, place.offset, place.extent_bytes):
            raise BlockCorrupt("the record in the object store is not the one that the index names")
        stored = raw[RECORD_HEADER_BYTES : RECORD_HEADER_BYTES + header.stored_bytes]
        # A raw, unencrypted payload is checked by its seal alone, which proves more than a checksum.
        is_sealed = self._seals is not None and header.codec == Codec.RAW and not header.flags & RecordFlag.ENCRYPTED
        if not is_sealed:
            _check_sum(header, stored)
        into = want.into(header.payload_bytes)
        if into.nbytes != header.payload_bytes:
            raise BlockCorrupt(
                f"the record's payload has {header.payload_bytes} bytes, but {into.nbytes} were expected"
            )
        body: Buffer = stored
        if header.flags & RecordFlag.ENCRYPTED:
            if self._decrypt is None:
                raise BlockCorrupt("the record is encrypted, and this process has no key for it")
            body = self._decrypt(header, stored)
        if header.codec == Codec.PLANES_ZSTD:
            codec.decode(body, into)
        else:
            into[:] = body
        sealed = sealed_part(head)
        if self._seals is not None and not self._seals.fits(
            sealed, into, kind=kind, block_hash=want.hash, fingerprint=fingerprint, tenant=tenant
        ):
            # Check the checksum first, so that damage in transit is not reported as a forgery.
            _check_sum(header, stored)
            self._seals.num_broken += 1
            raise BlockCorrupt("the record was not sealed by this deployment")
        want.header, want.sealed = header, sealed


def _check_sum(header: RecordHeader, stored: memoryview) -> None:
    """Raises:  BlockCorrupt: the bytes do not have the header's checksum."""
    if payload_checksum(stored) != header.payload_checksum:
        raise BlockCorrupt("a wrong checksum")

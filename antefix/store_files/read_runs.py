"""Reads adjacent records of a segment into the caller's buffers, and verifies each one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from antefix.errors import BlockCorrupt
from antefix.record import RecordKind
from antefix.store_files import codec
from antefix.store_files.record_format import (
    RECORD_ALIGN,
    RECORD_HEADER_BYTES,
    Codec,
    IndexEntry,
    RecordFlag,
    payload_checksum,
)
from antefix.store_files.record_header import RecordHeader, expected_checksum, sealed_part, unpack_record_header
from antefix.store_files.seal import Seals
from antefix.store_files.segment_files import SegmentFiles, preadv_cached, preadv_full

# What one preadv reads: from here on a cold disk got no faster, and smaller reads, whose checksums would find them in a
# core's own cache, lost more to threads that wait for the interpreter's lock (0.5, 1, 2 and 4 MiB from the page cache:
# 0.53, 0.59, 0.66 and 0.72 of unverified preadv). Small restores are shared out evenly, but not below the minimum.
RUN_BYTES_MAX: Final = 4 << 20
RUN_BYTES_MIN: Final = 1 << 20
# preadv takes 1,024 buffers (IOV_MAX); a record uses two, one more for each piece of a stream that it crosses.
RUN_RECORDS_MAX: Final = 448
_RAW: Final = int(Codec.RAW)
_ENCRYPTED: Final = int(RecordFlag.ENCRYPTED)
_SEALED: Final = int(RecordFlag.SEALED)

Decrypt = Callable[[RecordHeader, memoryview], bytes]


@dataclass(slots=True)
class Wanted:
    """One record to read: its place according to the index, and the buffers for its payload, in one or more parts.

    sealed: the sealed part of the header, once it has been read. forged: whether the record is undamaged but has no
    valid seal.
    """

    number: int
    hash: bytes
    entry: IndexEntry
    into: Sequence[memoryview] = ()
    sealed: bytes = b""
    forged: bool = False

    @property
    def version(self) -> int:
        """Of the record's header."""
        return 2 if self.entry.flags & _SEALED else 1

    @property
    def locked(self) -> bool:
        return bool(self.entry.flags & _ENCRYPTED)

    @property
    def plain(self) -> bool:
        """Whether the stored bytes are the payload itself, neither compressed nor encrypted."""
        return self.entry.codec == _RAW and not self.entry.flags & _ENCRYPTED


class RunReader:
    """Reads runs of neighbouring records, in one store, whose payloads belong to one fingerprint. Thread-safe."""

    def __init__(self, directory: Path, seed: int, decrypt: Decrypt | None, seals: Seals | None) -> None:
        """seals: if given, only sealed records are accepted."""
        self.files = SegmentFiles(directory)
        self._seed = seed
        self._decrypt = decrypt
        self._seals = seals

    def renew(self, seed: int) -> None:
        self._seed = seed
        self.files.close()

    def read(
        self, kind: RecordKind, run: Sequence[Wanted], fingerprint: bytes, *, tenant: bytes = b"", wait: bool = True
    ) -> list[Wanted]:
        """Read one run. Returns the records that failed a check, or could not be read.

        tenant: the owner that the records must have, which is checked only with seals; empty: any owner.

        Raises:  BlockingIOError: `wait` is False, and some of the run is not in the page cache.
        """
        reading = _Reading(run)
        try:
            with self.files.use(run[0].entry.segment) as fd:
                if wait:
                    num_read = preadv_full(fd, reading.buffers, reading.start)
                elif (num_read := preadv_cached(fd, reading.buffers, reading.start)) < reading.nbytes:
                    raise BlockingIOError("not in the page cache")
        except BlockingIOError:
            raise
        except OSError:
            # The segment is gone, or the disk cannot read it. The caller looks up each record again.
            return list(run)
        rejected = self._damaged(kind, reading, num_read, fingerprint)
        return (
            rejected if self._seals is None else rejected + self._forged(kind, reading, rejected, fingerprint, tenant)
        )

    def copy(self, segment: int, offset: int, into: memoryview, *, wait: bool = True) -> bool:
        """Read a stretch of a segment as it is, without looking at its records.

        Returns whether all bytes could be read.  Raises:  BlockingIOError: as in `read`.
        """
        try:
            file = self.files.borrow(segment)
        except OSError:
            return False
        try:
            if wait:
                return preadv_full(file.fd, [into], offset) == into.nbytes
            if preadv_cached(file.fd, [into], offset) < into.nbytes:
                raise BlockingIOError("not in the page cache")
            return True
        except BlockingIOError:
            raise
        except OSError:
            return False
        finally:
            self.files.give_back(file)

    def _forged(
        self, kind: RecordKind, reading: _Reading, damaged: Sequence[Wanted], fingerprint: bytes, tenant: bytes
    ) -> list[Wanted]:
        """The records whose payloads could be decoded but have no valid seal for their names."""
        assert self._seals is not None
        for want in reading.wanted:
            payload = want.into[0] if len(want.into) == 1 else b"".join(want.into)
            want.forged = want not in damaged and not self._seals.holds(
                want.sealed, payload, kind=kind, block_hash=want.hash, fingerprint=fingerprint, tenant=tenant
            )
        return [want for want in reading.wanted if want.forged]

    def _damaged(self, kind: RecordKind, reading: _Reading, num_read: int, fingerprint: bytes) -> list[Wanted]:
        # One after the other without anything between: hashing lets go of the interpreter's lock, and threads that wait
        # for it from each other sleep and are woken again.
        checksums = [
            payload_checksum(*body) if end <= num_read else None
            for body, end in zip(reading.bodies, reading.ends, strict=True)
        ]
        found = zip(reading.wanted, reading.heads, reading.bodies, checksums, strict=True)
        return [
            want
            for want, head, body, checksum in found
            if checksum is None or not self._accept(kind, want, bytes(head), body, checksum, fingerprint)
        ]

    def _accept(
        self,
        kind: RecordKind,
        want: Wanted,
        head: bytes,
        body: Sequence[memoryview],
        checksum: bytes,
        fingerprint: bytes,
    ) -> bool:
        """Verify one record, and decode it if it is compressed or encrypted."""
        expected = expected_checksum(
            head, self._seed, kind=kind, block_hash=want.hash, fingerprint=fingerprint, entry=want.entry
        )
        if expected != checksum:
            return False
        want.sealed = sealed_part(head)
        if body is want.into:
            return True
        try:
            _decode(want, head, body[0], self._seed, self._decrypt)
        except (BlockCorrupt, ValueError):
            return False
        return True


class _Reading:
    """One preadv: for each record padding and header, then the payload or the bytes that it is decoded from."""

    def __init__(self, wanted: Sequence[Wanted]) -> None:
        self.wanted = wanted
        self.start = wanted[0].entry.offset
        self.buffers: list[memoryview] = []
        # Per record: header, stored bytes, and where it ends, counted from `start`.
        self.heads: list[memoryview] = []
        self.bodies: list[Sequence[memoryview]] = []
        self.ends: list[int] = []
        heads = memoryview(bytearray(len(wanted) * (RECORD_HEADER_BYTES + RECORD_ALIGN)))
        at, end = 0, self.start
        for want in wanted:
            entry = want.entry
            gap = entry.offset - end + RECORD_HEADER_BYTES
            body = want.into if want.plain else (memoryview(bytearray(entry.stored_bytes)),)
            self.buffers.append(heads[at : at + gap])
            self.buffers += body
            at += gap
            end = entry.offset + RECORD_HEADER_BYTES + entry.stored_bytes
            self.heads.append(heads[at - RECORD_HEADER_BYTES : at])
            self.bodies.append(body)
            self.ends.append(end - self.start)
        self.nbytes = end - self.start


def _decode(want: Wanted, head: bytes, body: memoryview, seed: int, decrypt: Decrypt | None) -> None:
    """Raises:  BlockCorrupt, ValueError: the stored bytes cannot be decoded to a payload."""
    if want.entry.flags & _ENCRYPTED:
        assert decrypt is not None, "an encrypted record is read only with its key"
        body = memoryview(decrypt(unpack_record_header(head, seed), body))
    parts = want.into
    into = parts[0] if len(parts) == 1 else memoryview(bytearray(want.entry.payload_bytes))
    if want.entry.codec == Codec.PLANES_ZSTD:
        codec.decode(body, into)
    else:
        into[:] = body
    if len(parts) > 1:
        at = 0
        for part in parts:
            part[:] = into[at : at + part.nbytes]
            at += part.nbytes


def records_per_run(count: int, num_threads: int, record_bytes: int) -> int:
    """How many of `count` records one preadv should read: few enough that all threads finish at about the same time."""
    run = RUN_BYTES_MAX // (RECORD_HEADER_BYTES + record_bytes)
    evenly = -(-count // (4 * num_threads))
    return max(1, min(run, max(evenly, RUN_BYTES_MIN * run // RUN_BYTES_MAX), RUN_RECORDS_MAX))


def runs_of(wanted: Sequence[Wanted], bytes_max: int = RUN_BYTES_MAX) -> Iterator[Sequence[Wanted]]:
    """Cut records into runs: at every gap, and at the size limit of one preadv."""
    first = segment = end = nbytes = 0
    for number, want in enumerate(wanted):
        entry = want.entry
        extent = entry.extent_bytes
        is_gap = entry.segment != segment or entry.offset != end
        is_full = nbytes + extent > bytes_max or number - first == RUN_RECORDS_MAX
        if number > first and (is_gap or is_full):
            yield wanted[first:number]
            first, nbytes = number, 0
        nbytes += extent
        segment, end = entry.segment, entry.offset + extent
    if wanted:
        yield wanted[first:]

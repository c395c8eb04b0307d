"""Reads neighbouring records of a segment into the caller's buffers, each one verified while it is in the CPU's cache.

A run is what one thread reads at a time: large, because a cold disk wants large reads. What the page cache holds
already is taken from it in bites that fit a core's own cache, so that a checksum does not fetch from memory again what
was just written there: that second pass would cost a third of a warm read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from antefix.errors import BlockCorrupt
from antefix.store import codec
from antefix.store.api import RecordKind
from antefix.store.format import (
    RECORD_HEADER_BYTES,
    Codec,
    IndexEntry,
    RecordFlag,
    RecordHeader,
    expected_checksum,
    payload_checksum,
    unpack_record_header,
)
from antefix.store.segment_files import SegmentFiles, preadv_cached, preadv_full

# A run of neighbours is cut here, so that 16 threads share even one long prefix.
RUN_BYTES_MAX: Final = 4 << 20
# preadv takes 1,024 buffers (IOV_MAX); a record uses two, one more for each piece of a stream that it crosses.
RUN_RECORDS_MAX: Final = 448
# Half of a core's second-level cache, 1 MiB on current servers. A larger record is a bite of its own.
BITE_BYTES_MAX: Final = 512 << 10

_RAW: Final = int(Codec.RAW)
_ENCRYPTED: Final = int(RecordFlag.ENCRYPTED)

Decrypt = Callable[[RecordHeader, memoryview], bytes]


@dataclass(slots=True)
class Wanted:
    """One record to read: where the index says that it is, and where its payload goes, in one or more parts."""

    number: int
    hash: bytes
    entry: IndexEntry
    into: Sequence[memoryview] = ()

    @property
    def locked(self) -> bool:
        return bool(self.entry.flags & _ENCRYPTED)

    @property
    def plain(self) -> bool:
        """What is stored is the payload itself."""
        return self.entry.codec == _RAW and not self.entry.flags & _ENCRYPTED


class RunReader:
    """Reads runs of one store's records of one fingerprint's payloads. Thread-safe."""

    def __init__(self, directory: Path, seed: int, decrypt: Decrypt | None) -> None:
        self.files = SegmentFiles(directory)
        self._seed = seed
        self._decrypt = decrypt

    def read(self, kind: RecordKind, run: Sequence[Wanted], fingerprint: bytes, *, wait: bool = True) -> list[Wanted]:
        """Read one run; returns those records that are not what they should be, or that the disk cannot read.

        Raises:  BlockingIOError: not to wait for the disk, and some of the run is not in the page cache.
        """
        failed: list[Wanted] = []
        done = 0
        try:
            with self.files.use(run[0].entry.segment) as fd:
                # 1. What is in the page cache, bite by bite.
                for bite in _bites(run):
                    reading = _Reading(bite)
                    if preadv_cached(fd, reading.buffers, reading.start) < reading.nbytes:
                        break
                    failed += self._rejected(kind, reading, reading.nbytes, fingerprint)
                    done += len(bite)
                # 2. From the first that is not, all the rest at once.
                if done < len(run):
                    if not wait:
                        raise BlockingIOError("not in the page cache")
                    reading = _Reading(run[done:])
                    num_read = preadv_full(fd, reading.buffers, reading.start)
                    failed += self._rejected(kind, reading, num_read, fingerprint)
        except BlockingIOError:
            raise
        except OSError:
            # The segment is gone, or the disk cannot read it: who asked looks each of them up again.
            failed += run[done:]
        return failed

    def _rejected(self, kind: RecordKind, reading: _Reading, num_read: int, fingerprint: bytes) -> list[Wanted]:
        return [
            want
            for want, head, body, end in reading.records
            if end > num_read or not self._accept(kind, want, bytes(head), body, fingerprint)
        ]

    def _accept(
        self, kind: RecordKind, want: Wanted, head: bytes, body: Sequence[memoryview], fingerprint: bytes
    ) -> bool:
        """Verify one record, and decode it where it is coded."""
        checksum = expected_checksum(
            head, self._seed, kind=kind, block_hash=want.hash, fingerprint=fingerprint, entry=want.entry
        )
        if checksum is None or payload_checksum(*body) != checksum:
            return False
        if body is want.into:
            return True
        try:
            _decode(want, head, body[0], self._seed, self._decrypt)
        except (BlockCorrupt, ValueError):
            return False
        return True


class _Reading:
    """The buffers of one preadv: per record padding and header, then the payload, or what it is decoded from."""

    def __init__(self, wanted: Sequence[Wanted]) -> None:
        self.start = wanted[0].entry.offset
        self.buffers: list[memoryview] = []
        # Record, header, stored bytes, and where it ends, counted from `start`.
        self.records: list[tuple[Wanted, memoryview, Sequence[memoryview], int]] = []
        heads = memoryview(bytearray(len(wanted) * (RECORD_HEADER_BYTES + 8)))
        at, end = 0, self.start
        for want in wanted:
            entry = want.entry
            gap = entry.offset - end + RECORD_HEADER_BYTES
            body = want.into if want.plain else (memoryview(bytearray(entry.stored_bytes)),)
            self.buffers.append(heads[at : at + gap])
            self.buffers += body
            at += gap
            end = entry.offset + RECORD_HEADER_BYTES + entry.stored_bytes
            self.records.append((want, heads[at - RECORD_HEADER_BYTES : at], body, end - self.start))
        self.nbytes = end - self.start


def _decode(want: Wanted, head: bytes, body: memoryview, seed: int, decrypt: Decrypt | None) -> None:
    """Raises:  BlockCorrupt, ValueError: what was stored makes no payload."""
    if want.entry.flags & _ENCRYPTED:
        assert decrypt is not None, "what cannot be decrypted is not read"
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


def runs_of(wanted: Sequence[Wanted]) -> Iterator[list[Wanted]]:
    """Cut at every gap, and into pieces that threads can share."""
    run: list[Wanted] = []
    nbytes = segment = end = 0
    for want in wanted:
        entry = want.entry
        if run:
            neighbours = entry.segment == segment and entry.offset == end
            if not neighbours or nbytes + entry.stored_bytes > RUN_BYTES_MAX or len(run) == RUN_RECORDS_MAX:
                yield run
                run, nbytes = [], 0
        run.append(want)
        extent = entry.extent_bytes
        nbytes += extent
        segment, end = entry.segment, entry.offset + extent
    if run:
        yield run


def _bites(run: Sequence[Wanted]) -> Iterator[list[Wanted]]:
    bite: list[Wanted] = []
    nbytes = 0
    for want in run:
        if bite and nbytes + want.entry.stored_bytes > BITE_BYTES_MAX:
            yield bite
            bite, nbytes = [], 0
        bite.append(want)
        nbytes += want.entry.extent_bytes
    if bite:
        yield bite

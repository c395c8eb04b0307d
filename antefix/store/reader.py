"""Reads a store's payloads from any process on its host: index snapshot, then preadv into the caller's buffers.

No call to the service, no copy in Python where the record is stored raw. Neighbours in a segment are read by one
preadv, several of which are in flight. Each record's header, own hash, fingerprint and checksum are verified on every
read. A record that moved or went while it was read is looked up again; only what the index still names and the
segment does not hold is corrupt, and that is reported as a suspect for the store to judge.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from antefix.errors import BlockCorrupt, InvalidRequest, Unavailable
from antefix.store import codec
from antefix.store.api import LookupResult, RecordKind
from antefix.store.format import (
    INDEX_DIR,
    RECORD_HEADER_BYTES,
    SEGMENT_DIR,
    STORE_FILE,
    Codec,
    IndexEntry,
    RecordFlag,
    RecordHeader,
    expected_checksum,
    payload_checksum,
    unpack_identity,
    unpack_record_header,
)
from antefix.store.index import Index
from antefix.store.segment_files import SegmentFiles, preadv_full

# A run of neighbours is cut here, so that 16 threads share even one long prefix.
RUN_BYTES_MAX: Final = 4 << 20
# preadv takes 1,024 buffers (IOV_MAX); a record uses two.
RUN_RECORDS_MAX: Final = 512
# Measured on two cores: 2 in flight, 4 MiB each, read a cold file at least as fast as direct I/O of any depth did,
# and a warm one faster than 4 or 16 did. Prefetching by fadvise made both slower. More cores can keep more in flight.
READS_IN_FLIGHT: Final = max(2, min(16, os.cpu_count() or 1))

_RAW: Final = int(Codec.RAW)
_ENCRYPTED: Final = int(RecordFlag.ENCRYPTED)

Decrypt = Callable[[RecordHeader, memoryview], bytes]
# Number and payload bytes of a record to where it goes; None ends the read before it.
Allocate = Callable[[int, int], memoryview | None]


def wall_ms() -> int:
    """Unix time; expiry times are kept in it, so that they mean the same in every process."""
    return time.time_ns() // 1_000_000


@dataclass(slots=True)
class ReadOutcome:
    """num_good: leading records that are right.  suspects: named by the index, but not what the segment holds.

    locked: the read stopped at an encrypted record for which this reader has no keys; the service may have them.
    """

    num_good: int = 0
    bytes_read: int = 0
    locked: bool = False
    suspects: list[bytes] = field(default_factory=list)


@dataclass(slots=True)
class _Wanted:
    """One record to read: where the index says that it is, and where it goes."""

    number: int
    hash: bytes
    entry: IndexEntry
    into: memoryview


class StoreReader:
    """Reads one store directory. Thread-safe; any number of them, in any process of the host."""

    def __init__(
        self,
        directory: Path | str,
        *,
        num_threads: int = READS_IN_FLIGHT,
        decrypt: Decrypt | None = None,
        clock_ms: Callable[[], int] = wall_ms,
    ) -> None:
        """Raises:  Unavailable: there is no store (yet), or its index cannot be opened."""
        self.directory = Path(directory)
        try:
            self.seed = unpack_identity((self.directory / STORE_FILE).read_bytes()).seed
        except (FileNotFoundError, BlockCorrupt) as err:
            raise Unavailable(f"{self.directory} holds no readable store: {err}") from err
        self.index = Index(self.directory / INDEX_DIR)
        self._files = SegmentFiles(self.directory / SEGMENT_DIR)
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="antefix-read")
        self._decrypt = decrypt
        self._local = threading.local()
        self._clock_ms = clock_ms

    def close(self) -> None:
        self._pool.shutdown()
        self._files.close()
        self.index.close()

    def lookup(self, chain: Sequence[bytes], *, fingerprint: bytes) -> LookupResult:
        return self.index.lookup(chain, fingerprint=fingerprint, now_ms=self._clock_ms())

    def read_blocks(self, hashes: Sequence[bytes], into: Sequence[memoryview], *, fingerprint: bytes) -> ReadOutcome:
        """Fill `into[i]` with block `hashes[i]`; see api.Store.get_blocks.

        Raises:  InvalidRequest: a buffer has another size than its payload.
        """
        if len(hashes) != len(into):
            raise InvalidRequest(f"{len(hashes)} hashes but {len(into)} buffers")
        return self._read(RecordKind.BLOCK, hashes, lambda i, _: into[i].cast("B"), fingerprint)

    def read(self, kind: RecordKind, block_hash: bytes, *, fingerprint: bytes) -> tuple[bytearray | None, ReadOutcome]:
        """One payload in a buffer of its own, or None."""
        buffers: list[bytearray] = []

        def allocate(_: int, nbytes: int) -> memoryview:
            buffers.append(bytearray(nbytes))
            return memoryview(buffers[-1])

        outcome = self._read(kind, [block_hash], allocate, fingerprint)
        return (buffers[-1] if outcome.num_good else None), outcome

    def read_leading(
        self, kind: RecordKind, hashes: Sequence[bytes], *, fingerprint: bytes, bytes_max: int
    ) -> tuple[list[memoryview], ReadOutcome]:
        """The leading payloads, up to about `bytes_max`, but at least one if it is stored.

        They lie in a buffer of the calling thread and are gone with its next call: a fresh buffer each time would cost
        more in page faults than reading does.
        """
        views: list[memoryview] = []
        start = 0

        def allocate(_: int, nbytes: int) -> memoryview | None:
            nonlocal start
            if views and start + nbytes > bytes_max:
                return None
            scratch = self._scratch(max(bytes_max, nbytes))
            views.append(scratch[start : start + nbytes])
            start += nbytes
            return views[-1]

        # In this thread alone: its caller reads for one stream of many.
        outcome = self._read(kind, hashes, allocate, fingerprint, alone=True)
        return views[: outcome.num_good], outcome

    def _scratch(self, nbytes: int) -> memoryview:
        """At least `nbytes`, the same for a thread each time."""
        kept: memoryview | None = getattr(self._local, "scratch", None)
        if kept is None or kept.nbytes < nbytes:
            kept = self._local.scratch = np.empty(nbytes, np.uint8).data
        return kept

    def _read(
        self,
        kind: RecordKind,
        hashes: Sequence[bytes],
        buffer: Allocate,
        fingerprint: bytes,
        *,
        alone: bool = False,
    ) -> ReadOutcome:
        self._files.sweep()
        # 1. Where the leading records are, in one snapshot.
        wanted = self._locate(kind, hashes, buffer, fingerprint)
        locked = next((w.number for w in wanted if w.entry.flags & _ENCRYPTED and self._decrypt is None), None)
        wanted = wanted[:locked]
        outcome = ReadOutcome(num_good=len(wanted), locked=locked is not None)
        outcome.bytes_read = sum(w.entry.stored_bytes for w in wanted)
        # 2. Runs of neighbours, several in flight.
        failed = self._read_runs(kind, wanted, fingerprint, alone)
        # 3. What failed has moved, has gone, or is corrupt.
        for want in sorted(failed, key=lambda w: w.number):
            if not self._read_again(kind, want, fingerprint, outcome):
                outcome.num_good = min(outcome.num_good, want.number)
        return outcome

    def _locate(self, kind: RecordKind, hashes: Sequence[bytes], buffer: Allocate, fingerprint: bytes) -> list[_Wanted]:
        now_ms = self._clock_ms()
        wanted: list[_Wanted] = []
        with self.index.txn() as txn:
            fingerprint_id = self.index.fingerprint_id(txn, fingerprint)
            for number, block_hash in enumerate(hashes):
                entry = self.index.entry(txn, kind, block_hash)
                if entry is None or entry.fingerprint_id != fingerprint_id or not entry.live(now_ms):
                    break
                into = buffer(number, entry.payload_bytes)
                if into is None:
                    break
                if into.nbytes != entry.payload_bytes:
                    raise InvalidRequest(f"buffer {number} has {into.nbytes} bytes, the payload {entry.payload_bytes}")
                wanted.append(_Wanted(number, block_hash, entry, into))
        return wanted

    def _read_runs(self, kind: RecordKind, wanted: Sequence[_Wanted], fingerprint: bytes, alone: bool) -> list[_Wanted]:
        runs = list(_runs(wanted))
        if alone or len(runs) == 1:
            return [want for run in runs for want in self._read_run(kind, run, fingerprint)]
        futures = [self._pool.submit(self._read_run, kind, run, fingerprint) for run in runs]
        return [want for future in futures for want in future.result()]

    def _read_run(self, kind: RecordKind, run: Sequence[_Wanted], fingerprint: bytes) -> list[_Wanted]:
        """Read neighbours with one preadv; returns those that are not what they should be."""
        heads = memoryview(bytearray(len(run) * (RECORD_HEADER_BYTES + 8)))
        buffers: list[memoryview] = []
        bodies: list[memoryview] = []
        at, end = 0, run[0].entry.offset
        for want in run:
            # Padding of the record before, then this one's header.
            gap = want.entry.offset - end + RECORD_HEADER_BYTES
            raw = want.entry.codec == _RAW and not want.entry.flags & _ENCRYPTED
            body = want.into if raw else memoryview(bytearray(want.entry.stored_bytes))
            buffers += [heads[at : at + gap], body]
            bodies.append(body)
            at += gap
            end = want.entry.offset + RECORD_HEADER_BYTES + want.entry.stored_bytes
        try:
            with self._files.use(run[0].entry.segment) as fd:
                num_read = preadv_full(fd, buffers, run[0].entry.offset)
        except FileNotFoundError:
            return list(run)
        failed = []
        start = run[0].entry.offset
        for number, want in enumerate(run):
            head = bytes(buffers[2 * number][-RECORD_HEADER_BYTES:])
            whole = want.entry.offset - start + RECORD_HEADER_BYTES + want.entry.stored_bytes <= num_read
            if not (whole and self._accept(kind, want, head, bodies[number], fingerprint)):
                failed.append(want)
        return failed

    def _accept(self, kind: RecordKind, want: _Wanted, head: bytes, body: memoryview, fingerprint: bytes) -> bool:
        """Verify one record, and decode it where it is coded."""
        checksum = expected_checksum(
            head, self.seed, kind=kind, block_hash=want.hash, fingerprint=fingerprint, entry=want.entry
        )
        if checksum is None or payload_checksum(body) != checksum:
            return False
        if body is want.into:
            return True
        try:
            if want.entry.flags & _ENCRYPTED:
                assert self._decrypt is not None, "what cannot be decrypted is not read"
                body = memoryview(self._decrypt(unpack_record_header(head, self.seed), body))
            if want.entry.codec == Codec.PLANES_ZSTD:
                codec.decode(body, want.into)
            else:
                want.into[:] = body
        except (BlockCorrupt, ValueError):
            return False
        return True

    def _read_again(self, kind: RecordKind, want: _Wanted, fingerprint: bytes, outcome: ReadOutcome) -> bool:
        """Look a failed record up again: compaction may have moved it, eviction may have taken it."""
        with self.index.txn() as txn:
            entry = self.index.entry(txn, kind, want.hash)
        if entry is None or not entry.live(self._clock_ms()):
            return False
        if (entry.segment, entry.offset) != (want.entry.segment, want.entry.offset):
            moved = _Wanted(want.number, want.hash, entry, want.into)
            if entry.payload_bytes == want.into.nbytes and not self._read_run(kind, [moved], fingerprint):
                return True
        outcome.suspects.append(want.hash)
        return False


def verify(header: RecordHeader, kind: RecordKind, block_hash: bytes, fingerprint: bytes, entry: IndexEntry) -> None:
    """A record is what the index and the caller say that it is.

    Raises:  BlockCorrupt: it is not; the message says what differs.
    """
    for name, found, expected in (
        ("kind", header.kind, kind),
        ("hash", header.hash, block_hash),
        ("fingerprint", header.fingerprint, fingerprint),
        ("place", (header.segment, header.offset), (entry.segment, entry.offset)),
        ("length", (header.stored_bytes, header.payload_bytes), (entry.stored_bytes, entry.payload_bytes)),
        ("codec", header.codec, entry.codec),
    ):
        if found != expected:
            raise BlockCorrupt(f"record {block_hash.hex()[:16]}: {name} is {found!r}, the index says {expected!r}")


def _runs(wanted: Sequence[_Wanted]) -> Iterator[list[_Wanted]]:
    """Cut at every gap, and into pieces that threads can share."""
    run: list[_Wanted] = []
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

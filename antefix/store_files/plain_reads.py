"""Reads many raw blocks (neither compressed nor encrypted), and checks all their headers at once.

This reader makes every check of `read_runs`, but over arrays of headers. For a block of V4-Flash in the page cache,
Python's work between two system calls costs as much as the checksum, because the other threads wait for Python's lock.
Either all blocks pass the checks, or none counts as read. If a check fails, or if a record is compressed, encrypted or
of version 1,
`read_runs` reads the records one by one and says what is wrong.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import takewhile
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import xxhash

from antefix.record import RecordKind
from antefix.store_files.header_columns import HEADER
from antefix.store_files.index import TABLE_OF_KIND, Index
from antefix.store_files.read_runs import records_per_run
from antefix.store_files.record_format import (
    CHECK_OFFSET,
    INDEX_ENTRY_SHORT,
    RECORD_ALIGN,
    RECORD_HEADER_BYTES,
    RECORD_MAGIC,
    Codec,
    IndexEntry,
    RecordFlag,
    short_fields,
    unpack_entry,
)
from antefix.store_files.record_header import SEALED_PART
from antefix.store_files.seal import Seals
from antefix.store_files.segment_files import OpenFile, SegmentFiles

Array = npt.NDArray[Any]

# A header, preceded by room for the longest padding before it.
_HEAD: Final = np.dtype([("padding", f"V{RECORD_ALIGN}"), ("header", HEADER)])
# Records with one of these flags are left to `read_runs`.
_ODD_FLAGS: Final = int(RecordFlag.ENCRYPTED | RecordFlag.QUARANTINED)
_SEALED: Final = int(RecordFlag.SEALED)
_SHORT: Final = np.dtype([("words", "<u8", 6), ("parent", "V32"), ("checksum", "<u4")])
assert _SHORT.itemsize == INDEX_ENTRY_SHORT.size
# The fields that `short_fields` returns, and those that a reader needs.
_FIELDS: Final = tuple(field.name for field in fields(IndexEntry))[:-1]
_NEEDED: Final = (
    *("segment", "offset", "stored_bytes", "payload_bytes", "fingerprint_id"),
    *("children", "expires_ms", "codec", "flags"),
)


@dataclass(frozen=True, slots=True)
class Places:
    """The places of N blocks.  Shapes:  all [N] integers."""

    segment: Array
    offset: Array
    stored_bytes: Array

    def __len__(self) -> int:
        return len(self.offset)


@dataclass(frozen=True, slots=True)
class Run:
    """Adjacent blocks that one preadv reads.  parts: the buffers, for headers and payloads in alternation."""

    first: int
    end: int
    segment: int
    offset: int
    nbytes: int
    parts: Sequence[memoryview]
    payloads: Sequence[memoryview]


@dataclass(frozen=True, slots=True)
class PlainRead:
    """The blocks to read, which are the leading ones of a request. checksums: those of the payloads read, by the run's
    first block.
    """

    places: Places
    hashes: Sequence[bytes]
    into: Sequence[memoryview]
    fingerprint: bytes
    tenant: bytes
    heads: bytearray
    runs: Sequence[Run]
    checksums: dict[int, list[bytes]]

    def __len__(self) -> int:
        return len(self.places)

    @property
    def stored_bytes(self) -> int:
        return int(self.places.stored_bytes.sum())


class PlainReads:
    """Reads blocks of one store. Thread-safe."""

    def __init__(self, index: Index, files: SegmentFiles, seals: Seals | None) -> None:
        """seals: if given, only sealed records are accepted."""
        self._index = index
        self._files = files
        self._seals = seals

    def locate(
        self,
        hashes: Sequence[bytes],
        into: Sequence[memoryview],
        *,
        fingerprint: bytes,
        tenant: bytes,
        now_ms: int,
        num_threads: int,
    ) -> PlainRead:
        """The leading ones of these blocks that this reader can read, and whose sizes equal those of their buffers.

        All blocks are located in the index before any thread reads: LMDB releases Python's lock for each key, which
        would wake waiting threads each time for nothing.

        tenant: as for `RunReader.read`. num_threads: how many threads will read.
        """
        index = self._index
        with index.txn() as txn:
            fingerprint_id = index.fingerprint_id(txn, fingerprint)
            with txn.cursor(db=index.db[TABLE_OF_KIND[RecordKind.BLOCK]]) as cursor:
                found = cursor.getmulti(hashes)
        # LMDB's answer omits missing keys.
        values = [value for block_hash, (key, value) in zip(hashes, found, strict=False) if key == block_hash]
        places = _places_of(values, hashes, into, -1 if fingerprint_id is None else fingerprint_id, now_ms)
        num = len(places)
        heads = bytearray(num * _HEAD.itemsize)
        runs = list(_runs(places, memoryview(heads), into[:num], num_threads)) if num else []
        return PlainRead(places, hashes[:num], into[:num], fingerprint, tenant, heads, runs, {})

    @contextlib.contextmanager
    def opened(self, wanted: PlainRead) -> Iterator[Mapping[int, OpenFile]]:
        """Open the segments, by number.  Raises:  OSError: a segment is gone."""
        files: dict[int, OpenFile] = {}
        try:
            for segment in {run.segment for run in wanted.runs}:
                files[segment] = self._files.borrow(segment)
            yield files
        finally:
            for file in files.values():
                self._files.give_back(file)

    def read(self, wanted: PlainRead, files: Mapping[int, OpenFile], waiting: deque[Run]) -> bool:
        """Read queued runs of blocks until none is left; other threads do the same. Returns False if a run of blocks
        cannot be read. The read data may be used only after `is_right` has checked all of it.

        Between two preadv calls the reader does nothing else, for two reasons. The copied data pushes everything else
        out of the core's caches. Hashing releases Python's lock, for which other threads wait.
        """
        preadv, digest, checksums, seals = os.preadv, xxhash.xxh3_128_digest, wanted.checksums, self._seals
        while waiting:
            try:
                run = waiting.popleft()
            except IndexError:
                break
            try:
                if preadv(files[run.segment].fd, run.parts, run.offset) < run.nbytes:
                    return False
            except OSError:
                return False
            checksums[run.first] = [digest(payload) for payload in run.payloads]
            if seals is not None and not all(self._is_sealed(seals, wanted, at) for at in range(run.first, run.end)):
                return False
        return True

    @staticmethod
    def _is_sealed(seals: Seals, wanted: PlainRead, number: int) -> bool:
        at = number * _HEAD.itemsize + RECORD_ALIGN
        return seals.fits(
            bytes(wanted.heads[at + SEALED_PART.start : at + SEALED_PART.stop]),
            wanted.into[number],
            kind=RecordKind.BLOCK,
            block_hash=wanted.hashes[number],
            fingerprint=wanted.fingerprint,
            tenant=wanted.tenant,
        )

    @staticmethod
    def is_right(wanted: PlainRead, seed: int) -> bool:
        """Whether all blocks that were read pass every check. False says neither which block failed nor why."""
        heads = np.frombuffer(wanted.heads, _HEAD)["header"]
        checksums = b"".join(b"".join(wanted.checksums[run.first]) for run in wanted.runs)
        return (
            heads["payload_checksum"].tobytes() == checksums
            and heads["hash"].tobytes() == b"".join(wanted.hashes)
            and heads["fingerprint"].tobytes() == wanted.fingerprint * len(wanted)
            and _lie_at(heads, wanted.places)
            and _are_sound(wanted.heads, heads, seed)
        )


def _places_of(
    values: Sequence[bytes], hashes: Sequence[bytes], into: Sequence[memoryview], fingerprint_id: int, now_ms: int
) -> Places:
    """The places of the leading index entries whose records are raw, not expired, and as long as their buffers."""
    of = _columns(hashes, values)
    num = len(of["offset"])
    sizes = np.fromiter((buffer.nbytes for buffer in into[:num]), np.int64, num)
    good = (
        (of["codec"] == int(Codec.RAW))
        & (of["flags"] & _ODD_FLAGS == 0)
        & (of["flags"] & _SEALED != 0)
        & (of["fingerprint_id"] == fingerprint_id)
        & (of["payload_bytes"] == sizes)
        & (of["stored_bytes"] == sizes)
        & ((of["children"] > 0) | (of["expires_ms"] == 0) | (of["expires_ms"] > now_ms))
    )
    end = num if good.all() else int(good.argmin())
    return Places(of["segment"][:end], of["offset"][:end], of["stored_bytes"][:end])


def _columns(hashes: Sequence[bytes], values: Sequence[bytes]) -> dict[str, Array]:
    """Fields of leading entries.  Shapes: all arrays have the shape [N] int64, or fewer.

    Entries in the short form are not checked: a damaged entry leads to a place without the right record header.
    """
    if all(len(value) == _SHORT.itemsize for value in values):
        words = np.frombuffer(b"".join(values), _SHORT)["words"]
        return {
            name: column.astype(np.int64)
            for name, column in zip(_FIELDS, short_fields(*words.T), strict=True)
            if name in _NEEDED
        }
    # Pinned records have the long form. A damaged entry ends the list.
    entries = takewhile(lambda entry: entry is not None, map(unpack_entry, values, hashes))
    rows = [[getattr(entry, name) for name in _NEEDED] for entry in entries]
    columns = np.array(rows, np.int64).reshape(len(rows), len(_NEEDED)).T
    return dict(zip(_NEEDED, columns, strict=True))


def _runs(places: Places, heads: memoryview, into: Sequence[memoryview], num_threads: int) -> Iterator[Run]:
    """Cut the blocks into runs: at every gap, at the size limit of one preadv, and so that threads finish together."""
    ends = places.offset + RECORD_HEADER_BYTES + places.stored_bytes
    padding = -places.stored_bytes % RECORD_ALIGN
    is_gap = (places.offset[1:] != (ends + padding)[:-1]) | (places.segment[1:] != places.segment[:-1])
    # The padding after a record is read together with the next record's header.
    starts = np.arange(RECORD_ALIGN, len(heads), _HEAD.itemsize)
    starts[1:] -= padding[:-1]
    stops = range(_HEAD.itemsize, len(heads) + 1, _HEAD.itemsize)
    parts = list(into) * 2
    parts[::2] = [heads[start:stop] for start, stop in zip(starts.tolist(), stops, strict=True)]
    parts[1::2] = into
    step = records_per_run(len(places), num_threads, int(places.stored_bytes.max()))
    first = 0
    for gap in (*(np.flatnonzero(is_gap) + 1).tolist(), len(places)):
        for begin in range(first, gap, step):
            end = min(begin + step, gap)
            parts[2 * begin] = parts[2 * begin][-RECORD_HEADER_BYTES:]
            offset = int(places.offset[begin])
            nbytes = int(ends[end - 1]) - offset
            of_run = parts[2 * begin : 2 * end]
            yield Run(begin, end, int(places.segment[begin]), offset, nbytes, of_run, into[begin:end])
        first = gap


def _lie_at(heads: Array, places: Places) -> bool:
    """Whether the headers belong to raw blocks at these places."""
    good = (
        (heads["kind"] == int(RecordKind.BLOCK))
        & (heads["codec"] == int(Codec.RAW))
        & (heads["flags"] & _ODD_FLAGS == 0)
        & (heads["segment"] == places.segment)
        & (heads["offset"] == places.offset)
        & (heads["stored_bytes"] == places.stored_bytes)
        & (heads["payload_bytes"] == places.stored_bytes)
    )
    return bool(good.all())


def _are_sound(raw: bytearray, heads: Array, seed: int) -> bool:
    """Whether each header has the right checksum and the magic of the current version."""
    view, digest = memoryview(raw), xxhash.xxh3_64_intdigest
    begins = range(RECORD_ALIGN + CHECK_OFFSET, len(raw), _HEAD.itemsize)
    found = [digest(view[at : at + RECORD_HEADER_BYTES - CHECK_OFFSET], seed) for at in begins]
    return bool((heads["magic"] == RECORD_MAGIC).all()) and heads["header_checksum"].tolist() == found

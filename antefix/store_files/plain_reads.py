"""Reads many raw blocks (neither compressed nor encrypted), and checks all their headers at once.

This reader makes every check of `read_runs`, but over arrays of headers. For a block of V4-Flash in the page cache,
Python's work between two system calls costs as much as the checksum, because the other threads wait for Python's lock.
Either all blocks pass the checks, or none counts as read. If a check fails, or if a record is compressed, encrypted or
of version 1, `read_runs` reads the records one by one and says what is wrong.

Blocks in the page cache are copied and hashed in one pass by machine code, where that is possible (`checked_copy.py`).
All other blocks are read by preadv and then hashed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from antefix.record import RecordKind
from antefix.store_files.checked_copy import SUMS_BYTES, CheckedReads, Rows, reads_if_ready, rows_of
from antefix.store_files.header_columns import HEADER
from antefix.store_files.index import TABLE_OF_KIND, Index
from antefix.store_files.read_ahead import Stretch
from antefix.store_files.read_runs import records_per_run
from antefix.store_files.record_format import (
    CHECK_OFFSET,
    INDEX_ENTRY_SHORT,
    RECORD_ALIGN,
    RECORD_HEADER_BYTES,
    RECORD_MAGIC,
    Codec,
    RecordFlag,
    short_places,
    unpack_entry,
)
from antefix.store_files.record_header import SEALED_PART
from antefix.store_files.seal import Seals
from antefix.store_files.segment_files import OpenFile, SegmentFiles

Array = npt.NDArray[Any]

# A header, preceded by room for the longest padding before it.
_HEAD: Final = np.dtype([("padding", f"V{RECORD_ALIGN}"), ("header", HEADER)])
_SUMS: Final = np.dtype([("payload", "V16"), ("header", "<u8")])
assert _SUMS.itemsize == SUMS_BYTES
# Fewer records than this are read just as fast one by one.
_RECORDS_MIN: Final = 8
# For fewer records, locating some while others are read saves less than starting twice.
_LOCATED_LATER_MIN: Final = 256
# Smaller restores end before machine code is quicker than what prepares it.
_COMPILED_BYTES_MIN: Final = 1 << 20
# How many times shorter than other runs the last ones are.
_LAST_RUNS_SHORTER: Final = 4
# Records with one of these flags are left to `read_runs`.
_ODD_FLAGS: Final = int(RecordFlag.ENCRYPTED | RecordFlag.QUARANTINED)
_SEALED: Final = int(RecordFlag.SEALED)
_SHORT: Final = np.dtype([("words", "<u8", 6), ("parent", "V32"), ("checksum", "<u4")])
assert _SHORT.itemsize == INDEX_ENTRY_SHORT.size
# The fields that a reader needs, as `short_places` returns them.
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

    def part(self, begin: int, end: int) -> Places:
        return Places(self.segment[begin:end], self.offset[begin:end], self.stored_bytes[begin:end])


class Run(NamedTuple):
    """Adjacent blocks that one preadv reads.  parts: the buffers, for headers and payloads in alternation; empty: not
    made yet, because machine code comes first.  stretch: the bytes of the file that this run and its neighbours read.
    """

    first: int
    end: int
    segment: int
    parts: Sequence[memoryview] = ()
    stretch: Stretch | None = None


@dataclass(frozen=True, slots=True)
class PlainRead:
    """The blocks to read, which are the leading ones of a request. sums: room for SUMS_BYTES of each block that was
    read; where the header's checksum is 0, it was not computed.  rows: of `checked_copy`; None: machine code cannot
    read these blocks.  files: the open segments, by number.
    """

    places: Places
    hashes: Sequence[bytes]
    into: Sequence[memoryview]
    fingerprint: bytes
    tenant: bytes
    heads: bytearray
    runs: Sequence[Run]
    sums: bytearray
    compiled: CheckedReads | None
    rows: Rows | None
    files: dict[int, OpenFile]

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
        heads, sums = bytearray(num * _HEAD.itemsize), bytearray(num * SUMS_BYTES)
        compiled, rows = reads_if_ready() if places.stored_bytes.sum() >= _COMPILED_BYTES_MIN else None, None
        if compiled is not None:
            header_at = np.arange(num) * _HEAD.itemsize + RECORD_ALIGN
            rows = rows_of(places.offset, places.stored_bytes, into[:num], heads, header_at, sums)
        runs = list(_runs(places, num_threads)) if num else []
        if rows is None:
            runs = _with_parts(runs, places, memoryview(heads), into)
        files: dict[int, OpenFile] = {}
        return PlainRead(
            places, hashes[:num], into[:num], fingerprint, tenant, heads, runs, sums, compiled, rows, files
        )

    def shares(self, num: int) -> Sequence[tuple[int, int]]:
        """The shares (first, end) in which to locate a request's blocks. Other threads read one share while the next,
        larger one is located: machine code does not hold Python's lock. Without it, other threads would wait for the
        lock, so then all blocks are located first.
        """
        if num < _RECORDS_MIN:
            return ()
        if num < _LOCATED_LATER_MIN or reads_if_ready() is None:
            return ((0, num),)
        # A share costs as much as 300 blocks, however few it has. So there are only two.
        return ((0, num // 32), (num // 32, num))

    def open(self, wanted: PlainRead) -> None:
        """Open the segments.  Raises:  OSError: a segment is gone."""
        try:
            for segment in {run.segment for run in wanted.runs}:
                wanted.files[segment] = self._files.borrow(segment)
        except OSError:
            self.close(wanted)
            raise

    def close(self, wanted: PlainRead) -> None:
        while wanted.files:
            self._files.give_back(wanted.files.popitem()[1])

    def read(self, wanted: PlainRead, run: Run, seed: int) -> bool:
        """Read a run of blocks, while other threads read others. Returns False if the run cannot be read. The read
        data may be used only after `is_right` has checked all of it. seed: the store's, of the headers' checksums.

        Between two reads the reader does nothing else, for two reasons. The copied data pushes everything else out of
        the core's caches. Hashing releases Python's lock, for which other threads wait.
        """
        fd, first, seals = wanted.files[run.segment].fd, run.first, self._seals
        if run.stretch is not None and not run.stretch.begin(fd, int(wanted.places.offset[first])):
            return False
        if wanted.compiled is not None and wanted.rows is not None:
            first += wanted.compiled.read(fd, wanted.rows, first, run.end, seed)
        if first < run.end and not _read_then_hash(wanted, run, first, fd):
            return False
        return seals is None or all(self._is_sealed(seals, wanted, at) for at in range(run.first, run.end))

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
    def is_right(wanted: PlainRead, seed: int, begin: int, end: int) -> bool:
        """Whether these blocks, which were read, pass every check. False says neither which one failed nor why."""
        raw = memoryview(wanted.heads)[begin * _HEAD.itemsize : end * _HEAD.itemsize]
        heads = np.frombuffer(raw, _HEAD)["header"]
        sums = np.frombuffer(wanted.sums, _SUMS)[begin:end]
        return (
            heads["payload_checksum"].tobytes() == sums["payload"].tobytes()
            and heads["hash"].tobytes() == b"".join(wanted.hashes[begin:end])
            and heads["fingerprint"].tobytes() == wanted.fingerprint * (end - begin)
            and _lie_at(heads, wanted.places.part(begin, end))
            and _are_sound(raw, heads, sums["header"], seed)
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
        words = np.frombuffer(b"".join(values), _SHORT)["words"].T
        # No field has more than 42 bits, so all fit into signed integers.
        return {name: column.view(np.int64) for name, column in zip(_NEEDED, short_places(*words[:5]), strict=True)}
    # Pinned records have the long form. A damaged entry ends the list.
    entries = takewhile(lambda entry: entry is not None, map(unpack_entry, values, hashes))
    rows = [[getattr(entry, name) for name in _NEEDED] for entry in entries]
    columns = np.array(rows, np.int64).reshape(len(rows), len(_NEEDED)).T
    return dict(zip(_NEEDED, columns, strict=True))


def _runs(places: Places, num_threads: int) -> Iterator[Run]:
    """Cut the blocks into runs: at every gap, at the size limit of one preadv, and so that threads finish together."""
    padding = -places.stored_bytes % RECORD_ALIGN
    following = places.offset + RECORD_HEADER_BYTES + places.stored_bytes + padding
    is_gap = (places.offset[1:] != following[:-1]) | (places.segment[1:] != places.segment[:-1])
    step = records_per_run(len(places), num_threads, int(places.stored_bytes.max()))
    first = 0
    # The last runs are shorter and shorter, so that no thread ends much before the others.
    shortest = max(1, step // _LAST_RUNS_SHORTER)
    for gap in (*(np.flatnonzero(is_gap) + 1).tolist(), len(places)):
        segment, stretch = int(places.segment[first]), Stretch(int(places.offset[first]), int(following[gap - 1]))
        while first < gap:
            evenly = (len(places) - first) // (2 * num_threads)
            end = min(first + max(shortest, min(step, evenly)), gap)
            yield Run(first, end, segment, stretch=stretch)
            first = end


def _with_parts(runs: Sequence[Run], places: Places, heads: memoryview, into: Sequence[memoryview]) -> list[Run]:
    """The same runs with their buffers. Making all of them at once is faster."""
    parts = _parts(places, heads, into, 0, len(places))
    for run in runs:
        # Padding is read with the header after it, so there is none before the first header.
        parts[2 * run.first] = parts[2 * run.first][-RECORD_HEADER_BYTES:]
    return [run._replace(parts=parts[2 * run.first : 2 * run.end]) for run in runs]


def _parts(places: Places, heads: memoryview, into: Sequence[memoryview], first: int, end: int) -> list[memoryview]:
    """The buffers of adjacent blocks: for the padding before each header and the header, then for the payload."""
    starts = np.arange(first, end) * _HEAD.itemsize + RECORD_ALIGN
    starts[1:] -= -places.stored_bytes[first : end - 1] % RECORD_ALIGN
    stops = range((first + 1) * _HEAD.itemsize, end * _HEAD.itemsize + 1, _HEAD.itemsize)
    parts = list(into[first:end]) * 2
    parts[::2] = [heads[start:stop] for start, stop in zip(starts.tolist(), stops, strict=True)]
    parts[1::2] = into[first:end]
    return parts


def _read_then_hash(wanted: PlainRead, run: Run, first: int, fd: int) -> bool:
    """Read the blocks of a run from number `first` on, and then hash them. Returns whether all could be read."""
    end, places = run.end, wanted.places
    parts = run.parts or _parts(places, memoryview(wanted.heads), wanted.into, first, end)
    offset = int(places.offset[first])
    nbytes = int(places.offset[end - 1]) + RECORD_HEADER_BYTES + int(places.stored_bytes[end - 1]) - offset
    try:
        if os.preadv(fd, parts, offset) < nbytes:
            return False
    except OSError:
        return False
    sums = np.frombuffer(wanted.sums, _SUMS)[first:end]
    sums["payload"] = np.frombuffer(b"".join(map(xxhash.xxh3_128_digest, wanted.into[first:end])), "V16")
    return True


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


def _are_sound(raw: memoryview, heads: Array, sums: Array, seed: int) -> bool:
    """Whether each header has the right checksum and the magic of the current version. sums: 0 if not computed yet."""
    found = sums.copy()
    for number in np.flatnonzero(found == 0).tolist():
        at = number * _HEAD.itemsize + RECORD_ALIGN
        found[number] = xxhash.xxh3_64_intdigest(raw[at + CHECK_OFFSET : at + RECORD_HEADER_BYTES], seed)
    return bool((heads["magic"] == RECORD_MAGIC).all() and (heads["header_checksum"] == found).all())

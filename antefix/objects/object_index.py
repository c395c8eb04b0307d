"""The index of the object tier: which record is in which segment, in sorted arrays in memory. No I/O.

A *run* has the records of some segments, 20 bytes each, sorted by 8 bytes of their hashes. If two records share these
8 bytes, no harm is done: a reader compares the whole hash with the record's header. docs/OBJECT_STORE.md, "The index".
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import xxhash

from antefix.errors import BlockCorrupt
from antefix.objects.segment_object import PlacedRecord, SegmentRef
from antefix.record import Buffer, RecordKind
from antefix.store_files.record_format import HASH_BYTES, RECORD_ALIGN

INDEX_MAGIC: Final = b"AFXINDEX"
INDEX_VERSION: Final = 1
# magic, XXH3-128 of what follows it, version, zero, segments, records
INDEX_HEADER: Final = struct.Struct("<8s16sIIQQ")
# created, expires, bytes, kind, tenant, id
SEGMENT_ROW: Final = struct.Struct("<QQQQ16s16s")
# Bytes per record: key, segment, offset, extent.
ENTRY_BYTES: Final = 8 + 4 + 4 + 4
_SUM_AT: Final = 24

Keys = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a record: segment, offset and length."""

    segment: SegmentRef
    offset: int
    extent_bytes: int

    @property
    def stop(self) -> int:
        return self.offset + self.extent_bytes


class Run:
    """The records of some segments. keys: sorted; the other arrays are in the same order. offsets and extents: in units
    of 8 bytes.
    """

    def __init__(
        self, segments: Sequence[SegmentRef], keys: Keys, numbers: Numbers, offsets: Numbers, extents: Numbers
    ) -> None:
        """numbers: for each record, the number of its segment in `segments`."""
        self.segments: Final = tuple(segments)
        self.keys, self.numbers, self.offsets, self.extents = keys, numbers, offsets, extents
        self._number_of: Final = {segment.id: number for number, segment in enumerate(segments)}
        expires = [segment.expires_ms or np.iinfo(np.int64).max for segment in segments]
        # The expiry of each segment. A deleted segment is marked as expired long ago.
        self._expires: Final = np.array(expires, np.int64)
        self._created: Final = np.array([segment.created_ms for segment in segments], np.int64)
        self._sizes: Final = np.array([segment.nbytes for segment in segments], np.int64)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def nbytes(self) -> int:
        """The size of the arrays in bytes."""
        return len(self) * ENTRY_BYTES + len(self.segments) * SEGMENT_ROW.size

    def __contains__(self, segment_id: bytes) -> bool:
        return segment_id in self._number_of

    def lose(self, segment_id: bytes) -> bool:
        """Forget a segment that no longer exists in the bucket. Returns whether it was known."""
        number = self._number_of.get(segment_id)
        if number is None or self._expires[number] == 0:
            return False
        self._expires[number] = 0
        return True

    def lose_before(self, created_ms: int) -> None:
        """Forget all segments that were created earlier."""
        self._expires[self._created < created_ms] = 0

    def created(self, now_ms: int) -> npt.NDArray[np.int64]:
        """When the segments were created that have not expired, in Unix milliseconds."""
        return self._created[self._expires > now_ms]

    def live_bytes(self, now_ms: int) -> int:
        """The size of all objects that have not expired."""
        return int(self._sizes[self._expires > now_ms].sum())

    def live(self, now_ms: int) -> list[SegmentRef]:
        return [self.segments[number] for number in np.flatnonzero(self._expires > now_ms)]

    def expired(self, now_ms: int) -> list[SegmentRef]:
        """The expired segments that are not known to be deleted already."""
        return [self.segments[number] for number in np.flatnonzero((self._expires > 0) & (self._expires <= now_ms))]

    def only(self, wanted: Callable[[SegmentRef], bool]) -> Run:
        """A run with only the records of the wanted segments."""
        chosen = [number for number, ref in enumerate(self.segments) if wanted(ref)]
        renumbered = np.full(len(self.segments) + 1, -1, np.int64)
        renumbered[chosen] = np.arange(len(chosen))
        numbers = renumbered[self.numbers]
        keep = numbers >= 0
        run = Run(
            [self.segments[number] for number in chosen],
            self.keys[keep],
            numbers[keep].astype(np.uint32),
            self.offsets[keep],
            self.extents[keep],
        )
        run._expires[:] = self._expires[chosen]
        return run

    def search(self, keys: Keys, alive_ms: int) -> npt.NDArray[np.int64]:
        """For each key, the number of its entry in a segment that expires after `alive_ms`, or -1."""
        if not len(self.keys):
            return np.full(len(keys), -1, np.int64)
        at = np.searchsorted(self.keys, keys)
        found = np.full(len(keys), -1, np.int64)
        last = len(self.keys) - 1
        while True:
            here = np.minimum(at, last)
            same = (self.keys[here] == keys) & (at <= last) & (found < 0)
            if not same.any():
                return found
            good = same & (self._expires[self.numbers[here]] > alive_ms)
            found[good] = here[good]
            # The next entry may have the same key in another segment: an older or a duplicate copy.
            at = np.where(same & ~good, at + 1, last + 1)

    def place(self, entry: int) -> Place:
        return Place(
            self.segments[self.numbers[entry]],
            int(self.offsets[entry]) * RECORD_ALIGN,
            int(self.extents[entry]) * RECORD_ALIGN,
        )


def keys_of(kind: RecordKind, hashes: Sequence[bytes]) -> Keys:
    """The index keys of records. A checkpoint has the same hash as its block, so its key is made from other bytes of
    the hash.
    """
    words = np.frombuffer(b"".join(hashes), np.dtype("<u8")).reshape(len(hashes), HASH_BYTES // 8)
    return np.ascontiguousarray(words[:, 0 if kind is RecordKind.BLOCK else 1])


def run_of(segments: Iterable[tuple[SegmentRef, Sequence[PlacedRecord]]]) -> Run:
    """A run of whole segments."""
    refs: list[SegmentRef] = []
    keys, numbers, offsets, extents = [], [], [], []
    for number, (ref, records) in enumerate(segments):
        refs.append(ref)
        keys.append(keys_of(ref.kind, [record.hash for record in records]))
        numbers.append(np.full(len(records), number, np.uint32))
        offsets.append(np.array([record.offset // RECORD_ALIGN for record in records], np.uint32))
        extents.append(np.array([record.extent_bytes // RECORD_ALIGN for record in records], np.uint32))
    if not refs:
        return Run((), *(np.zeros(0, kind) for kind in (np.uint64, np.uint32, np.uint32, np.uint32)))  # type: ignore[arg-type]
    return _sorted(
        refs, np.concatenate(keys), np.concatenate(numbers), np.concatenate(offsets), np.concatenate(extents)
    )


def merge(runs: Sequence[Run], now_ms: int) -> Run:
    """Merge runs, without expired segments. A segment that is in several runs is counted once."""
    refs: list[SegmentRef] = []
    seen: set[bytes] = set()
    parts: list[tuple[Keys, Numbers, Numbers, Numbers]] = []
    for run in runs:
        living = {ref.id for ref in run.live(now_ms)} - seen
        part = run.only(lambda ref, living=living: ref.id in living)  # type: ignore[misc]
        parts.append((part.keys, (part.numbers + len(refs)).astype(np.uint32), part.offsets, part.extents))
        refs += part.segments
        seen |= living
    if not refs:
        return run_of(())
    return _sorted(refs, *(np.concatenate([part[column] for part in parts]) for column in range(4)))


def _sorted(refs: Sequence[SegmentRef], keys: Keys, numbers: Numbers, offsets: Numbers, extents: Numbers) -> Run:
    order = np.argsort(keys, kind="stable")
    return Run(refs, keys[order], numbers[order], offsets[order], extents[order])


def pack_run(run: Run) -> list[Buffer]:
    """A tile's bytes."""
    rows = b"".join(
        SEGMENT_ROW.pack(ref.created_ms, ref.expires_ms, ref.nbytes, ref.kind, ref.tenant, ref.id)
        for ref in run.segments
    )
    columns = [
        np.ascontiguousarray(column, kind).tobytes()
        for column, kind in ((run.keys, "<u8"), (run.numbers, "<u4"), (run.offsets, "<u4"), (run.extents, "<u4"))
    ]
    rest = INDEX_HEADER.pack(INDEX_MAGIC, bytes(16), INDEX_VERSION, 0, len(run.segments), len(run))[_SUM_AT:]
    state = xxhash.xxh3_128(rest)
    for part in (rows, *columns):
        state.update(part)
    return [INDEX_MAGIC + state.digest() + rest, rows, *columns]


def unpack_run(raw: Buffer) -> Run:
    """Raises:  BlockCorrupt: it is not a tile, is damaged, or has an unknown version."""
    data = memoryview(raw).cast("B")
    if data.nbytes < INDEX_HEADER.size or bytes(data[:8]) != INDEX_MAGIC:
        raise BlockCorrupt("a part of an object store's index (a tile) does not begin like one")
    _, checksum, version, _, num_segments, num_records = INDEX_HEADER.unpack(data[: INDEX_HEADER.size])
    if xxhash.xxh3_128_digest(data[_SUM_AT:]) != checksum:
        raise BlockCorrupt("a part of an object store's index (a tile) is damaged")
    if version != INDEX_VERSION:
        raise BlockCorrupt(
            f"a tile of an object store's index has version {version}; this build reads version {INDEX_VERSION}"
        )
    expected = INDEX_HEADER.size + num_segments * SEGMENT_ROW.size + num_records * ENTRY_BYTES
    if data.nbytes != expected:
        raise BlockCorrupt(f"a tile of an object store's index has {data.nbytes} bytes, but must have {expected}")
    at = INDEX_HEADER.size
    refs = []
    for _ in range(num_segments):
        created, expires, nbytes, kind, tenant, id = SEGMENT_ROW.unpack(data[at : at + SEGMENT_ROW.size])
        refs.append(
            SegmentRef(
                created_ms=created, expires_ms=expires, nbytes=nbytes, kind=RecordKind(kind), tenant=tenant, id=id
            )
        )
        at += SEGMENT_ROW.size
    columns = []
    for kind in ("<u8", "<u4", "<u4", "<u4"):
        nbytes = num_records * np.dtype(kind).itemsize
        columns.append(np.frombuffer(data[at : at + nbytes], kind))
        at += nbytes
    if num_records and int(columns[1].max()) >= num_segments:
        raise BlockCorrupt("a tile of an object store's index names a segment that the tile does not list")
    return Run(refs, *columns)

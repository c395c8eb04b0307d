"""Where each record of the object tier is, as this process knows it. The catalog is loaded from tiles of the index, and
updated from footers of segments.

The index may be a moment older than the bucket. A new record is found after the next refresh; a read of a deleted
record is a miss.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final, TypeVar

import numpy as np

from antefix.errors import BlockCorrupt
from antefix.objects.bucket import Bucket, ObjectGone
from antefix.objects.object_index import Place, Run, keys_of, merge, run_of, unpack_run
from antefix.objects.segment_object import (
    SEGMENTS,
    TRAILER,
    PlacedRecord,
    SegmentRef,
    placed_of,
    read_footer,
    read_trailer,
    segments_from,
)
from antefix.objects.tiles import GRACE_MS, INDEX, TILE_MS, Tile, gaps, largest
from antefix.record import Buffer, RecordKind
from antefix.store_files.record_header import RecordHeader
from antefix.store_files.segment_reader import wall_ms

log = logging.getLogger("antefix.objects")

T = TypeVar("T")
U = TypeVar("U")
# The first read of a segment's end. It includes a footer of up to 140 records of a few hundred bytes each.
_TAIL_BYTES: Final = 64 << 10
_FOOTERS_IN_FLIGHT: Final = 32
_TILES_IN_FLIGHT: Final = 2
# The size of one read of a large object.
_RANGE_BYTES: Final = 32 << 20
_RANGES_IN_FLIGHT: Final = 4
# A tile that disappears during a read was replaced by a larger one. Then the list is read again, at most this often.
_NUM_TRIES: Final = 4
# Two runs are merged if the older one is at most this many times as large. So each record is merged only a few times.
_MERGE_RATIO: Final = 4
_EXPIRED_KEPT_MS: Final = 6 * 3_600_000


class Catalog:
    """The catalog is used from one event loop; any thread may call `find` and `lose`.

    num_unreadable: the number of segments without a valid footer. The records of such segments cannot be found until a
    repair.
    """

    def __init__(self, bucket: Bucket, *, clock_ms: Callable[[], int] = wall_ms) -> None:
        self.bucket: Final = bucket
        self.clock_ms: Final = clock_ms
        self.loaded_ms = 0
        self._runs: tuple[Run, ...] = ()
        self._unreadable: set[bytes] = set()
        # Expired segments that were seen in the bucket, by name.
        self._expired: dict[str, SegmentRef] = {}
        self._lost: set[bytes] = set()
        self._updating = asyncio.Lock()

    @property
    def num_unreadable(self) -> int:
        return len(self._unreadable)

    @property
    def num_records(self) -> int:
        return sum(len(run) for run in self._runs)

    @property
    def nbytes(self) -> int:
        """The memory that the index takes, in bytes."""
        return sum(run.nbytes for run in self._runs)

    def segments(self) -> list[SegmentRef]:
        """All segments that have not expired, oldest first."""
        now_ms = self.clock_ms()
        return sorted((ref for run in self._runs for ref in run.live(now_ms)), key=lambda ref: ref.created_ms)

    def tiles(self) -> list[Tile]:
        """The tiles of level 0 that have segments which have not expired, in order of time."""
        now_ms = self.clock_ms()
        numbers = {int(number) for run in self._runs for number in np.unique(run.created(now_ms) // TILE_MS)}
        return [Tile(0, number) for number in sorted(numbers)]

    def live_bytes(self) -> int:
        """The size of all segments that have not expired."""
        now_ms = self.clock_ms()
        return sum(run.live_bytes(now_ms) for run in self._runs)

    def expired(self) -> list[SegmentRef]:
        """Expired segments that may still be in the bucket."""
        now_ms = self.clock_ms()
        known = {ref.name: ref for run in self._runs for ref in run.expired(now_ms)}
        return list((self._expired | known).values())

    def bytes_by_tenant(self) -> Counter[bytes]:
        found: Counter[bytes] = Counter()
        for ref in self.segments():
            found[ref.tenant] += ref.nbytes
        return found

    def __contains__(self, segment_id: bytes) -> bool:
        return any(segment_id in run for run in self._runs)

    def find(self, kind: RecordKind, hashes: Sequence[bytes], *, alive_ms: int | None = None) -> list[Place | None]:
        """The place of each of these records.  alive_ms: only segments that expire after this time; None: after now."""
        found: list[Place | None] = [None] * len(hashes)
        if not hashes:
            return found
        keys, alive_ms = keys_of(kind, hashes), self.clock_ms() if alive_ms is None else alive_ms
        open_ = np.arange(len(hashes))
        # The last run has the newest records, which expire last.
        for run in reversed(self._runs):
            entries = run.search(keys[open_], alive_ms)
            for number in np.flatnonzero(entries >= 0):
                found[open_[number]] = run.place(entries[number])
            open_ = open_[entries < 0]
            if not len(open_):
                break
        return found

    def lose(self, segment_id: bytes) -> None:
        """Forget a segment that no longer exists."""
        self._lost.add(segment_id)
        self._expired = {name: ref for name, ref in self._expired.items() if ref.id != segment_id}
        for run in self._runs:
            run.lose(segment_id)

    async def add(self, segments: Iterable[tuple[SegmentRef, Sequence[PlacedRecord]]]) -> None:
        """Add segments whose records are all known, for example segments that were just written."""
        async with self._updating:
            await self._add(run_of(segments))

    async def refresh(self) -> None:
        """Load the whole index the first time, and only the changes since the last time later.

        Raises:  Unavailable: the bucket does not answer; the index stays as it was.
        """
        async with self._updating:
            now_ms = self.clock_ms()
            # Segments that expired before this have been deleted, so they can be forgotten.
            since_ms = now_ms - _EXPIRED_KEPT_MS
            self._expired = {name: ref for name, ref in self._expired.items() if ref.expires_ms > since_ms}
            if not self.loaded_ms:
                await self._load()
            else:
                await self._add_listed(await self._listed(self.loaded_ms - GRACE_MS, None))
            await self._drop_before_oldest()
            self.loaded_ms = now_ms

    async def take_in(self, tile: Tile) -> None:
        """Load all segments of the period that a tile covers, even segments that appeared late. Raises: Unavailable."""
        async with self._updating:
            await self._add_listed(await self._listed(tile.start_ms, tile.stop_ms))

    async def _load(self) -> None:
        for tries_left in reversed(range(_NUM_TRIES)):
            listed = await self.bucket.list_objects(INDEX)
            sizes = {tile: each.nbytes for each in listed if (tile := Tile.of_name(each.name)) is not None}
            tiles = largest(sizes)
            try:
                runs = await all_of(self._read_tile, [(tile, sizes[tile]) for tile in tiles], _TILES_IN_FLIGHT)
                break
            except ObjectGone:
                if not tries_left:
                    raise
        good = [tile for tile, run in zip(tiles, runs, strict=True) if run is not None]
        self._runs = tuple(run for run in runs if run is not None)
        for start_ms, stop_ms in gaps(good):
            await self._add_listed(await self._listed(start_ms, stop_ms))

    async def _read_tile(self, sized: tuple[Tile, int]) -> Run | None:
        """The records of a tile. None: the tile is damaged, so the footers of its segments must be read instead."""
        tile, nbytes = sized
        raw = await read_object(self.bucket, tile.name, nbytes)
        try:
            return await asyncio.to_thread(unpack_run, raw)
        except BlockCorrupt as err:
            log.warning(
                "%s: %s: %s; the footers of its segments are read instead of the index", self.bucket.url, tile.name, err
            )
            return None

    async def _listed(self, start_ms: int, stop_ms: int | None) -> list[SegmentRef]:
        """The segments created in this period, from a listing of the bucket."""
        stop = None if stop_ms is None else segments_from(stop_ms)
        found: list[SegmentRef] = []
        after = segments_from(start_ms)
        while True:
            page = await self.bucket.list_objects(SEGMENTS, after=after, num_max=1000)
            within = [each for each in page if stop is None or each.name < stop]
            found += [ref for each in within if (ref := SegmentRef.of_name(each.name, each.nbytes)) is not None]
            if len(page) < 1000 or len(within) < len(page):
                return found
            after = page[-1].name

    async def _add_listed(self, refs: Sequence[SegmentRef]) -> None:
        now_ms = self.clock_ms()
        self._expired |= {ref.name: ref for ref in refs if ref.expired(now_ms)}
        new = [ref for ref in refs if not (ref.id in self or ref.id in self._unreadable or ref.expired(now_ms))]
        headers = await all_of(self._footer, new, _FOOTERS_IN_FLIGHT)
        good = [(ref, [placed_of(each) for each in found]) for ref, found in zip(new, headers, strict=True) if found]
        if good:
            await self._add(run_of(good))

    async def _footer(self, ref: SegmentRef) -> list[RecordHeader]:
        """The record headers of a segment; empty if the segment is gone or unreadable."""
        try:
            return await read_headers(self.bucket, ref)
        except ObjectGone:
            return []
        except BlockCorrupt as err:
            log.warning(
                "%s: %s cannot be read: %s (repair it with `antefix fsck --repair`)", self.bucket.url, ref.name, err
            )
            self._unreadable.add(ref.id)
            return []

    async def _drop_before_oldest(self) -> None:
        """Forget segments older than the oldest one in the bucket. Those segments have been deleted, because the oldest
        segments are deleted first.
        """
        page = await self.bucket.list_objects(SEGMENTS, num_max=1)
        oldest = SegmentRef.of_name(page[0].name, 0) if page else None
        if page and oldest is None:
            return
        # Of all segments in arrays: a tier may have a million segments, and this runs in a worker's event loop.
        before_ms = oldest.created_ms if oldest is not None else np.iinfo(np.int64).max
        for run in self._runs:
            run.lose_before(before_ms)

    async def _add(self, run: Run) -> None:
        runs = [*self._runs, run]
        while len(runs) > 1 and len(runs[-2]) <= _MERGE_RATIO * len(runs[-1]):
            pair = runs[-2:]
            # Merging drops expired segments, but they must still be remembered for deletion.
            now_ms = self.clock_ms()
            self._expired |= {ref.name: ref for each in pair for ref in each.expired(now_ms)}
            runs[-2:] = [await asyncio.to_thread(merge, pair, self.clock_ms())]
        self._runs = tuple(runs)
        for segment_id in self._lost:
            for each in self._runs:
                each.lose(segment_id)
        self._lost.clear()

    def take_out(self, wanted: Callable[[SegmentRef], bool]) -> Run:
        """A run of records from the unexpired segments for which `wanted` is true."""
        return merge([run.only(wanted) for run in self._runs], self.clock_ms())


async def read_object(bucket: Bucket, name: str, nbytes: int) -> Buffer:
    """All bytes of an object, read in ranges.  Raises:  ObjectGone."""
    parts = await all_of(
        lambda first: bucket.read(name, first, min(first + _RANGE_BYTES, nbytes)),
        range(0, nbytes, _RANGE_BYTES),
        _RANGES_IN_FLIGHT,
    )
    return parts[0] if len(parts) == 1 else b"".join(parts)


async def read_headers(bucket: Bucket, ref: SegmentRef) -> list[RecordHeader]:
    """The headers of all records of a segment, from its footer.

    Raises:  ObjectGone.  BlockCorrupt: the footer is missing or damaged.
    """
    start = max(0, ref.nbytes - _TAIL_BYTES)
    tail = memoryview(await bucket.read(ref.name, start, ref.nbytes)).cast("B")
    if tail.nbytes < TRAILER.size:
        raise BlockCorrupt("the segment has no trailer")
    footer_offset, num_records = read_trailer(tail[-TRAILER.size :], ref.nbytes)
    stop = ref.nbytes - TRAILER.size
    if footer_offset >= start:
        return read_footer(tail[footer_offset - start : stop - start], ref, footer_offset, num_records)
    return read_footer(await bucket.read(ref.name, footer_offset, stop), ref, footer_offset, num_records)


async def all_headers(
    catalog: Catalog, wanted: Callable[[SegmentRef], bool] = lambda _: True
) -> list[tuple[SegmentRef, list[RecordHeader]]]:
    """The headers of all unexpired segments for which `wanted` is true, oldest first."""

    async def read(ref: SegmentRef) -> list[RecordHeader]:
        try:
            return await read_headers(catalog.bucket, ref)
        except (ObjectGone, BlockCorrupt):
            return []

    refs = [ref for ref in catalog.segments() if wanted(ref)]
    return list(zip(refs, await all_of(read, refs, _FOOTERS_IN_FLIGHT), strict=True))


async def all_of(call: Callable[[U], Awaitable[T]], items: Sequence[U], num_max: int) -> list[T]:
    """The results of all calls, in order, with at most `num_max` calls at a time. The first error cancels the calls
    that are still running.
    """
    turn = asyncio.Semaphore(num_max)

    async def one(item: U) -> T:
        async with turn:
            return await call(item)

    tasks = [asyncio.ensure_future(one(item)) for item in items]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

"""Checks an object store while it is in use, and repairs it on request.

Segments are the truth. A repair copies the sound records of a damaged segment to a new one, and makes the index again
from the segments' footers. A segment that somebody deletes during the check is not reported as a fault.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from antefix.errors import BlockCorrupt
from antefix.objects.bucket import Bucket, ObjectGone, StoredObject, open_bucket
from antefix.objects.catalog import Catalog, read_object
from antefix.objects.janitor import Janitor, ObjectLimits
from antefix.objects.object_index import Run, unpack_run
from antefix.objects.rewrite import rewrite
from antefix.objects.segment_object import SEGMENTS, TRAILER, SegmentRef, read_footer, read_trailer, scan_segment
from antefix.objects.tiles import INDEX, Tile, largest
from antefix.record import Buffer, RecordKind
from antefix_kvstore.check_store import FsckReport

Progress = Callable[[int, int], None]


@dataclass(slots=True)
class _Found:
    """The damage that a repair has to deal with."""

    damaged: list[SegmentRef] = field(default_factory=list)
    bad_tiles: list[str] = field(default_factory=list)


async def fsck_objects(url: str, *, repair: bool = False, progress: Progress | None = None) -> FsckReport:
    """Read every segment and every tile of the index; with `repair`, mend or delete what is damaged.

    progress: called with the number of segments done and the number in all.
    Raises:  ConfigError: the URL names no object store.  Unavailable: the object store does not answer.
    """
    bucket = open_bucket(url)
    try:
        report = FsckReport()
        found = await _check(bucket, report, progress)
        if repair and not report.sound:
            await _repair(bucket, found)
            after = FsckReport()
            await _check(bucket, after, None)
            report.repaired, report.num_records_after = after.sound, after.num_records
        return report
    finally:
        await bucket.close()


async def _check(bucket: Bucket, report: FsckReport, progress: Progress | None) -> _Found:
    found = _Found()
    # Tiles first: a segment that is uploaded during this check is in none of them.
    tiles = await _check_tiles(bucket, report, found)
    listed = await bucket.list_objects(SEGMENTS)
    for done, each in enumerate(listed):
        ref = SegmentRef.of_name(each.name, each.nbytes)
        if ref is None:
            report.note("name", f"{each.name} is not a segment's name; the object is left alone")
            continue
        await _check_segment(bucket, ref, each, report, found)
        missing = next((tile for tile in tiles if tile.covers(ref.created_ms) and ref.id not in tiles[tile]), None)
        if missing is not None and ref not in found.damaged:
            report.note("index", f"{missing.name} lacks {ref.name}")
            found.bad_tiles.append(missing.name)
        if progress is not None:
            progress(done + 1, len(listed))
    return found


async def _check_tiles(bucket: Bucket, report: FsckReport, found: _Found) -> dict[Tile, Run]:
    listed = {tile: each for each in await bucket.list_objects(INDEX) if (tile := Tile.of_name(each.name))}
    runs: dict[Tile, Run] = {}
    for tile in largest(listed):
        try:
            raw = await read_object(bucket, tile.name, listed[tile].nbytes)
            runs[tile] = await asyncio.to_thread(unpack_run, raw)
        except ObjectGone:
            continue
        except BlockCorrupt as err:
            report.note("index", f"{tile.name}: {err}")
            found.bad_tiles.append(tile.name)
    return runs


async def _check_segment(
    bucket: Bucket, ref: SegmentRef, each: StoredObject, report: FsckReport, found: _Found
) -> None:
    try:
        data = await read_object(bucket, each.name, each.nbytes)
    except ObjectGone:
        return
    problem, num_records = await asyncio.to_thread(_problem_of, data, ref)
    report.num_segments += 1
    report.num_bytes += each.nbytes
    report.num_records += num_records
    if problem:
        report.note(problem, ref.name)
        found.damaged.append(ref)


def _problem_of(data: Buffer, ref: SegmentRef) -> tuple[str, int]:
    """What is wrong with a segment (empty if nothing), and how many of its records are valid."""
    view = memoryview(data).cast("B")
    try:
        records = [header for header, _ in scan_segment(view, ref) if header.kind is not RecordKind.STATEMENT]
    except BlockCorrupt:
        return "segment header", 0
    try:
        footer_offset, num_records = read_trailer(view[-TRAILER.size :], ref.nbytes)
        headers = read_footer(view[footer_offset : ref.nbytes - TRAILER.size], ref, footer_offset, num_records)
    except BlockCorrupt:
        return "footer", len(records)
    sound = {(header.offset, header.hash) for header in records}
    if any((header.offset, header.hash) not in sound for header in headers):
        return "record", len(records)
    if any(header.kind is not ref.kind or header.tenant[:16] != ref.tenant for header in headers):
        return "another tenant's or kind's record", len(records)
    return "", len(records)


async def _repair(bucket: Bucket, found: _Found) -> None:
    catalog = Catalog(bucket)
    for ref in found.damaged:
        try:
            await rewrite(catalog, ref, lambda _: True)
        except ObjectGone:
            continue
    await bucket.delete(_unique(found.bad_tiles))
    await catalog.refresh()
    await Janitor(catalog, ObjectLimits()).write_tiles()
    await bucket.clean()


def _unique(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(names))

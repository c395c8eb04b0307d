"""The janitor keeps the object tier within its limits, and makes its index. Segments work even without the index."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from antefix.errors import BlockCorrupt
from antefix.objects.bucket import open_bucket
from antefix.objects.catalog import Catalog
from antefix.objects.janitor import Janitor, ObjectLimits
from antefix.objects.object_index import keys_of, pack_run, run_of, unpack_run
from antefix.objects.object_writer import ObjectSettings, ObjectWriter
from antefix.objects.segment_object import PlacedRecord, SegmentRef
from antefix.objects.tiles import FANOUT, GRACE_MS, TILE_MS, Tile, gaps, largest
from antefix.record import Record, RecordKind
from tests.kvstore.small_store import BLOCK, Clock, Prompt, owner
from tests.objects.small_tier import num_restored, tier_of, url_of

pytestmark = pytest.mark.asyncio
PROMPT = Prompt(list(range(BLOCK * 40)))


class Host:
    """One of several hosts that share a bucket and a clock."""

    def __init__(self, directory: Path, clock: Clock, *, spread_share: float = 0.0, **limits: object) -> None:
        self.catalog = Catalog(open_bucket(url_of(directory)), clock_ms=clock)
        self.janitor = Janitor(self.catalog, ObjectLimits(**limits), spread_share=spread_share)  # type: ignore[arg-type]
        ttl_s = dict.fromkeys(RecordKind, 86_400.0)
        self.writer = ObjectWriter(self.catalog, ObjectSettings(segment_bytes=1500, ttl_s=ttl_s))

    async def write(self, records: Sequence[Record]) -> None:
        await self.catalog.refresh()
        await self.writer.write(records)


def names(directory: Path, folder: str) -> list[str]:
    return sorted(path.name for path in (directory / folder).glob("*"))


async def test_expired_segments_are_deleted_by_whoever_comes_first(tmp_path: Path) -> None:
    clock = Clock()
    first, second = Host(tmp_path, clock), Host(tmp_path, clock)
    await first.write(PROMPT.blocks(10))
    await second.catalog.refresh()
    clock.advance(86_401)
    await second.janitor.tidy()
    assert second.janitor.counters.num_expired == 2
    assert names(tmp_path, "segments") == []
    await first.janitor.tidy()
    assert first.catalog.segments() == []


async def test_a_host_that_comes_later_deletes_what_expired_before(tmp_path: Path) -> None:
    clock = Clock()
    await Host(tmp_path, clock).write(PROMPT.blocks(10))
    clock.advance(10 * 86_400)
    late = Host(tmp_path, clock)
    await late.janitor.tidy()
    assert (late.janitor.counters.num_expired, names(tmp_path, "segments")) == (2, [])


async def test_what_expired_while_the_index_was_merged_is_deleted_all_the_same(tmp_path: Path) -> None:
    clock = Clock()
    host = Host(tmp_path, clock)
    await host.write(PROMPT.blocks(10))
    clock.advance(86_401)
    await host.writer.write([PROMPT.block(number) for number in range(10, 40)])
    await host.janitor.tidy()
    assert host.janitor.counters.num_expired == 2
    assert len(names(tmp_path, "segments")) == 6


async def test_over_its_budget_the_tier_loses_its_oldest(tmp_path: Path) -> None:
    clock = Clock()
    host = Host(tmp_path, clock)
    for number in range(0, 40, 5):
        await host.write([PROMPT.block(each) for each in range(number, number + 5)])
        clock.advance(1)
    sizes = [ref.nbytes for ref in host.catalog.segments()]
    keeper = Host(tmp_path, clock, budget_bytes=sum(sizes[3:]) + 100)
    await keeper.janitor.tidy()
    assert keeper.janitor.counters.num_over_budget == 4
    assert len(names(tmp_path, "segments")) == 4
    # The other host learns of the deletions from the bucket, before any read fails.
    await host.catalog.refresh()
    assert [ref.nbytes for ref in host.catalog.segments()] == sizes[4:]


async def test_a_tenant_over_its_quota_loses_its_own_oldest_and_nobody_elses(tmp_path: Path) -> None:
    clock = Clock()
    mine, others = owner("me"), owner("you")
    host = Host(tmp_path, clock, quotas={mine[:16]: 30_000})
    for number in range(0, 40, 5):
        await host.write([PROMPT.block(each, tenant=others) for each in range(number, number + 5)])
        await host.write([PROMPT.block(each, tenant=mine) for each in range(number, number + 5)])
        clock.advance(1)
    before = host.catalog.bytes_by_tenant()
    await host.janitor.tidy()
    after = host.catalog.bytes_by_tenant()
    assert after[others[:16]] == before[others[:16]]
    assert 0 < after[mine[:16]] <= 30_000 < before[mine[:16]]


async def test_tiles_are_written_merged_and_enough_to_find_everything(tmp_path: Path) -> None:
    clock = Clock()
    host = Host(tmp_path, clock)
    for number in range(40):
        await host.write([PROMPT.block(number)])
        clock.advance(TILE_MS / 1000)
        await host.janitor.tidy()
    clock.advance(GRACE_MS / 1000 + 1)
    await host.janitor.tidy()
    await host.janitor.tidy()
    tiles = [Tile.of_name(f"index/{name}") for name in names(tmp_path, "index")]
    assert {tile.level for tile in tiles if tile is not None} >= {0, 1}
    assert len(tiles) < 40 / 2
    fresh = tier_of(url_of(tmp_path), clock_ms=clock)
    assert await num_restored(fresh, PROMPT) == 40
    await fresh.close()
    # The tier works even without the index.
    for path in (tmp_path / "index").iterdir():
        path.unlink()
    without = tier_of(url_of(tmp_path), clock_ms=clock)
    assert await num_restored(without, PROMPT) == 40
    await without.close()


async def test_many_hosts_write_a_large_tile_once_and_each_small_tile_at_once(tmp_path: Path, monkeypatch) -> None:
    clock = Clock()
    draws = iter([0.9, 0.5, 0.1, 0.7, 0.3])
    monkeypatch.setattr("antefix.objects.janitor.random.random", lambda: next(draws))
    hosts = [Host(tmp_path, clock, spread_share=0.25) for _ in range(5)]
    await hosts[0].write(PROMPT.blocks(10))
    number = clock() // TILE_MS
    level_1 = Tile(0, number).above
    clock.advance((level_1.stop_ms + GRACE_MS - clock()) / 1000)
    seconds = 0
    while level_1.name.removeprefix("index/") not in names(tmp_path, "index"):
        for host in hosts:
            await host.janitor.tidy()
        if not seconds:
            assert names(tmp_path, "index") == [Tile(0, number).name.removeprefix("index/")]
        clock.advance(60)
        seconds += 60
    # The host with the shortest delay wrote it, after a tenth of a quarter of 80 minutes. The others found it then.
    assert [host.janitor.counters.num_tiles for host in hosts] == [1, 0, 1, 0, 0]
    assert seconds == 180
    assert await num_restored(tier_of(url_of(tmp_path), clock_ms=clock), PROMPT) == 10


async def test_a_damaged_tile_is_passed_over(tmp_path: Path) -> None:
    clock = Clock()
    host = Host(tmp_path, clock)
    await host.write(PROMPT.blocks())
    clock.advance((TILE_MS + GRACE_MS) / 1000 + 1)
    await host.janitor.tidy()
    (path,) = (tmp_path / "index").iterdir()
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    fresh = tier_of(url_of(tmp_path), clock_ms=clock)
    assert await num_restored(fresh, PROMPT) == 40
    await fresh.close()


async def test_a_segment_that_came_late_by_its_hosts_clock_is_in_its_tile(tmp_path: Path) -> None:
    clock, slow = Clock(), Clock()
    host, late = Host(tmp_path, clock), Host(tmp_path, slow)
    await host.write(PROMPT.blocks(20))
    clock.advance((TILE_MS + GRACE_MS) / 1000 - 1)
    # A new segment that no host has seen yet, with a name from a clock that is behind.
    await late.writer.write([PROMPT.block(number) for number in range(20, 40)])
    clock.advance(2)
    await host.janitor.tidy()
    fresh = tier_of(url_of(tmp_path), clock_ms=clock)
    assert await num_restored(fresh, PROMPT) == 40
    await fresh.close()


async def test_tiles_without_living_records_are_deleted(tmp_path: Path) -> None:
    clock = Clock()
    host = Host(tmp_path, clock)
    await host.write(PROMPT.blocks(5))
    clock.advance((TILE_MS + GRACE_MS) / 1000 + 1)
    await host.janitor.tidy()
    assert len(names(tmp_path, "index")) == 1
    clock.advance(86_401)
    await host.janitor.tidy()
    assert names(tmp_path, "index") == []


async def test_the_largest_tiles_and_what_they_leave() -> None:
    big, inside, after = Tile(1, 0), Tile(0, 3), Tile(0, FANOUT + 1)
    assert largest([inside, after, big]) == [big, after]
    assert gaps([big, after]) == [(big.stop_ms, after.start_ms), (after.stop_ms, None)]
    assert gaps([]) == [(0, None)]
    assert Tile.of_name(big.name) == big and inside.above == big


def run_with(num_records: int):
    ref = SegmentRef(created_ms=5, expires_ms=0, kind=RecordKind.BLOCK, tenant=b"t" * 16, id=b"i" * 16, nbytes=99)
    records = [PlacedRecord(hash=PROMPT.hashes[n], offset=4096 + 8 * n, extent_bytes=8) for n in range(num_records)]
    return run_of([(ref, records)])


@pytest.mark.parametrize("num_records", [0, 1, 40])
async def test_a_tile_is_read_as_it_was_written_and_no_flipped_byte_passes(num_records: int) -> None:
    run = run_with(num_records)
    raw = b"".join(bytes(part) for part in pack_run(run))
    again = unpack_run(raw)
    assert again.segments == run.segments
    assert (again.keys == run.keys).all() and (again.offsets == run.offsets).all()
    for at in range(len(raw)):
        harmed = bytearray(raw)
        harmed[at] ^= 1
        with pytest.raises(BlockCorrupt):
            unpack_run(bytes(harmed))
    with pytest.raises(BlockCorrupt):
        unpack_run(raw[:-1])


async def test_two_records_with_one_key_are_both_found() -> None:
    """The record has copies in two segments, of which one has expired."""
    old = SegmentRef(created_ms=5, expires_ms=9, kind=RecordKind.BLOCK, tenant=b"t" * 16, id=b"o" * 16, nbytes=99)
    new = SegmentRef(created_ms=6, expires_ms=0, kind=RecordKind.BLOCK, tenant=b"t" * 16, id=b"n" * 16, nbytes=99)
    record = PlacedRecord(hash=PROMPT.hashes[0], offset=4096, extent_bytes=8)
    for order in ([old, new], [new, old]):
        run = run_of([(ref, [record]) for ref in order])
        entry = int(run.search(keys_of(RecordKind.BLOCK, PROMPT.hashes[:1]), 100)[0])
        assert run.place(entry).segment == new

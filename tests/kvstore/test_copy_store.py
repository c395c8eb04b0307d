"""Copies of stores are complete, verified, and resumed after a break. Records that a target holds are not sent."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from antefix.errors import ConfigError, Unavailable
from antefix.record import Held, PutResult, Record, RecordKind
from antefix_kvstore.check_store import fsck
from antefix_kvstore.copy_store import CopyLimits, copy_store
from antefix_kvstore.copy_target import DirectoryTarget, open_source, open_target
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.storage_engine import StorageEngine
from antefix_kvstore.store_contents import StoreContents
from tests.kvstore.small_store import BLOCK, FINGERPRINT, Prompt, owner
from tests.kvstore.test_compression import PLAN

pytestmark = pytest.mark.asyncio
ALL = CopyLimits()
# Three conversations that diverge. The second leaves the first after 5 blocks.
LONG = Prompt(list(range(BLOCK * 12)))
FORK = Prompt([*range(BLOCK * 5), *range(900, 900 + BLOCK * 4)])
OTHER = Prompt(list(range(500, 500 + BLOCK * 6)))


def engine_of(directory: Path, **settings: object) -> StorageEngine:
    return StorageEngine(KvStoreConfig(dir=str(directory), budget_bytes=8 << 20, scrub_bytes_per_s=0, **settings))  # type: ignore[arg-type]


def fill(directory: Path, **settings: object) -> None:
    engine = engine_of(directory, **settings)
    engine.register(FINGERPRINT, BLOCK, {})
    engine.put([*LONG.blocks(), LONG.checkpoint(11, ttl_s=50.0), *FORK.blocks(), *OTHER.blocks(), OTHER.checkpoint(2)])
    # Records that depend on another store's blocks.
    engine.put([Prompt(list(range(700, 700 + BLOCK * 9))).block(7, parent_elsewhere=True)])
    engine.pin([(RecordKind.BLOCK, OTHER.hashes[-1])], 600.0)
    engine.close()


NUM_RECORDS = 12 + 1 + 4 + 6 + 1 + 1


async def copy(source: Path, *targets: DirectoryTarget, limits: CopyLimits = ALL):
    with StoreContents(source) as contents:
        report = await copy_store(contents, targets, limits)
    for target in targets:
        await target.close()
    return report


def target_of(directory: Path) -> DirectoryTarget:
    target = open_target(str(directory), budget_bytes=8 << 20, makes=True)
    assert isinstance(target, DirectoryTarget)
    return target


async def test_a_copy_has_every_record_with_its_pin_and_its_time(tmp_path: Path) -> None:
    fill(tmp_path / "a")
    report = await copy(tmp_path / "a", target_of(tmp_path / "b"))
    assert (report.num_copied, report.num_there, report.complete) == (NUM_RECORDS, 0, True)
    engine = engine_of(tmp_path / "b")
    for prompt in (LONG, FORK, OTHER):
        assert prompt.check(engine) == len(prompt.hashes)
    with engine.index.txn() as txn:
        pinned = engine.index.entry(txn, RecordKind.BLOCK, OTHER.hashes[-1])
        kept = engine.index.entry(txn, RecordKind.CHECKPOINT, LONG.hashes[11])
    assert pinned is not None and pinned.pinned_ms > engine.clock_ms()
    assert kept is not None and kept.ttl_s == 50
    engine.close()
    assert fsck(tmp_path / "b").sound


async def test_a_copy_is_made_while_the_store_is_open(tmp_path: Path) -> None:
    fill(tmp_path / "a")
    engine = engine_of(tmp_path / "a")
    report = await copy(tmp_path / "a", target_of(tmp_path / "b"))
    assert report.num_copied == NUM_RECORDS
    engine.close()


class Breaking:
    """A target that becomes unavailable after some puts."""

    def __init__(self, target: DirectoryTarget, num_puts: int) -> None:
        self._target = target
        self._num_puts = num_puts

    def __getattr__(self, name: str):
        return getattr(self._target, name)

    async def put(self, records: Sequence[Record]) -> PutResult:
        if self._num_puts == 0:
            raise Unavailable("the target went away")
        self._num_puts -= 1
        return await self._target.put(records)


@pytest.mark.parametrize("num_puts", [0, 1, 3])
async def test_a_copy_that_broke_off_goes_on(tmp_path: Path, num_puts: int) -> None:
    fill(tmp_path / "a")
    target = target_of(tmp_path / "b")
    with StoreContents(tmp_path / "a") as contents, pytest.raises(Unavailable):
        await copy_store(contents, [Breaking(target, num_puts)], ALL)  # type: ignore[list-item]
    before = engine_count(target)
    report = await copy(tmp_path / "a", target)
    assert report.num_copied == NUM_RECORDS - before
    assert report.num_there == before
    again = await copy(tmp_path / "a", target_of(tmp_path / "b"))
    assert (again.num_copied, again.num_there) == (0, NUM_RECORDS)


def engine_count(target: DirectoryTarget) -> int:
    totals = target._store.engine.totals()
    return sum(row[0] for key, row in totals.items() if key[:1] == b"k")


async def test_what_any_target_has_is_not_sent_and_the_rest_goes_where_there_is_room(tmp_path: Path) -> None:
    fill(tmp_path / "a")
    engine = engine_of(tmp_path / "b")
    engine.register(FINGERPRINT, BLOCK, {})
    engine.put(LONG.blocks(9))
    engine.close()
    big = open_target(str(tmp_path / "c"), budget_bytes=64 << 20, makes=True)
    report = await copy(tmp_path / "a", target_of(tmp_path / "b"), big)  # type: ignore[arg-type]
    assert (report.num_there, report.num_copied) == (9, NUM_RECORDS - 9)
    engine = engine_of(tmp_path / "c")
    assert engine.held(LONG.hashes, fingerprint=FINGERPRINT) == Held(spans=((9, 12),), checkpoints=(12,))
    engine.close()


async def test_a_drain_moves_what_is_worth_most_within_its_bytes(tmp_path: Path) -> None:
    fill(tmp_path / "a")
    limits = CopyLimits(bytes_max=7 * (OTHER.payload_bytes + 300))
    report = await copy(tmp_path / "a", target_of(tmp_path / "b"), limits=limits)
    assert report.num_left
    engine = engine_of(tmp_path / "b")
    # The record is pinned.
    assert OTHER.check(engine) == 6
    engine.close()


async def test_damage_at_the_source_is_not_copied_and_is_told(tmp_path: Path) -> None:
    fill(tmp_path / "a")
    (segment,) = (tmp_path / "a" / "segments").glob("*.seg")
    raw = bytearray(segment.read_bytes())
    at = raw.index(LONG.payload(3)) + 5
    raw[at] ^= 1
    segment.write_bytes(raw)
    report = await copy(tmp_path / "a", target_of(tmp_path / "b"))
    assert report.num_missing == 1
    assert not report.complete
    engine = engine_of(tmp_path / "b")
    assert LONG.check(engine) == 3
    engine.close()


async def test_compressed_and_encrypted_stores_are_copied_as_what_they_hold(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("ab" * 32)
    fill(tmp_path / "a", encrypt_key_file=str(key))
    with open_source(str(tmp_path / "a"), key_file=str(key)) as contents:
        target = open_target(str(tmp_path / "b"), budget_bytes=8 << 20, makes=True)
        report = await copy_store(contents, [target], ALL)
        await target.close()
    assert report.num_copied == NUM_RECORDS
    engine = engine_of(tmp_path / "b")
    assert LONG.check(engine) == 12
    engine.close()


async def test_a_rate_holds_a_copy_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "a")
    slept = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr("antefix_kvstore.copy_store.asyncio.sleep", sleep)
    report = await copy(tmp_path / "a", target_of(tmp_path / "b"), limits=CopyLimits(bytes_per_s=1000))
    assert max(slept) > 0.8 * report.bytes_copied / 1000


async def test_layouts_go_with_the_records(tmp_path: Path) -> None:
    engine = engine_of(tmp_path / "a", compression="zstd")
    engine.register(FINGERPRINT, BLOCK, {RecordKind.BLOCK: PLAN})
    engine.close()
    await copy(tmp_path / "a", target_of(tmp_path / "b"))
    with StoreContents(tmp_path / "b") as contents:
        (layout,) = contents.layouts()
    assert (layout.fingerprint, layout.block_tokens, layout.plans) == (FINGERPRINT, BLOCK, {RecordKind.BLOCK: PLAN})


async def test_a_purge_takes_all_of_a_tenant_and_nothing_else(tmp_path: Path) -> None:
    engine = engine_of(tmp_path / "a")
    mine, others = owner("me"), owner("you")
    user = mine[:16] + b"user-of-"
    engine.put([LONG.block(i, tenant=mine) for i in range(12)])
    engine.put([OTHER.block(i, tenant=user) for i in range(6)])
    third = Prompt(list(range(300, 300 + BLOCK * 3)))
    engine.put([third.block(i, tenant=others) for i in range(3)])
    engine.pin([(RecordKind.BLOCK, LONG.hashes[-1])], 600.0)
    engine.close()
    target = target_of(tmp_path / "a")
    assert await target.purge(user) == 6
    assert await target.purge(mine) == 12
    assert await target.purge(mine) == 0
    await target.close()
    engine = engine_of(tmp_path / "a")
    assert third.check(engine) == 3
    engine.close()
    assert fsck(tmp_path / "a").sound


@pytest.mark.parametrize("text", ["ftp://bucket/prefix", "/no/such/directory", "backup"])
async def test_a_source_that_is_neither_directory_nor_address_is_refused_with_what_to_do(text: str) -> None:
    with pytest.raises(ConfigError, match="directory"):
        open_source(text)


async def test_a_store_that_is_written_to_meanwhile_is_drained_by_going_round(tmp_path: Path) -> None:
    """Records that arrive during a round are moved by the next round. The last round finds no new records."""
    fill(tmp_path / "a")
    engine = engine_of(tmp_path / "a")
    coming = [Prompt(list(range(start, start + BLOCK * 3))) for start in range(2000, 2400, 100)]
    target = target_of(tmp_path / "b")
    put = target.put

    async def put_and_write(records: Sequence[Record]) -> PutResult:
        if coming:
            engine.put(coming.pop().blocks())
        return await put(records)

    target.put = put_and_write  # type: ignore[method-assign]
    moved = []
    while not moved or moved[-1]:
        with StoreContents(tmp_path / "a") as contents:
            moved.append((await copy_store(contents, [target], ALL)).num_copied)
    await target.close()
    engine.close()
    assert sum(moved) == NUM_RECORDS + 4 * 3
    with StoreContents(tmp_path / "a") as here, StoreContents(tmp_path / "b") as there:
        names = [{name for stretch in each.stretches() for name in stretch.names} for each in (here, there)]
    assert names[0] == names[1]

"""A store leaves a part of its file system free: its budget fits at the start, and puts stop in time."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from antefix_kvstore.engine_stats import collect
from antefix_kvstore.free_space import FreeSpace, fit_to_disk
from antefix_kvstore.group_commit import GroupCommitter
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.storage_engine import StorageEngine
from tests.kvstore.small_store import BLOCK, Prompt
from tests.small_disk import fill, free_bytes, small_disk
from tests.waiting import AT_MOST_S

MIB = 1 << 20
PAYLOAD = 20_011


class Disk:
    """A file system as statvfs reports it."""

    def __init__(self, free: int, total: int = 1024 * MIB) -> None:
        self.free, self.total = free, total

    def statvfs(self, path):
        return SimpleNamespace(f_blocks=self.total // 4096, f_frsize=4096, f_bavail=self.free // 4096)


def prompt(number: int) -> Prompt:
    return Prompt([number] * BLOCK * 3, payload_bytes=PAYLOAD)


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "small", 24 * MIB) as path:
        yield path


def test_a_budget_that_the_disk_cannot_hold_is_lowered_and_said(tmp_path, caplog):
    disk = Disk(free=100 * MIB)
    config = KvStoreConfig(dir=str(tmp_path / "store"), budget_bytes=1 << 40, segment_bytes=256 * MIB)
    fitted = fit_to_disk(config, statvfs=disk.statvfs)
    # A sixteenth of the file system stays free.
    assert fitted.budget_bytes == (100 - 64) * MIB and fitted.segment_bytes == 0
    assert "set a lower --budget-bytes" in caplog.text and str(fitted.budget_bytes) in caplog.text
    caplog.clear()
    fits = KvStoreConfig(dir=str(tmp_path / "store"), budget_bytes=36 * MIB)
    assert fit_to_disk(fits, statvfs=disk.statvfs) is fits and not caplog.text
    named = KvStoreConfig(dir=str(tmp_path / "store"), budget_bytes=1 << 40, free_bytes_min=90 * MIB)
    assert fit_to_disk(named, statvfs=disk.statvfs).budget_bytes == 10 * MIB
    disk.free = 0
    assert fit_to_disk(config, statvfs=disk.statvfs).budget_bytes == MIB


def test_what_the_store_has_already_counts_as_its_own(tmp_path):
    (tmp_path / "store" / "segments").mkdir(parents=True)
    (tmp_path / "store" / "segments" / "x.seg").write_bytes(bytes(5 * MIB))
    config = KvStoreConfig(dir=str(tmp_path / "store"), budget_bytes=1 << 40)
    fitted = fit_to_disk(config, statvfs=Disk(free=74 * MIB).statvfs)
    assert 15 * MIB <= fitted.budget_bytes < 15.1 * MIB


def test_puts_stop_before_the_disk_is_full_and_go_on_when_it_is_not(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    disk = Disk(free=500 * MIB)
    free = FreeSpace(tmp_path, statvfs=disk.statvfs)
    engine = StorageEngine(KvStoreConfig(dir=str(tmp_path / "store"), budget_bytes=64 * MIB), free=free)
    assert engine.put(prompt(1).blocks()).num_stored == 3
    disk.free = free.margin_bytes // 2
    for number in (2, 3):
        reasons = {refusal.text for refusal in engine.put(prompt(number).blocks()).refused.values()}
        assert any("bytes free" in reason for reason in reasons)
    # Stored records are served, and none of them is evicted.
    engine.maintain()
    assert (prompt(1).check(engine), prompt(2).check(engine)) == (3, 0)
    stats = collect(engine)
    assert "bytes free" in stats.texts["stopped"] and stats.numbers["refused"] == 6
    assert (stats.numbers["free_bytes"], stats.numbers["free_bytes_min"]) == (disk.free, free.margin_bytes)
    assert caplog.text.count("nothing is stored now") == 1
    disk.free = 500 * MIB
    engine.maintain()
    assert engine.put(prompt(2).blocks()).num_stored == 3 and not collect(engine).texts["stopped"]
    assert "stores again" in caplog.text
    engine.close()


def test_the_limit_follows_a_neighbour_that_grows_slowly(tmp_path):
    """The neighbour grows like a ledger. The store evicts old records for new ones, and the margin stays free."""
    disk = Disk(free=30 * MIB, total=32 * MIB)
    free = FreeSpace(tmp_path, statvfs=disk.statvfs)
    engine = StorageEngine(
        KvStoreConfig(dir=str(tmp_path / "store"), budget_bytes=64 * MIB, segment_bytes=256 << 10), free=free
    )
    for number in range(200):
        before = engine.space.used_bytes
        stored = engine.put(prompt(number).blocks()).num_stored
        assert stored == 3
        disk.free -= engine.space.used_bytes - before + (100 << 10)
        engine.maintain()
    assert engine.space.counters.evictions > 0 and not engine.space.stopped
    assert disk.free >= free.margin_bytes * 3 // 4
    assert prompt(199).check(engine) == 3 and prompt(0).check(engine) == 0
    engine.close()


@pytest.mark.parametrize("but", [0, 16 << 10, MIB // 2, MIB])
def test_hits_are_answered_at_every_fill_level_and_over_restarts(disk, but):
    """A store, its log and a neighbour share a disk of 24 MiB, which the neighbour fills up to `but` free bytes."""
    config = fit_to_disk(KvStoreConfig(dir=str(disk / "store"), usage_log_dir=str(disk / "log"), budget_bytes=64 << 30))
    engine = StorageEngine(config)
    writer = GroupCommitter(engine)
    assert writer.submit(prompt(1).blocks()).result(AT_MOST_S).num_stored == 3
    fill(disk / "ballast", but=but)
    for number in range(2, 30):
        writer.submit(prompt(number).blocks()).result(AT_MOST_S)
        assert prompt(1).check(engine) == 3
        engine.maintain()
    writer.stop()
    engine.close()
    engine = StorageEngine(fit_to_disk(config))
    assert prompt(1).check(engine) == 3
    (disk / "ballast").unlink()
    engine.maintain()
    assert engine.put(prompt(99).blocks()).num_stored == 3
    engine.close()


def test_a_store_alone_on_a_disk_that_is_smaller_than_its_budget_replaces_and_leaves_the_margin(disk):
    engine = StorageEngine(fit_to_disk(KvStoreConfig(dir=str(disk / "store"), budget_bytes=64 << 30)))
    for number in range(600):
        assert engine.put(prompt(number).blocks()).num_stored == 3, number
        if not number % 10:
            engine.maintain()
    assert engine.space.counters.evictions > 0 and free_bytes(disk) >= MIB
    assert prompt(599).check(engine) == 3
    engine.close()

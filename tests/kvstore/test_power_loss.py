"""A power loss at any moment, with any earlier index, loses no acknowledged record and makes no byte wrong."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from antefix.record import RecordKind
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.storage_engine import StorageEngine
from tests.kvstore.power_loss import PowerLossDisk
from tests.kvstore.small_store import BLOCK, FINGERPRINT, Prompt

PROMPTS = [
    Prompt([n if i >= 16 else 0 for i in range(BLOCK * 8)], payload_bytes=2500, version=1 + n % 2) for n in range(6)
]


class PowerLost(Exception):
    """Raised in place of a file operation: from here on nothing reaches the disk."""


class DyingDisk(PowerLossDisk):
    """Loses power at the `fatal`-th file operation."""

    def __init__(self, fatal: int) -> None:
        super().__init__()
        self.left = fatal

    def _step(self) -> None:
        self.left -= 1
        if self.left <= 0:
            raise PowerLost

    def write(self, fd, buffers, offset):  # type: ignore[no-untyped-def]
        super().write(fd, buffers, offset)
        self._step()

    def sync_data(self, fd):  # type: ignore[no-untyped-def]
        self._step()
        super().sync_data(fd)

    def sync_directory(self, path):  # type: ignore[no-untyped-def]
        self._step()
        super().sync_directory(path)

    def unlink(self, path):  # type: ignore[no-untyped-def]
        self._step()
        super().unlink(path)


def life(directory: Path, rng: random.Random, acknowledged: dict[int, int], indexes: list[Path]) -> None:
    """Use the store until power is lost. Leave files that a boot might find, with the present or an earlier index."""
    disk = DyingDisk(rng.randrange(1, 40))
    config = KvStoreConfig(dir=str(directory / "store"), budget_bytes=4 << 20, segment_bytes=64 << 10)
    engine = None
    try:
        engine = StorageEngine(config, disk=disk)
        # Half of the lives write every batch past the page cache, the others none.
        engine.segments.direct_bytes_min = rng.choice((0, 1 << 30))
        # The loop is bounded. Once everything is stored, puts write nothing, and the disk never reaches its fatal
        # operation.
        for _ in range(60):
            number, count = rng.randrange(len(PROMPTS)), rng.randrange(1, 9)
            result = engine.put([*PROMPTS[number].blocks(count), PROMPTS[number].checkpoint(count - 1)])
            assert not result.refused
            acknowledged[number] = max(acknowledged[number], count)
            if rng.random() < 0.3:
                engine.space.compactor.compact_one(0.0)
            if rng.random() < 0.5:
                # LMDB syncs itself, but an older index must also work, as after an index is restored from a backup.
                saved = directory / f"index-{len(indexes)}"
                saved.mkdir()
                engine.index.env.copy(str(saved))
                indexes.append(saved)
    except PowerLost:
        pass
    finally:
        if engine is not None:
            engine.abandon()
    disk.lose_power(rng)
    if indexes and rng.random() < 0.5:
        shutil.rmtree(directory / "store" / "index", ignore_errors=True)
        shutil.copytree(rng.choice(indexes), directory / "store" / "index")


def check(directory: Path, acknowledged: dict[int, int]) -> None:
    config = KvStoreConfig(dir=str(directory / "store"), budget_bytes=4 << 20, segment_bytes=64 << 10)
    engine = StorageEngine(config)
    for number, prompt in enumerate(PROMPTS):
        num_good = prompt.check(engine)
        assert num_good >= acknowledged[number], f"prompt {number}"
        for index in range(num_good, len(prompt.hashes)):
            assert engine.read(RecordKind.BLOCK, prompt.hashes[index], fingerprint=FINGERPRINT) is None
    engine.close()


def run_seed(directory: Path, seed: int) -> None:
    rng = random.Random(seed)
    acknowledged = dict.fromkeys(range(len(PROMPTS)), 0)
    indexes: list[Path] = []
    for _ in range(3):
        life(directory, rng, acknowledged, indexes)
    check(directory, acknowledged)


@pytest.mark.parametrize("seed", range(30))
def test_what_was_acknowledged_survives_power_loss(tmp_path: Path, seed: int) -> None:
    run_seed(tmp_path, seed)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_thousand_power_losses(tmp_path: Path) -> None:
    for seed in range(1000, 1350):
        directory = tmp_path / str(seed)
        directory.mkdir()
        run_seed(directory, seed)
        shutil.rmtree(directory)


@pytest.mark.parametrize("has_index", [True, False])
def test_what_opening_indexes_is_durable_with_its_name(tmp_path: Path, has_index: bool) -> None:
    disk = PowerLossDisk()
    config = KvStoreConfig(dir=str(tmp_path / "store"), budget_bytes=4 << 20, segment_bytes=64 << 10)
    engine = StorageEngine(config, disk=disk)
    engine.put(PROMPTS[0].blocks(2))
    # The process ends after it wrote to a new segment and before it synced the segment.
    engine.segments.roll(engine.clock_ms())
    engine.segments.append(engine._drafter.drafts(PROMPTS[0].blocks(4)[2:], set()), engine.clock_ms())
    path = engine.segments.path(max(engine.segments.sizes))
    assert not disk.files[path].named and disk.files[path].writes
    engine.abandon()
    if not has_index:
        shutil.rmtree(tmp_path / "store" / "index")
    engine = StorageEngine(config, disk=disk)
    assert PROMPTS[0].check(engine) == 4
    # Bytes that were cut off after the last record may come back.
    assert disk.files[path].named and all(content is None for _, content in disk.files[path].writes)
    engine.close()

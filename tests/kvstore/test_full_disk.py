"""A file system that is really full: puts are refused, reads work, and puts work again once space is free."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.storage_engine import StorageEngine
from tests.kvstore.small_store import BLOCK, Prompt

pytestmark = pytest.mark.services


FILESYSTEM_BYTES = 8 << 20


@pytest.fixture
def small_filesystem(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 8 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={FILESYSTEM_BYTES}", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_file_system_refuses_writes_and_goes_on_reading(small_filesystem: Path) -> None:
    # The budget covers only the store's own files. Here another file fills the disk.
    config = KvStoreConfig(dir=str(small_filesystem / "store"), budget_bytes=64 << 20)
    engine = StorageEngine(config)
    first = Prompt([1] * BLOCK * 20, payload_bytes=50_000)
    assert engine.put(first.blocks()).num_stored == 20
    # 1. Another file takes the rest of the space.
    ballast = small_filesystem / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    second = Prompt([2] * BLOCK * 20, payload_bytes=50_000)
    result = engine.put(second.blocks())
    assert set(result.refused) == set(second.hashes)
    assert (first.check(engine), second.check(engine)) == (20, 0)
    # 2. The other file is deleted.
    ballast.unlink()
    assert engine.put(second.blocks()).num_stored == 20
    assert (first.check(engine), second.check(engine)) == (20, 20)
    engine.close()
    engine = StorageEngine(config)
    assert (first.check(engine), second.check(engine)) == (20, 20)
    engine.close()


def test_a_store_fills_a_file_system_and_stays_sound(small_filesystem: Path) -> None:
    """The budget exceeds the disk. Small puts fill the disk, so that it may become full at any point."""
    engine = StorageEngine(KvStoreConfig(dir=str(small_filesystem / "store"), budget_bytes=64 << 20))
    prompts = [Prompt([n] * BLOCK * 3, payload_bytes=20_011) for n in range(200)]
    stored = [engine.put(prompt.blocks()).num_stored for prompt in prompts]
    assert 0 < sum(stored) < 600
    assert [prompt.check(engine) for prompt in prompts] == stored
    engine.abandon()
    engine = StorageEngine(KvStoreConfig(dir=str(small_filesystem / "store"), budget_bytes=6 << 20))
    assert [prompt.check(engine) for prompt in prompts] == stored
    # With a budget that fits on the disk, the next put evicts records and succeeds.
    fresh = Prompt([500] * BLOCK * 3, payload_bytes=20_011)
    assert engine.put(fresh.blocks()).num_stored == 3
    assert fresh.check(engine) == 3
    engine.abandon()

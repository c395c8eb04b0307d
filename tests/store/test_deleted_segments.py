"""A reader closes deleted segments, because an open one keeps its space on the disk."""

from __future__ import annotations

import asyncio
import gc
import shutil
from pathlib import Path

import pytest

from antefix.errors import Unavailable
from antefix.store import local_store
from antefix.store.local_store import LocalStore
from antefix.store_files.segment_files import SegmentFiles
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.storage_engine import StorageEngine
from tests.kvstore.small_store import BLOCK, FINGERPRINT, Prompt
from tests.waiting import until

PROMPT = Prompt(list(range(BLOCK * 2)), payload_bytes=50_001)


def open_in(directory: Path) -> list[str]:
    """The files of the directory, deleted or not, that this process has open."""
    found = []
    for path in Path("/proc/self/fd").iterdir():
        try:
            found.append(str(path.readlink()))
        except OSError:
            continue
    return [name for name in found if name.startswith(f"{directory}/")]


def filled(directory: Path) -> Path:
    """Make a store with a prompt's blocks, which nobody has open. Returns the directory of its segments."""
    engine = StorageEngine(KvStoreConfig(dir=str(directory)))
    engine.put(PROMPT.blocks())
    engine.close()
    return directory / "segments"


async def read_all(store: LocalStore) -> int:
    return await store.get_blocks(PROMPT.hashes, PROMPT.buffers(), fingerprint=FINGERPRINT)


async def test_a_client_that_reads_no_more_closes_deleted_segments(tmp_path):
    segments = filled(tmp_path / "store")
    store = LocalStore(tmp_path / "store", "127.0.0.1:1")
    assert await read_all(store) == len(PROMPT.hashes)
    assert len(open_in(segments)) == 1
    for path in segments.iterdir():
        path.unlink()
    await until(lambda: not open_in(segments), "no deleted segment is open")
    store.uses.uses.used.clear()
    await store.close()


async def test_a_look_that_a_hanging_disk_forbids_counts_as_no_read(tmp_path, monkeypatch):
    segments = filled(tmp_path / "store")
    monkeypatch.setattr(local_store, "SWEEP_S", 0.001)
    store = LocalStore(tmp_path / "store", "127.0.0.1:1")
    await read_all(store)
    hanging = asyncio.get_running_loop().create_future()
    store.reads._hanging.add(hanging)
    for path in segments.iterdir():
        path.unlink()
    await asyncio.sleep(0.1)
    assert (len(open_in(segments)), store.breaker.num_spared) == (1, 0)
    store.reads._hanging.discard(hanging)
    await until(lambda: not open_in(segments), "no deleted segment is open")
    store.uses.uses.used.clear()
    await store.close()


async def test_a_client_keeps_segments_that_exist_and_closes_them_at_its_end(tmp_path):
    segments = filled(tmp_path / "store")
    store = LocalStore(tmp_path / "store", "127.0.0.1:1")
    await read_all(store)
    assert store._reader is not None
    store._reader.runs.files.let_go()
    assert len(open_in(segments)) == 1
    store.uses.uses.used.clear()
    await store.close()
    assert store._sweeping is not None
    assert store._sweeping.done()
    assert not open_in(segments)


async def test_a_client_that_was_closed_during_a_hang_looks_for_nothing_more(tmp_path):
    filled(tmp_path / "store")
    store = LocalStore(tmp_path / "store", "127.0.0.1:1")
    await read_all(store)
    store.reads._hanging.add(asyncio.get_running_loop().create_future())
    store.uses.uses.used.clear()
    await store.close()
    with pytest.raises(Unavailable):
        await read_all(store)
    assert store._sweeping is not None
    assert store._sweeping.done()


async def test_a_reader_of_a_replaced_index_leaves_no_descriptors(tmp_path):
    segments = filled(tmp_path / "store")
    store = LocalStore(tmp_path / "store", "127.0.0.1:1")
    assert await read_all(store) == len(PROMPT.hashes)
    shutil.rmtree(tmp_path / "store/index")
    StorageEngine(KvStoreConfig(dir=str(tmp_path / "store"))).close()
    assert await until(lambda: read_all(store), "the new index is read", despite=Unavailable) == len(PROMPT.hashes)

    def closed() -> bool:
        gc.collect()
        return len(open_in(segments)) == 1

    await until(closed, "the first reader's descriptors are closed")
    store.uses.uses.used.clear()
    await store.close()


def test_a_reader_that_nobody_closes_closes_its_files(tmp_path):
    segments = filled(tmp_path / "store")
    files = SegmentFiles(segments)
    with files.use(1):
        assert len(open_in(segments)) == 1
    del files
    gc.collect()
    assert not open_in(segments)

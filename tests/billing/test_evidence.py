"""The evidence of a hit survives if the reader, the store's service, or both die."""

from pathlib import Path

import pytest

from antefix import rpc
from antefix.store.local_store import LocalStore
from antefix.store_files.hit_log import StoreEventKind, read_store_log
from antefix.store_files.read_log import USAGE_LOG_FILE
from antefix.v1 import kvstore_pb2
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.server import KvStoreServicer, register
from antefix_kvstore.storage_engine import StorageEngine
from tests.kvstore.small_store import BLOCK, FINGERPRINT, Prompt

PROMPT = Prompt([1] * BLOCK * 4)


@pytest.fixture
def config(tmp_path):
    return KvStoreConfig(dir=str(tmp_path / "store"), budget_bytes=4 << 20, usage_log_dir=str(tmp_path / "log"))


def logged(config, kind):
    return [event.hash for event in read_store_log(Path(config.usage_log_dir)) if event.kind is kind]


async def test_a_read_is_logged_though_the_service_is_gone_before_it_is_told(config):
    servicer = KvStoreServicer(StorageEngine(config))
    server = await rpc.start_server("127.0.0.1:0", lambda s: register(servicer, s), [kvstore_pb2.DESCRIPTOR])
    servicer.engine.put(PROMPT.blocks())
    store = LocalStore(config.dir, server.address)
    await server.drain(0.1)
    assert await store.get_blocks(PROMPT.hashes, PROMPT.buffers(), fingerprint=FINGERPRINT) == 4
    assert logged(config, StoreEventKind.READ) == [PROMPT.hashes[3].hex()]
    await store.close()
    await servicer.close()


def test_what_was_committed_and_not_logged_at_a_crash_is_logged_at_the_next_start(config, monkeypatch):
    engine = StorageEngine(config)
    engine.put(PROMPT.blocks(2))
    with monkeypatch.context() as patch:
        # The process ends after the commit and before the log line.
        patch.setattr(engine._usage_log, "stored", lambda hashes: None)
        engine.put(PROMPT.blocks())
    engine.abandon()
    assert set(logged(config, StoreEventKind.STORED)) == {name.hex() for name in PROMPT.hashes[:2]}
    StorageEngine(config).close()
    assert set(logged(config, StoreEventKind.STORED)) == {name.hex() for name in PROMPT.hashes}


def test_without_a_log_readers_are_told_of_none(config, tmp_path):
    StorageEngine(config).close()
    assert (tmp_path / "store" / USAGE_LOG_FILE).exists()
    StorageEngine(KvStoreConfig(dir=config.dir, budget_bytes=4 << 20)).close()
    assert not (tmp_path / "store" / USAGE_LOG_FILE).exists()

"""Whatever happens to an open store's files, its owner continues with the segments' records or an empty store."""

import os
import shutil

import pytest

from antefix.errors import ConfigError, Unavailable
from antefix.record import RecordKind
from antefix.store.local_store import LocalStore
from antefix_billing.ledger import Ledger
from antefix_kvstore.identity import lock_directory
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.server import KvStoreServicer
from antefix_kvstore.storage_engine import StorageEngine
from tests.kvstore.small_store import FINGERPRINT, Prompt
from tests.waiting import AT_MOST_S, until

PROMPT = Prompt(range(8 * 20))
MORE = Prompt(range(1000, 1000 + 8 * 5))


@pytest.fixture
def config(tmp_path):
    return KvStoreConfig(dir=str(tmp_path / "store"), budget_bytes=64 << 20, compression="off", durable=False)


@pytest.fixture
def engine(config):
    engine = StorageEngine(config)
    engine.put(PROMPT.blocks())
    yield engine
    if engine.is_open:
        engine.close()


def index_file(config):
    return config_dir(config) / "index" / "data.mdb"


def config_dir(config):
    from pathlib import Path

    return Path(config.dir)


def delete_index(config):
    shutil.rmtree(index_file(config).parent)


def delete_index_file(config):
    index_file(config).unlink()


def zero_index(config):
    path = index_file(config)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))


def cut_index(config):
    os.truncate(index_file(config), 3 * 4096)


def empty_index(config):
    os.truncate(index_file(config), 0)


def put_other_index(config):
    other = index_file(config).with_suffix(".other")
    shutil.copy(index_file(config), other)
    other.rename(index_file(config))


def delete_identity(config):
    (config_dir(config) / "STORE").unlink()


def delete_segments(config):
    shutil.rmtree(config_dir(config) / "segments")


def delete_all(config):
    shutil.rmtree(config.dir)


def empty_all(config):
    for path in config_dir(config).iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


KEEPING = [delete_index, delete_index_file, zero_index, cut_index, empty_index, put_other_index, delete_identity]
LOSING = [delete_segments, delete_all, empty_all]


def num_found(engine, prompt=PROMPT):
    found = engine.lookup(prompt.hashes, fingerprint=FINGERPRINT).num_blocks
    into = prompt.buffers()
    read = engine.read_blocks(prompt.hashes, into, fingerprint=FINGERPRINT).num_good
    assert [bytes(buffer) for buffer in into[:read]] == [prompt.payload(number) for number in range(read)]
    assert read == found
    return found


@pytest.mark.parametrize("harm", KEEPING + LOSING)
def test_an_open_store_heals_by_itself(engine, config, harm, caplog):
    harm(config)
    engine.maintain()
    assert engine.counters.heals == 1 and "was harmed" in caplog.text
    assert num_found(engine) == (0 if harm in LOSING else len(PROMPT.hashes))
    # The store accepts puts again, also of lost records, and a restart finds all of them.
    assert engine.put(PROMPT.blocks()).num_stored == (len(PROMPT.hashes) if harm in LOSING else 0)
    assert engine.put(MORE.blocks()).num_stored == len(MORE.hashes)
    engine.maintain()
    assert engine.counters.heals == 1
    engine.close()
    again = StorageEngine(config)
    assert (num_found(again), num_found(again, MORE)) == (len(PROMPT.hashes), len(MORE.hashes))
    again.close()


@pytest.mark.parametrize("harm", KEEPING + LOSING)
def test_a_store_that_was_harmed_while_closed_opens(engine, config, harm):
    engine.close()
    harm(config)
    again = StorageEngine(config)
    assert num_found(again) == (0 if harm in LOSING else len(PROMPT.hashes))
    again.close()


@pytest.mark.parametrize("harm", KEEPING + LOSING)
async def test_a_reader_of_another_process_survives_and_finds_what_healed(engine, config, harm):
    """The reader reads pages, as in another process, because here it must not share the owner's map."""
    reader = LocalStore(config.dir, "127.0.0.1:1")
    apart = reader._open_reader
    from antefix.store_files import index

    shared, index._open = index._open, {}
    try:
        assert (await reader.lookup(PROMPT.hashes, fingerprint=FINGERPRINT)).num_blocks == len(PROMPT.hashes)
        assert apart().index._pages is not None
        harm(config)
        for _ in range(3):
            try:
                found = (await reader.lookup(PROMPT.hashes, fingerprint=FINGERPRINT)).num_blocks
                assert found in (0, len(PROMPT.hashes))
                into = PROMPT.buffers()
                read = await reader.get_blocks(PROMPT.hashes, into, fingerprint=FINGERPRINT)
                assert [bytes(b) for b in into[:read]] == [PROMPT.payload(i) for i in range(read)]
            except Unavailable:
                pass
        index._open = shared
        engine.maintain()
        index._open = {}
        wanted = 0 if harm in LOSING else len(PROMPT.hashes)
        assert (await reader.lookup(PROMPT.hashes, fingerprint=FINGERPRINT)).num_blocks == wanted
    finally:
        index._open = shared
        reader.uses.uses.used.clear()
        await reader.close()


def test_garbage_in_the_indexs_pages_is_found_by_who_reads_it(engine, config):
    size = index_file(config).stat().st_size
    with index_file(config).open("r+b") as file:
        file.seek(2 * 4096)
        file.write(bytes(size - 2 * 4096))
    for _ in range(2):
        try:
            engine.lookup(PROMPT.hashes, fingerprint=FINGERPRINT)
        except Unavailable as err:
            assert "lmdb" not in type(err).__name__
        engine.maintain()
    engine.maintain()
    assert num_found(engine) == len(PROMPT.hashes)


def test_watchers_of_a_healed_store_are_told_to_begin_again(engine, config):
    before = engine.events.cursor
    delete_all(config)
    engine.maintain()
    assert engine.events.since(before) is None
    assert sum(len(event.names()) for batch in engine.snapshot() for event in batch.events) == 0


def test_a_removed_lock_lets_no_second_writer_in(engine, config):
    (config_dir(config) / "LOCK").unlink()
    with pytest.raises(ConfigError, match="open in another process"):
        lock_directory(config_dir(config))
    engine.maintain()
    with pytest.raises(ConfigError, match="open in another process"):
        StorageEngine(config)


def test_a_writer_whose_directory_another_one_took_stores_nothing_there(engine, config):
    shutil.rmtree(config.dir)
    other = StorageEngine(config)
    other.put(MORE.blocks())
    for _ in range(3):
        engine.maintain()
    with pytest.raises(Unavailable):
        engine.put(PROMPT.blocks())
    assert num_found(other, MORE) == len(MORE.hashes) and num_found(other) == 0
    # The store continues when the other process has ended.
    other.close()
    engine.maintain()
    assert num_found(engine, MORE) == len(MORE.hashes)


def test_a_ledgers_removed_lock_lets_no_second_writer_in(tmp_path):
    ledger = Ledger(tmp_path)
    (tmp_path / "lock").unlink()
    with pytest.raises(ConfigError, match="another process writes"):
        Ledger(tmp_path)
    ledger.close()


async def test_the_services_writer_heals_without_being_asked(engine, config):
    servicer = KvStoreServicer(engine)
    try:
        delete_all(config)
        stored = await until(
            lambda: servicer.writer.submit(PROMPT.blocks()).result(AT_MOST_S), "the store heals", despite=Unavailable
        )
        assert stored.num_stored == len(PROMPT.hashes)
        assert num_found(engine) == len(PROMPT.hashes)
        assert engine.read(RecordKind.BLOCK, PROMPT.hashes[0], fingerprint=FINGERPRINT)
    finally:
        await servicer.close()

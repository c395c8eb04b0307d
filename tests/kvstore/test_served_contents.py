"""A copy from a served store equals a copy from its files, and resumes after a break."""

import asyncio
import dataclasses

import pytest

from antefix import rpc
from antefix.errors import Unavailable
from antefix.record import RecordKind
from antefix.store.remote_store import RemoteStore
from antefix.v1 import kvstore_pb2
from antefix_kvstore import contents_wire
from antefix_kvstore.contents_wire import contents_to_wire, stretch_from_wire
from antefix_kvstore.copy_store import CopyLimits, copy_store
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.served_contents import ServedContents
from antefix_kvstore.server import KvStoreServicer, register
from antefix_kvstore.storage_engine import StorageEngine
from antefix_kvstore.store_contents import StoreContents
from tests.kvstore.small_store import owner
from tests.kvstore.test_copy_store import LONG, NUM_RECORDS, OTHER, Breaking, engine_of, fill, target_of


@pytest.fixture
async def served(tmp_path):
    """The address of a store with the records of `fill`, and its servicer, for tests that change it."""
    fill(tmp_path / "a")
    config = KvStoreConfig(dir=str(tmp_path / "a"), budget_bytes=8 << 20, scrub_bytes_per_s=0)
    servicer = KvStoreServicer(StorageEngine(config))
    server = await rpc.start_server("127.0.0.1:0", lambda target: register(servicer, target), [kvstore_pb2.DESCRIPTOR])
    yield server.address, servicer
    await server.drain(0)
    await servicer.close()


async def copy(address, target, **limits):
    """Copy in a thread, as a command does, because reading from a service blocks."""

    def run():
        with ServedContents(RemoteStore(address)) as contents:
            return asyncio.run(copy_store(contents, [target], CopyLimits(**limits)))

    return await asyncio.to_thread(run)


async def test_what_is_told_is_what_the_files_hold(served, tmp_path):
    address, _ = served

    def read():
        with ServedContents(RemoteStore(address)) as told, StoreContents(tmp_path / "a") as files:
            assert told.layouts() == files.layouts()
            assert told.stretches() == files.stretches()

    await asyncio.to_thread(read)


async def test_a_copy_from_a_service_has_every_record_with_its_pin_and_its_time(served, tmp_path):
    address, _ = served
    target = target_of(tmp_path / "b")
    report = await copy(address, target)
    assert (report.num_copied, report.num_there, report.complete) == (NUM_RECORDS, 0, True)
    again = await copy(address, target)
    assert (again.num_copied, again.num_there) == (0, NUM_RECORDS)
    await target.close()
    engine = engine_of(tmp_path / "b")
    assert LONG.check(engine) == len(LONG.hashes) and OTHER.check(engine) == len(OTHER.hashes)
    with engine.index.txn() as txn:
        pinned = engine.index.entry(txn, RecordKind.BLOCK, OTHER.hashes[-1])
        kept = engine.index.entry(txn, RecordKind.CHECKPOINT, LONG.hashes[11])
    assert pinned.pinned_ms > engine.clock_ms() and kept.ttl_s == 50
    engine.close()


async def test_it_goes_on_where_it_broke_off(served, tmp_path):
    address, _ = served
    target = target_of(tmp_path / "b")
    with pytest.raises(Unavailable):
        await copy(address, Breaking(target, 1))
    report = await copy(address, target)
    assert 0 < report.num_there < NUM_RECORDS and report.num_there + report.num_copied == NUM_RECORDS
    await target.close()


async def test_what_went_meanwhile_is_left_out_and_the_rest_comes(served, tmp_path):
    address, servicer = served
    target = target_of(tmp_path / "b")

    def run():
        with ServedContents(RemoteStore(address)) as contents:
            contents.stretches()
            servicer.engine.evict([(RecordKind.BLOCK, OTHER.hashes[2])])
            return asyncio.run(copy_store(contents, [target], CopyLimits()))

    report = await asyncio.to_thread(run)
    # Blocks 2 to 5, and the checkpoint after block 2.
    assert report.num_copied == NUM_RECORDS - 5 and not report.complete
    await target.close()


async def test_the_rate_is_bounded(served, tmp_path):
    address, _ = served
    target = target_of(tmp_path / "b")
    loop = asyncio.get_running_loop()
    whole = await copy(address, target)
    await target.close()
    other, started = target_of(tmp_path / "c"), loop.time()
    await copy(address, other, bytes_per_s=whole.bytes_copied * 5)
    assert loop.time() - started > 0.15
    await other.close()


def test_long_stretches_come_in_parts(tmp_path, monkeypatch):
    fill(tmp_path / "a")
    monkeypatch.setattr(contents_wire, "_HASHES_PER_MESSAGE", 5)
    with StoreContents(tmp_path / "a") as contents:
        messages = list(contents_to_wire(contents))
        parts = [stretch_from_wire(each) for message in messages for each in message.stretches]
        names = [name for part in parts for name in part.names]
        expected = [name for stretch in contents.stretches() for name in stretch.names]
    assert len(messages) > 2 and max(len(part.hashes) for part in parts) == 5
    assert sorted(names) == sorted(expected) and len(names) == NUM_RECORDS
    ttls = {name: ttl for part in parts for name, ttl in zip(part.names, part.ttls_s, strict=True)}
    assert ttls[(RecordKind.CHECKPOINT, LONG.hashes[11])] == 50
    assert {part.owner[1:] for part in parts} == {owner("")}


def test_a_stretch_whose_parts_do_not_fit_is_refused(tmp_path):
    fill(tmp_path / "a")
    with StoreContents(tmp_path / "a") as contents:
        (stretch, *_) = contents.stretches()
    for wrong in (dataclasses.replace(stretch, checkpoints=(99,)), dataclasses.replace(stretch, ttls_s=())):
        with pytest.raises(Exception, match="differ in length"):
            stretch_from_wire(contents_wire._to_wire(wrong))

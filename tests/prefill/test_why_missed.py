"""The reason in the bill why a prompt missed, with a worker and a real store service."""

import dataclasses

import numpy as np
import pytest

from antefix import rpc
from antefix.block import digest_of
from antefix.record import RecordKind
from antefix.store.local_store import LocalStore
from antefix.store.remote_store import RemoteStore
from antefix.v1 import kvstore_pb2
from antefix_kvstore.index_writer import IndexTxn
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.registration import register_fingerprint
from antefix_kvstore.server import KvStoreServicer, register
from antefix_kvstore.storage_engine import StorageEngine
from antefix_prefill.run_prompt import run_prompt
from tests.engines import prompt_of

pytestmark = pytest.mark.slow

TOKENS = np.random.default_rng(5).integers(0, 256, 400)


@pytest.fixture
async def service(tmp_path):
    servicer = KvStoreServicer(StorageEngine(KvStoreConfig(dir=str(tmp_path / "store"), budget_bytes=64 << 20)))
    server = await rpc.start_server("127.0.0.1:0", lambda s: register(servicer, s), [kvstore_pb2.DESCRIPTOR])
    servicer.address = server.address
    yield servicer
    await server.drain(0.2)
    await servicer.close()


@pytest.fixture(params=["local", "remote"])
async def shared(request, service):
    """The store as seen by a worker on the store's host, or by a worker on another host."""
    is_local = request.param == "local"
    store = LocalStore(service.engine.config.dir, service.address) if is_local else RemoteStore(service.address)
    yield store
    await store.close()


@pytest.fixture
def run(make_engine, shared):
    """Run a prompt on a worker with empty memory. Returns the restore report."""

    async def run(tokens=TOKENS, *, tenant="", strategy="boundary", **changes):
        engine = dataclasses.replace(make_engine(strategy), store=shared, **changes)
        computed = await run_prompt(engine, prompt_of(engine, tokens, tenant))
        engine.blocks.release(computed.sequence.block_table)
        return computed.report

    return run


async def test_a_new_prompt_is_first_seen_and_a_stored_one_has_no_reason(run):
    assert (await run()).miss_reason == "first_seen"
    assert (await run()).miss_reason == ""
    longer = await run(np.concatenate((TOKENS, TOKENS)))
    assert (longer.hit_tokens, longer.miss_reason) == (384, "first_seen")


async def test_an_evicted_prompt_says_so(run, service):
    await run()
    service.engine.space.evict(1 << 30)
    assert (await run()).miss_reason == "evicted"
    assert (await run()).miss_reason == ""


async def test_the_part_that_was_evicted_is_the_reason_of_a_shorter_hit(run, service, make_engine):
    await run(strategy="full")
    chain = prompt_of(make_engine("boundary"), TOKENS).chain
    service.engine.evict([(RecordKind.BLOCK, chain.hashes[4])])
    report = await run(strategy="full")
    assert (report.hit_tokens, report.miss_reason) == (256, "evicted")


async def test_an_expired_prompt_says_so(run, service):
    now_ms = service.engine.clock_ms()
    await run()
    later_ms = now_ms + 80 * 3600 * 1000
    service.engine.clock_ms = service.engine.space._now_ms = lambda: later_ms
    service.engine.maintain()
    assert (await run()).miss_reason == "expired"


async def test_a_block_whose_bytes_changed_on_disk_is_corrupt(run, service, make_engine):
    report = await run()
    assert report.written_tokens == 384
    (segment,) = (service.engine.segments.directory).iterdir()
    data = bytearray(segment.read_bytes())
    with service.engine.index.txn() as txn:
        chain = prompt_of(make_engine("boundary"), TOKENS).chain
        entry = service.engine.index.entry(txn, RecordKind.BLOCK, chain.hashes[0])
    data[entry.offset + 256 + 10] ^= 1
    segment.write_bytes(bytes(data))
    assert (await run()).miss_reason == "corrupt"


async def test_tokens_stored_under_another_fingerprint_are_told_to_their_tenant_only(run):
    await run(tenant="acme", fingerprint=b"\x07" * 32)
    assert (await run(tenant="acme")).miss_reason == "fingerprint_differs"
    assert (await run(tenant="other")).miss_reason == "first_seen"


@pytest.mark.parametrize(
    "statement", [b"junk", b"[1]", b"null", b'{"hash_kind":99}', b'{"hash_kind":[1]}', b"[" * 9999]
)
async def test_statements_of_others_end_no_request(service, run, statement):
    """Anyone who may write to the store may register one, and a later version may have other kinds of names."""
    await run(fingerprint=b"\x07" * 32)
    with IndexTxn(service.engine.index) as txn:  # as earlier versions did; this one refuses most of these
        register_fingerprint(txn, digest_of(statement), 64, {}, statement)
    report = await run(TOKENS[::-1].copy())
    assert (report.hit_tokens, report.miss_reason) == (0, "first_seen")


async def test_a_worker_that_borrows_names_writes_nothing_under_them(run):
    assert (await run(borrows=True)).written_tokens == 0
    report = await run()
    assert (report.hit_tokens, report.miss_reason) == (0, "first_seen")
    assert (await run(borrows=True)).hit_tokens == 384


async def test_a_short_prompt_is_below_the_minimum(run):
    assert (await run(TOKENS[:64])).miss_reason == "below_minimum"
    assert (await run(TOKENS[100:165])).miss_reason == "first_seen"


@pytest.mark.parametrize("broken", ["lookup", "get_blocks", "fate"])
async def test_a_store_that_does_not_answer_is_unavailable(make_engine, store, broken):
    first = make_engine("boundary")
    await run_prompt(first, prompt_of(first, TOKENS))
    if broken == "fate":
        store.records.clear()
    store.broken = {broken}
    other = make_engine("boundary")
    report = (await run_prompt(other, prompt_of(other, TOKENS))).report
    assert (report.hit_tokens, report.miss_reason) == (0, "store_unavailable")

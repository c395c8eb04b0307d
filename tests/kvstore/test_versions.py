"""Records of version 2 are written to a store of version 1. Both are found, moved, checked, and expire correctly."""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from antefix import rpc
from antefix.block import Family, Fingerprint
from antefix.errors import InvalidRequest
from antefix.layout import KVFormat, KVGeometry
from antefix.record import RecordKind
from antefix.secret import Keyring
from antefix.store.payload_wire import unpack_get_response
from antefix.store.pieces import join_hashes
from antefix.store.remote_store import RemoteStore
from antefix.store_files.owners import KnownNames, Owners
from antefix.store_files.record_format import (
    FORMAT_VERSION,
    INDEX_ENTRY,
    INDEX_ENTRY_SHORT,
    RECORD_HEADER_BYTES,
    unpack_identity,
    unpack_segment_header,
)
from antefix.store_files.record_header import unpack_record_header
from antefix.v1 import kvstore_pb2
from antefix_kvstore import check_store, describe_store
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.scrubber import Scrubber
from antefix_kvstore.server import KvStoreServicer, register
from antefix_kvstore.storage_engine import StorageEngine
from tests.kvstore.golden import CODED, GOLDEN, RAW
from tests.kvstore.small_store import BLOCK, FINGERPRINT, Clock, Prompt

KEYRING = Keyring(b"s" * 32, generation=7)
NEW = Prompt([5] * BLOCK * 4, payload_bytes=3000)
OLD = Prompt([6] * BLOCK * 4, payload_bytes=3000, version=1)
OpenEngine = Callable[..., StorageEngine]


@pytest.fixture
def v1_store(tmp_path: Path) -> Path:
    with tarfile.open(GOLDEN / "store-v1.tar.gz") as tar:
        tar.extractall(tmp_path, filter="data")
    return tmp_path / "store"


def versions(engine: StorageEngine) -> list[tuple[int, int]]:
    """(segment's version, record's version) of each record in the store."""
    found = []
    for number in sorted(engine.segments.sizes):
        head = engine.segments.read(number, 0, 4096)
        for header in engine.segments.scan(number, check_payloads=True):
            found.append((unpack_segment_header(head)[0].version, header.version))
    return found


@pytest.mark.parametrize("ending", ["closed", "killed", "index lost"])
def test_a_store_of_version_1_goes_on_as_the_present_one(v1_store: Path, ending: str) -> None:
    config = KvStoreConfig(dir=str(v1_store), budget_bytes=1 << 20)
    engine = StorageEngine(config)
    engine.segments.roll(engine.clock_ms())
    engine.put([*NEW.blocks(), NEW.checkpoint(3)])
    engine.put(OLD.blocks())
    assert set(versions(engine)) == {(1, 1), (3, 2), (3, 1)}
    engine.abandon() if ending == "killed" else engine.close()
    assert unpack_identity((v1_store / "STORE").read_bytes()).version == FORMAT_VERSION
    if ending == "index lost":
        shutil.rmtree(v1_store / "index")
    engine = StorageEngine(config)
    assert [prompt.check(engine) for prompt in (RAW, CODED, NEW, OLD)] == [5, 3, 4, 4]
    assert engine.lookup(RAW.hashes, fingerprint=RAW.fingerprint).checkpoints == (5,)
    assert Scrubber(engine, 1 << 30).scrub() == 0
    engine.close()
    assert check_store.fsck(v1_store).sound


def test_a_store_whose_identity_is_lost_is_of_its_newest_segments_version(v1_store: Path) -> None:
    config = KvStoreConfig(dir=str(v1_store), budget_bytes=1 << 20)
    engine = StorageEngine(config)
    engine.segments.roll(engine.clock_ms())
    engine.put(NEW.blocks())
    engine.close()
    (v1_store / "STORE").unlink()
    engine = StorageEngine(config)
    assert (engine.identity.version, RAW.check(engine), NEW.check(engine)) == (FORMAT_VERSION, 5, 4)
    engine.close()


def test_compaction_moves_both_as_they_are(open_engine: OpenEngine) -> None:
    engine = open_engine(segment_bytes=64 << 10)
    dead = Prompt([9] * BLOCK * 12, payload_bytes=3000)
    engine.put([*NEW.blocks(), *OLD.blocks(), *dead.blocks()])
    before = {(h.kind, h.hash): h for n in engine.segments.sizes for h in engine.segments.scan(n, check_payloads=True)}
    engine.segments.roll(engine.clock_ms())
    engine.evict([(RecordKind.BLOCK, dead.hashes[0])])
    assert engine.space.compactor.compact_one(0.05)
    assert (NEW.check(engine), OLD.check(engine)) == (4, 4)
    for prompt in (NEW, OLD):
        for block_hash in prompt.hashes:
            with engine.index.txn() as txn:
                entry = engine.index.entry(txn, RecordKind.BLOCK, block_hash)
            assert entry is not None
            raw = engine.segments.read(entry.segment, entry.offset, RECORD_HEADER_BYTES)
            after, old = unpack_record_header(raw, engine.identity.seed), before[RecordKind.BLOCK, block_hash]
            assert (after.segment, after.offset) != (old.segment, old.offset)
            for field in ("version", "tenant", "parent", "fingerprint", "created_ms", "expires_ms", "cost_us", "mac"):
                assert getattr(after, field) == getattr(old, field)


def test_version_1_expires_as_it_would_have(open_engine: OpenEngine, clock: Clock) -> None:
    engine = open_engine(block_ttl_s=100.0)
    engine.put(OLD.blocks())
    clock.advance(60)
    engine.put(NEW.blocks())
    clock.advance(60)
    engine.maintain()
    assert (OLD.check(engine), NEW.check(engine)) == (0, 4)
    assert {version for _, version in versions(engine)} == {1, 2}  # dead bytes, not yet compacted
    with engine.index.txn() as txn:
        assert [owner[:1] for owner in engine.index.owners(txn).values()] == [b"o"]


@pytest.mark.parametrize(("record_format", "plain"), [(0, []), (1, ["old"]), (2, ["old", "new"]), (3, [])])
async def test_a_caller_is_sent_plain_what_it_can_check(tmp_path: Path, record_format: int, plain: list[str]) -> None:
    servicer = KvStoreServicer(StorageEngine(KvStoreConfig(dir=str(tmp_path / "store"), budget_bytes=4 << 20)))
    server = await rpc.start_server("127.0.0.1:0", lambda target: register(servicer, target), [kvstore_pb2.DESCRIPTOR])
    store = RemoteStore(server.address)
    await store.put([*NEW.blocks(), *OLD.blocks()])
    try:
        for name, prompt in (("new", NEW), ("old", OLD)):
            request = kvstore_pb2.GetRequest(
                kind=kvstore_pb2.RECORD_KIND_BLOCK,
                hashes=join_hashes(prompt.hashes),
                fingerprint=FINGERPRINT,
                record_format=record_format,
            )
            call = store.stub.Get(request)
            messages = [message async for message in call]
            assert all(bool(message.records) == (name in plain) for message in messages)
            assert not any(message.seals for message in messages)
            into = prompt.buffers()
            assert await store.get_blocks(prompt.hashes, into, fingerprint=FINGERPRINT) == 4
            assert [bytes(b) for b in into] == [prompt.payload(i) for i in range(4)]
    finally:
        await store.close()
        await server.drain(0.2)
        await servicer.close()


async def test_a_caller_of_version_1_puts_pins_and_evicts_by_name(tmp_path: Path) -> None:
    """The caller's messages have version 1: a tenant name, and neither owner nor seal."""
    engine = StorageEngine(KvStoreConfig(dir=str(tmp_path / "store"), budget_bytes=4 << 20))
    servicer = KvStoreServicer(engine)
    server = await rpc.start_server("127.0.0.1:0", lambda target: register(servicer, target), [kvstore_pb2.DESCRIPTOR])
    store = RemoteStore(server.address)
    try:
        await store.put([OLD.block(i, tenant=b"acme") for i in range(4)])
        records = [kvstore_pb2.RecordName(kind=kvstore_pb2.RECORD_KIND_BLOCK, hash=OLD.hashes[0])]
        for tenant, count in (("other", 0), ("", 0), ("acme", 1)):
            pinned = await store.stub.Pin(kvstore_pb2.PinRequest(records=records, duration_s=9, tenant=tenant))
            assert pinned.num_pinned == count
        evicted = await store.stub.Evict(kvstore_pb2.EvictRequest(records=records, tenant="acme"))
        assert evicted.num_evicted == 4
        with pytest.raises(InvalidRequest):
            await store.put([OLD.block(0, tenant=b"x" * 45)])
    finally:
        await store.close()
        await server.drain(0.2)
        await servicer.close()


def test_inspect_names_whom_it_can(open_engine: OpenEngine, tmp_path: Path) -> None:
    engine = open_engine()
    geometry = KVGeometry.from_config({"num_hidden_layers": 2})
    said = Fingerprint(
        weights_revision="w", geometry=geometry, kv_format=KVFormat.FP8, tokenizer="t", family=Family.V4, num_cards=2
    )
    engine.register(said.digest, BLOCK, {}, statement=said.statement)
    with pytest.raises(InvalidRequest, match="statement"):
        engine.register(FINGERPRINT, BLOCK, {}, statement=said.statement)
    for number, tenant in enumerate(("acme", "acme\x1fann", "other")):
        prompt = Prompt([number] * BLOCK, fingerprint=said.digest)
        engine.put([prompt.block(0, tenant=KEYRING.owner(tenant), generation=KEYRING.generation)])
    engine.put([OLD.block(0, tenant=b"named")])
    engine.close()
    store = tmp_path / "store"
    digest = {tenant: KEYRING.owner(tenant).hex() for tenant in ("acme", "acme\x1fann", "other")}
    shown = {holding.tenant: holding.version for holding in describe_store.inspect(store).holdings}
    assert shown == {
        f"digest:{digest['acme'][:32]}": 2,
        f"digest:{digest['other'][:32]}": 2,
        "digest:" + digest["acme\x1fann"]: 2,
        "named": 1,
    }
    report = describe_store.inspect(store, known=KnownNames(("acme",), Owners(KEYRING)))
    user = digest["acme\x1fann"][32:]
    assert {(h.tenant, h.user) for h in report.holdings} == {
        ("acme", ""), ("acme", f"digest:{user}"), (f"digest:{digest['other'][:32]}", ""), ("named", ""),
    }  # fmt: skip
    text = describe_store.render(report)
    rows = [line.split() for line in text.splitlines() if " block " in line]
    assert ["acme", f"digest:{user}"] in [row[1:3] for row in rows]
    assert {row[1]: row[10] for row in rows}["named"] == "1" and {row[1]: row[10] for row in rows}["acme"] == "2"
    assert sorted((h.tenant, h.generation) for h in report.holdings)[-1] == ("named", 0)
    assert {h.generation for h in report.holdings if h.version == 2} == {7} and {row[9] for row in rows} == {"7", "-"}
    assert "family deepseek_v4" in text and "num_cards 2" in text


def test_statements_and_footers_are_stepped_over(open_engine: OpenEngine, tmp_path: Path) -> None:
    """A later build may put these into segments of this version. No record before or after them is lost."""
    engine = open_engine()
    engine.put(NEW.blocks(2))
    for kind in (RecordKind.STATEMENT, RecordKind.FOOTER):
        draft = engine._drafter.drafts([NEW.block(0, kind=kind, ttl_s=0.0)], set())
        engine.segments.append(draft, engine.clock_ms())
    engine.put(NEW.blocks())
    engine.segments.append(
        engine._drafter.drafts([NEW.block(1, kind=RecordKind.FOOTER, ttl_s=0.0)], set()), engine.clock_ms()
    )
    engine.abandon()
    for index in ("kept", "lost"):
        if index == "lost":
            shutil.rmtree(tmp_path / "store" / "index")
        engine = open_engine()
        assert NEW.check(engine) == 4
        engine.segments.roll(engine.clock_ms())
        engine.space.compactor.compact_one(0.0)
        assert NEW.check(engine) == 4
        engine.close()
        assert check_store.fsck(tmp_path / "store").sound


def test_a_message_with_seals_is_one_that_protobuf_reads() -> None:
    from antefix.store.pieces import messages_of

    (raw,) = messages_of(b"payload", 3, sealed=b"s" * 168)
    message = kvstore_pb2.GetResponse.FromString(raw)
    assert (message.index, message.data, message.seals) == (3, b"payload", b"s" * 168)
    piece = unpack_get_response(raw)
    assert bytes(piece.data) == b"payload" and piece.message.seals == b"s" * 168  # type: ignore[union-attr]


def test_an_index_of_version_2_takes_short_entries_where_it_changes(tmp_path: Path) -> None:
    with tarfile.open(GOLDEN / "store-v2.tar.gz") as tar:
        tar.extractall(tmp_path, filter="data")
    engine = StorageEngine(KvStoreConfig(dir=str(tmp_path / "store"), budget_bytes=1 << 20))
    old, new = INDEX_ENTRY.size, INDEX_ENTRY_SHORT.size

    def lengths() -> dict[bytes, int]:
        with engine.index.txn() as txn, txn.cursor(db=engine.index.db["blocks"]) as cursor:
            return {bytes(key): len(value) for key, value in cursor}

    assert set(lengths().values()) == {old}
    engine.put(NEW.blocks())
    engine.pin([(RecordKind.BLOCK, NEW.hashes[1])], 60)
    assert [lengths()[block_hash] for block_hash in NEW.hashes] == [new, old, new, new]
    engine.pin([(RecordKind.BLOCK, name) for name in (RAW.hashes[0], NEW.hashes[1])], 0)
    assert lengths()[NEW.hashes[1]] == lengths()[RAW.hashes[0]] == new
    engine.note_use([(RecordKind.BLOCK, RAW.hashes[4])], [])
    engine.flush_touches()
    assert lengths()[RAW.hashes[4]] == new and lengths()[RAW.hashes[3]] == old
    assert (RAW.check(engine), NEW.check(engine)) == (5, 4)
    engine.close()
    assert check_store.fsck(tmp_path / "store").sound

"""A record without this deployment's seal is a miss, wherever it comes from, and the right record can replace it."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from antefix import rpc
from antefix.block import Labels
from antefix.record import Record, RecordKind
from antefix.secret import Keyring
from antefix.store.api import Store
from antefix.store.local_store import LocalStore
from antefix.store.remote_store import RemoteStore
from antefix.store_files.record_format import RECORD_HEADER_BYTES, payload_checksum
from antefix.store_files.record_header import SEALED_PART, SIGNED_PART, pack_record_header, unpack_record_header
from antefix.store_files.seal import Seals, sealed_part_of, signed_part
from antefix.v1 import kvstore_pb2
from antefix.window_pool.pool_format import pack, unpack
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.server import KvStoreServicer, register
from antefix_kvstore.storage_engine import StorageEngine
from tests.kvstore.small_store import BLOCK, FINGERPRINT, Prompt
from tests.waiting import until

pytestmark = pytest.mark.slow

KEYRING = Keyring(b"s" * 32, generation=2, older={1: b"o" * 32})
OWNER = KEYRING.owner("acme")
PROMPT = Prompt(list(range(BLOCK * 6)), payload_bytes=400_001)
SEALS = Seals(KEYRING)
Change = Callable[[Record], Record]


def sealed(record: Record) -> Record:
    return SEALS.seal(dataclasses.replace(record, tenant=OWNER))


@pytest.fixture
async def servicer(tmp_path: Path) -> AsyncIterator[KvStoreServicer]:
    config = KvStoreConfig(dir=str(tmp_path / "store"), budget_bytes=256 << 20, scrub_bytes_per_s=0)
    served = KvStoreServicer(StorageEngine(config))
    server = await rpc.start_server("127.0.0.1:0", lambda target: register(served, target), [kvstore_pb2.DESCRIPTOR])
    served.address = server.address  # type: ignore[attr-defined]
    yield served
    await server.drain(0.2)
    await served.close()


@pytest.fixture(params=["local", "records", "pieces"])
async def store(
    request: pytest.FixtureRequest, servicer: KvStoreServicer, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Store]:
    """A worker's client, for each of the three ways in which payloads reach it."""
    address = servicer.address  # type: ignore[attr-defined]
    if request.param == "pieces":
        monkeypatch.setattr("antefix_kvstore.payload_stream.can_go_plain", lambda *_: False)
    seals = Seals(KEYRING)
    local = request.param == "local"
    client: Store = (
        LocalStore(servicer.engine.config.dir, address, seals=seals) if local else RemoteStore(address, seals=seals)
    )
    client.seals = seals  # type: ignore[attr-defined]
    yield client
    await client.close()


async def restored(store: Store, tenant: bytes = OWNER) -> int:
    into = PROMPT.buffers()
    num_good = await store.get_blocks(PROMPT.hashes, into, fingerprint=FINGERPRINT, tenant=tenant)
    assert [bytes(b) for b in into[:num_good]] == [PROMPT.payload(i) for i in range(num_good)]
    return num_good


def other_secret(record: Record) -> Record:
    return Seals(Keyring(b"x" * 32, generation=2)).seal(record)


def other_payload(record: Record) -> Record:
    return dataclasses.replace(record, payload=bytes(record.payload)[::-1])


def other_field(**changes: object) -> Change:
    return lambda record: dataclasses.replace(record, **changes)  # type: ignore[arg-type]


def in_its_place(other: Record) -> Change:
    """A record that is valid under its own name is put under another one."""
    return lambda record: dataclasses.replace(
        other, kind=record.kind, hash=record.hash, parent=record.parent, position=record.position
    )


def swapped_layers(record: Record) -> Record:
    """The payload's layers lie one after the other; here the second half comes first."""
    payload, half = bytes(record.payload), len(record.payload) // 2
    return dataclasses.replace(record, payload=payload[half:] + payload[:half])


FORGERIES: dict[str, Change] = {
    "another block in its place": in_its_place(sealed(PROMPT.block(2))),
    "its checkpoint in its place": in_its_place(sealed(PROMPT.checkpoint(3))),
    "swapped layers": swapped_layers,
    "no seal": lambda record: dataclasses.replace(record, generation=0, salt=bytes(16), mac=bytes(16)),
    "version 1": lambda record: dataclasses.replace(record, version=1, tenant=b"acme"),
    "another secret": other_secret,
    "another payload": other_payload,
    "another salt": other_field(salt=b"x" * 16),
    "another owner": other_field(tenant=KEYRING.owner("mallory")),
    "another position": other_field(position=4 * BLOCK + 1),
    "another number of cards": other_field(labels=Labels(num_cards=2)),
    "another generation": other_field(generation=1),
    "a generation of the future": other_field(generation=3),
}


async def test_what_is_sealed_comes_back(store: Store) -> None:
    await store.put([*map(sealed, PROMPT.blocks()), sealed(PROMPT.checkpoint(5))])
    assert await restored(store) == 6
    checkpoint = await store.get(RecordKind.CHECKPOINT, PROMPT.hashes[5], fingerprint=FINGERPRINT, tenant=OWNER)
    assert checkpoint == PROMPT.payload(5, RecordKind.CHECKPOINT)
    assert store.seals.num_broken == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("forgery", FORGERIES)
async def test_what_is_forged_is_a_miss_and_is_replaced(store: Store, servicer: KvStoreServicer, forgery: str) -> None:
    """The attack: somebody who can reach the store puts a record with right checksums under a right name."""
    forged = FORGERIES[forgery](sealed(PROMPT.block(3)))
    await store.put([*map(sealed, PROMPT.blocks(3)), forged, *map(sealed, PROMPT.blocks()[4:])])
    assert await restored(store) == 3
    assert store.seals.num_broken > 0  # type: ignore[attr-defined]
    # The forgery was reported to the store, so the store accepts the right record.
    await until(lambda: servicer.engine.counters.forged)
    result = await store.put([sealed(PROMPT.block(3))])
    assert result.num_stored == 1
    assert await restored(store) == 6


async def test_a_record_sealed_for_another_owner_is_refused_to_this_one(store: Store) -> None:
    """A worker with one tenant's keys can seal only that tenant's records."""
    theirs = [SEALS.seal(dataclasses.replace(block, tenant=KEYRING.owner("mallory"))) for block in PROMPT.blocks()]
    await store.put(theirs)
    assert await restored(store) == 0


async def test_records_of_an_older_secret_are_read(store: Store) -> None:
    older = Seals(Keyring(b"o" * 32))
    owner = KEYRING.owner("acme", 1)
    await store.put([older.seal(dataclasses.replace(block, tenant=owner)) for block in PROMPT.blocks()])
    assert await restored(store, owner) == 6


@pytest.mark.parametrize("kind", [RecordKind.HANDOFF, RecordKind.POOLED])
async def test_what_the_services_memory_gives_is_checked_too(
    store: Store, servicer: KvStoreServicer, kind: RecordKind
) -> None:
    record = sealed(PROMPT.block(0, kind=kind))
    name = {"fingerprint": FINGERPRINT, "tenant": OWNER}
    await store.put([record])
    assert await store.get(kind, record.hash, **name) == record.payload
    servicer.pool.put(other_payload(record))
    assert await store.get(kind, record.hash, **name) is None
    # A handoff is put in a checkpoint's place, and the reverse.
    for other in (RecordKind.HANDOFF, RecordKind.POOLED):
        if other is not kind:
            servicer.pool.put(dataclasses.replace(record, kind=other))
            assert await store.get(other, record.hash, **name) is None


async def test_a_checkpoint_moves_between_memory_and_disk_with_its_seal(store: Store) -> None:
    record = sealed(PROMPT.checkpoint(0))
    await store.put([sealed(PROMPT.block(0)), record, dataclasses.replace(record, kind=RecordKind.POOLED)])
    for kind in (RecordKind.CHECKPOINT, RecordKind.POOLED):
        assert await store.get(kind, record.hash, fingerprint=FINGERPRINT, tenant=OWNER) == record.payload


def test_a_seal_survives_coding_encryption_and_compaction_without_the_secret(tmp_path: Path) -> None:
    config = KvStoreConfig(dir=str(tmp_path / "store"), budget_bytes=64 << 20, segment_bytes=4 << 20)
    engine = StorageEngine(config)
    engine.put([*map(sealed, PROMPT.blocks()), *Prompt([7] * BLOCK * 3, payload_bytes=400_000).blocks()])
    engine.segments.roll(engine.clock_ms())
    engine.evict([(RecordKind.BLOCK, Prompt([7] * BLOCK * 3).hashes[0])])
    assert engine.space.compactor.compact_one(0.05)
    for number, block_hash in enumerate(PROMPT.hashes):
        with engine.index.txn() as txn:
            entry = engine.index.entry(txn, RecordKind.BLOCK, block_hash)
        assert entry is not None
        raw = engine.segments.read(entry.segment, entry.offset, RECORD_HEADER_BYTES)
        header = unpack_record_header(raw, engine.identity.seed)
        assert SEALS.holds(
            raw[32:200],
            PROMPT.payload(number),
            kind=header.kind,
            block_hash=block_hash,
            fingerprint=FINGERPRINT,
            tenant=OWNER,
        )
    engine.close()


def test_a_segment_that_was_written_to_by_somebody_else_gives_nothing_forged(tmp_path: Path) -> None:
    """The attack: a payload is changed in the file, and both checksums are corrected."""
    config = KvStoreConfig(dir=str(tmp_path / "store"), budget_bytes=64 << 20)
    engine = StorageEngine(config)
    engine.put([*map(sealed, PROMPT.blocks(2))])
    with engine.index.txn() as txn:
        entry = engine.index.entry(txn, RecordKind.BLOCK, PROMPT.hashes[1])
    assert entry is not None
    path = engine.segments.path(entry.segment)
    raw = bytearray(path.read_bytes())
    body = slice(entry.offset + RECORD_HEADER_BYTES, entry.end)
    raw[body.start] ^= 1
    header = unpack_record_header(raw[entry.offset : body.start], engine.identity.seed)
    header = dataclasses.replace(header, payload_checksum=payload_checksum(raw[body]))
    raw[entry.offset : body.start] = pack_record_header(header, engine.identity.seed)
    path.write_bytes(raw)
    reader = type(engine.reader)(config.dir, seals=Seals(KEYRING))
    into = PROMPT.buffers(2)
    # a reader without seals cannot notice
    assert engine.reader.read_blocks(PROMPT.hashes[:2], into, fingerprint=FINGERPRINT).num_good == 2
    outcome = reader.read_blocks(PROMPT.hashes[:2], into, fingerprint=FINGERPRINT)
    assert (outcome.num_good, outcome.forged, outcome.suspects) == (1, [PROMPT.hashes[1]], [])
    reader.close()
    engine.close()


@pytest.mark.parametrize("place", [0, 40, 150, 170, 190, 255, 256, 300])
def test_every_byte_of_a_pooled_value_counts(place: int) -> None:
    record = sealed(PROMPT.checkpoint(0, payload=b"window state" * 10))
    value = pack(record)
    name = {"name": record.hash, "fingerprint": FINGERPRINT, "tenant": OWNER, "seals": SEALS}
    assert unpack(value, **name) == record.payload
    damaged = bytearray(value)
    damaged[place] ^= 1
    with pytest.raises(Exception, match=r"damaged|seal"):
        unpack(bytes(damaged), **name)


def test_signed_and_sealed_part_are_what_stands_in_the_header() -> None:
    record = sealed(PROMPT.checkpoint(2))
    value = bytearray(pack(record))
    assert value[164] == RecordKind.POOLED
    value[164] = RecordKind.CHECKPOINT
    assert value[SEALED_PART] == sealed_part_of(record) and value[SIGNED_PART] == signed_part(record)

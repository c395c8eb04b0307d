"""Tenants: quotas, pins, and encryption with one key per tenant."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from pathlib import Path

import pytest

from antefix.errors import ConfigError
from antefix.record import RecordKind, RefusalReason
from antefix.secret import Keyring
from antefix.store_files.encryption import KeyRing
from antefix.store_files.owners import Owners
from antefix.store_files.record_header import owner_row
from antefix.store_files.segment_reader import StoreReader
from antefix_kvstore.index_check import index_fault
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.storage_engine import StorageEngine
from antefix_kvstore.tenant_quota import Quotas
from tests.kvstore.small_store import BLOCK, FINGERPRINT, Clock, Prompt

OpenEngine = Callable[..., StorageEngine]


KEYRING = Keyring(b"s" * 32, generation=2, older={1: b"o" * 32})


@pytest.fixture(params=[2, 1], ids=["version 2", "version 1"])
def version(request: pytest.FixtureRequest) -> int:
    """The records' version. Records under tenant names are kept and limited like records under digests."""
    return request.param


@pytest.fixture
def secret_file(tmp_path: Path) -> str:
    path = tmp_path / "secret"
    path.write_text(f"2 {(b's' * 32).hex()}\n{(b'o' * 32).hex()}\n")
    return str(path)


def whose(tenant: str, version: int = 2) -> dict[str, object]:
    """The fields of a record of this tenant."""
    return {"tenant": KEYRING.owner(tenant) if version == 2 else tenant.encode(), "version": version}


def row(tenant: str, version: int = 2) -> bytes:
    return owner_row(version, KEYRING.owner(tenant) if version == 2 else tenant.encode())


def blocks_of(prompt: Prompt, tenant: str, version: int = 2) -> list:
    return [prompt.block(i, **whose(tenant, version)) for i in range(len(prompt.hashes))]


def test_a_tenant_over_its_quota_evicts_its_own(
    open_engine: OpenEngine, clock: Clock, secret_file: str, version: int
) -> None:
    extent = 256 + 1000
    engine = open_engine(tenant_quota_bytes=10 * extent, quotas=("big=1m",), secret_file=secret_file)
    others = Prompt([9] * BLOCK * 10, payload_bytes=1000)
    engine.put(blocks_of(others, "other", version))
    for number in range(5):
        clock.advance(1)
        prompt = Prompt([number] * BLOCK * 4, payload_bytes=1000)
        assert not engine.put(blocks_of(prompt, "small", version)).refused
        assert prompt.check(engine) == 4
    assert others.check(engine) == 10
    big = Prompt([7] * BLOCK * 50, payload_bytes=1000)
    assert not engine.put(blocks_of(big, "big", version)).refused
    too_long = Prompt([8] * BLOCK * 11, payload_bytes=1000)
    result = engine.put(blocks_of(too_long, "small", version))
    assert set(result.refused) == set(too_long.hashes)
    assert {refusal.reason for refusal in result.refused.values()} == {RefusalReason.QUOTA}
    assert others.check(engine) == 10


def test_a_quota_counts_what_a_tenant_has_under_all_its_names(open_engine: OpenEngine, secret_file: str) -> None:
    extent = 256 + 1000
    engine = open_engine(quotas=(f"a={10 * extent}",), secret_file=secret_file)
    prompts = [Prompt([number] * BLOCK * 4, payload_bytes=1000) for number in range(3)]
    named, older, newer = prompts
    engine.put(blocks_of(named, "a", version=1))
    engine.put([older.block(i, tenant=KEYRING.owner("a", 1)) for i in range(4)])
    assert sum(prompt.check(engine) for prompt in prompts) == 8
    assert not engine.put(blocks_of(newer, "a")).refused
    assert newer.check(engine) == 4 and sum(prompt.check(engine) for prompt in prompts) == 10


def test_without_the_secret_a_quota_goes_by_digest(open_engine: OpenEngine) -> None:
    extent = 256 + 1000
    engine = open_engine(quotas=(f"digest:{KEYRING.owner('a').hex()}={extent}", f"b={extent}"))
    for tenant, num_stored in (("a", 0), ("b", 2)):
        prompt = Prompt([ord(tenant)] * BLOCK * 2, payload_bytes=1000)
        engine.put(blocks_of(prompt, tenant))
        assert prompt.check(engine) == num_stored
    with pytest.raises(ConfigError, match="hex digits"):
        Quotas(KvStoreConfig(quotas=("digest:12=1m",)), Owners())


def test_a_tenant_cannot_pin_or_evict_anothers(open_engine: OpenEngine, version: int) -> None:
    engine = open_engine()
    prompt = Prompt([1] * BLOCK * 2)
    engine.put(blocks_of(prompt, "a", version))
    names = [(RecordKind.BLOCK, h) for h in prompt.hashes]
    assert engine.pin(names, 60, owner=row("b", version)) == 0
    assert engine.evict(names, owner=row("b", version)) == 0
    # A tenant whose name has the bytes of a digest is a different tenant.
    assert engine.pin(names, 60, owner=owner_row(3 - version, row("a", version)[1:])) == 0
    assert engine.pin(names, 60, owner=row("a", version)) == 2
    assert engine.evict(names, owner=row("a", version)) == 2


def names_in(engine: StorageEngine) -> dict[int, bytes]:
    """The owners that the index knows, which must agree with every other table."""
    assert index_fault(engine.index.directory) is None
    with engine.index.txn() as txn:
        return engine.index.owners(txn)


def test_a_tenant_without_records_has_no_name_and_its_number_is_nobody_elses(open_engine: OpenEngine) -> None:
    engine = open_engine()
    prompts = {f"user-{number}": Prompt([number] * BLOCK * 2) for number in range(50)}
    numbers = set()
    for tenant, prompt in prompts.items():
        engine.put([*blocks_of(prompt, tenant), prompt.checkpoint(1, **whose(tenant))])
        numbers |= names_in(engine).keys()
        if tenant != "user-7":
            engine.evict([(RecordKind.BLOCK, prompt.hashes[0])], owner=row(tenant))
    assert list(names_in(engine).values()) == [row("user-7")] and prompts["user-7"].check(engine) == 2
    assert len(numbers) == 50 and len(engine.totals()) == 3  # two kinds and one tenant
    engine.put(blocks_of(prompts["user-3"], "user-3"))
    engine.close()
    engine = open_engine()
    assert set(names_in(engine).values()) == {row("user-3"), row("user-7")}
    assert len(numbers | names_in(engine).keys()) == 51
    assert engine.evict([(RecordKind.BLOCK, prompts["user-3"].hashes[0])], owner=row("user-7")) == 0


def test_asking_about_a_tenant_gives_it_no_name(open_engine: OpenEngine, secret_file: str) -> None:
    engine = open_engine(quotas=("late=1k",), secret_file=secret_file)
    prompt = Prompt([1] * BLOCK * 2, payload_bytes=1000)
    engine.put(blocks_of(prompt, "a"))
    names = [(RecordKind.BLOCK, h) for h in prompt.hashes]
    assert (engine.pin(names, 60, owner=row("b")), engine.evict(names, owner=row("c"))) == (0, 0)
    assert engine.put(blocks_of(Prompt([2] * BLOCK * 2, payload_bytes=1000), "late")).refused
    assert list(names_in(engine).values()) == [row("a")] and prompt.check(engine) == 2


def test_names_that_an_earlier_version_left_go_when_the_store_is_opened(open_engine: OpenEngine) -> None:
    engine = open_engine()
    prompt = Prompt([1] * BLOCK)
    engine.put(blocks_of(prompt, "kept"))
    with engine.index.env.begin(write=True) as txn:
        db, number = engine.index.db, (2).to_bytes(4, "little")
        txn.put(b"tleft", number, db=db["names"])
        txn.put(b"T" + number, b"left", db=db["names"])
        txn.put(b"#T", number, db=db["names"])
        txn.put(b"t" + number, bytes(24), db=db["totals"])
    assert set(names_in(engine).values()) == {row("kept"), b"tleft"}
    engine.close()
    engine = open_engine()
    assert names_in(engine) == {1: row("kept")}
    engine.put(blocks_of(Prompt([2] * BLOCK), "new"))
    assert names_in(engine) == {1: row("kept"), 3: row("new")}


def test_numbers_that_run_out_refuse_new_tenants_and_keep_the_old(open_engine: OpenEngine) -> None:
    engine = open_engine()
    engine.put(blocks_of(Prompt([1] * BLOCK), "a"))
    with engine.index.env.begin(write=True) as txn:
        txn.put(b"#T", b"\xff" * 4, db=engine.index.db["names"])
    assert "numbers" in str(next(iter(engine.put(blocks_of(Prompt([2] * BLOCK), "b")).refused.values())))
    assert not engine.put(blocks_of(Prompt([3] * BLOCK), "a")).refused


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"a": secrets.token_hex(32), "b": secrets.token_hex(32)}))
    path.chmod(0o600)
    return path


def test_nothing_in_clear_reaches_an_encrypted_store(
    open_engine: OpenEngine, keys_file: Path, secret_file: str, tmp_path: Path, version: int
) -> None:
    engine = open_engine(keys_file=str(keys_file), secret_file=secret_file)
    prompt = Prompt([1] * BLOCK * 3)
    engine.put([*blocks_of(prompt, "a", version), prompt.checkpoint(2, **whose("a", version))])
    assert prompt.check(engine) == 3
    assert engine.read(RecordKind.CHECKPOINT, prompt.hashes[2], fingerprint=FINGERPRINT) == prompt.payload(
        2, RecordKind.CHECKPOINT
    )
    raw = b"".join(path.read_bytes() for path in (tmp_path / "store" / "segments").iterdir())
    assert all(prompt.payload(i)[64:128] not in raw for i in range(3))
    refused = engine.put(blocks_of(Prompt([2] * BLOCK), "nobody", version)).refused
    assert {refusal.reason for refusal in refused.values()} == {RefusalReason.NO_KEY}


def test_dropping_a_key_drops_the_tenants_data(
    open_engine: OpenEngine, keys_file: Path, secret_file: str, version: int
) -> None:
    engine = open_engine(keys_file=str(keys_file), secret_file=secret_file)
    mine, theirs = Prompt([1] * BLOCK * 3), Prompt([2] * BLOCK * 3)
    engine.put(blocks_of(mine, "a", version))
    engine.put(blocks_of(theirs, "b\x1fuser" if version == 2 else "b", version))
    engine.close()
    keys = json.loads(keys_file.read_text())
    del keys["a"]
    keys_file.write_text(json.dumps(keys))
    engine = open_engine(keys_file=str(keys_file), secret_file=secret_file)
    assert (mine.check(engine), theirs.check(engine)) == (0, 3)


def test_a_store_that_cannot_name_digests_drops_none(
    open_engine: OpenEngine, keys_file: Path, secret_file: str
) -> None:
    engine = open_engine(keys_file=str(keys_file), secret_file=secret_file)
    prompt = Prompt([1] * BLOCK * 3)
    engine.put(blocks_of(prompt, "a"))
    engine.close()
    engine = open_engine(keys_file=str(keys_file))
    assert engine.lookup(prompt.hashes, fingerprint=FINGERPRINT).num_blocks == 3
    engine.close()
    assert prompt.check(open_engine(keys_file=str(keys_file), secret_file=secret_file)) == 3


def test_another_key_opens_nothing_and_quarantines_nothing(
    open_engine: OpenEngine, keys_file: Path, secret_file: str
) -> None:
    engine = open_engine(keys_file=str(keys_file), secret_file=secret_file)
    prompt = Prompt([1] * BLOCK * 2)
    engine.put(blocks_of(prompt, "a"))
    stranger = StoreReader(
        engine.config.dir, decrypt=KeyRing({"a": bytes(32)}, Owners(KEYRING)).decrypt, clock_ms=engine.clock_ms
    )
    assert stranger.read_blocks(prompt.hashes, prompt.buffers(), fingerprint=FINGERPRINT).num_good == 0
    keyless = StoreReader(engine.config.dir, clock_ms=engine.clock_ms)
    outcome = keyless.read_blocks(prompt.hashes, prompt.buffers(), fingerprint=FINGERPRINT)
    assert (outcome.num_good, outcome.locked, outcome.suspects) == (0, True, [])
    stranger.close()
    keyless.close()
    assert prompt.check(engine) == 2
    assert engine.counters.corrupt == 0


def test_encrypted_records_survive_compaction(open_engine: OpenEngine, keys_file: Path, secret_file: str) -> None:
    engine = open_engine(keys_file=str(keys_file), secret_file=secret_file, segment_bytes=64 << 10)
    prompts = [Prompt([n] * BLOCK * 4, payload_bytes=5000) for n in range(12)]
    for prompt in prompts:
        engine.put(blocks_of(prompt, "a"))
    for prompt in prompts[::2]:
        engine.evict([(RecordKind.BLOCK, prompt.hashes[0])])
    while engine.space.compactor.compact_one(0.05) is not None:
        continue
    assert engine.space.counters.compacted_bytes > 0
    assert [prompt.check(engine) for prompt in prompts] == [0, 4] * 6


@pytest.mark.parametrize("content", ["", "[]", '{"a": "zz"}', '{"a": "00"}', '{"a": 5}'])
def test_a_bad_keys_file_is_a_clear_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError):
        KeyRing.from_file(path)


def test_a_keys_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text("{}")
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        KeyRing.from_file(path)

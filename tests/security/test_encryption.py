"""Encryption of stored records: one keys file, one key per tenant, and what a copied segment still reveals."""

import stat

import pytest

from antefix.errors import BlockCorrupt, ConfigError
from antefix.record import RecordKind
from antefix.secret import Keyring
from antefix.store_files.encryption import KEY_BYTES, KeyRing
from antefix.store_files.record_header import owner_row
from antefix.store_files.segment_reader import StoreReader
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.storage_engine import StorageEngine
from tests.kvstore.small_store import BLOCK, FINGERPRINT, Prompt

KEYRING = Keyring(b"s" * 32)
ONE, OTHER = b"1" * KEY_BYTES, b"2" * KEY_BYTES
CANARY = b"canary-of-a-payload-"


def key_file(tmp_path, *keys, name="store.key"):
    path = tmp_path / name
    path.write_text("".join(f"{len(keys) - at} {key.hex()}\n" for at, key in enumerate(keys)))
    return str(path)


def engine(tmp_path, **settings):
    config = KvStoreConfig(dir=str(tmp_path / "store"), budget_bytes=16 << 20, compression="off", **settings)
    return StorageEngine(config)


def prompts(tenant):
    prompt = Prompt(list(range(BLOCK * 4)))
    owner = KEYRING.owner(tenant)
    prompt.chain = type(prompt.chain)(FINGERPRINT, KEYRING.key(tenant), BLOCK)
    prompt.hashes = prompt.chain.extend(list(range(BLOCK * 4)))
    blocks = [prompt.block(index, tenant=owner) for index in range(4)]
    return prompt, [type(block)(**{**fields(block), "payload": CANARY * 200}) for block in blocks]


def fields(record):
    return {name: getattr(record, name) for name in type(record).__dataclass_fields__}


def read(store, prompt, tenant):
    into = [memoryview(bytearray(len(CANARY) * 200)) for _ in range(4)]
    found = store.reader.read_blocks(prompt.hashes, into, fingerprint=FINGERPRINT, tenant=KEYRING.owner(tenant))
    return found.num_good, bytes(into[0])


def all_bytes(tmp_path):
    return b"".join(path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file())


@pytest.mark.parametrize("encrypted", [False, True])
def test_a_copied_segment_shows_payloads_only_where_they_are_not_encrypted(encrypted, tmp_path):
    settings = {"encrypt_key_file": key_file(tmp_path, ONE)} if encrypted else {}
    store = engine(tmp_path, **settings)
    prompt, records = prompts("acme")
    assert not store.put(records).refused
    assert read(store, prompt, "acme") == (4, CANARY * 200)
    store.close()
    held = all_bytes(tmp_path)
    assert (CANARY in held) == (not encrypted)
    # Always readable: the names of blocks and their owners, as digests that cannot be reversed.
    assert prompt.hashes[0] in held
    assert KEYRING.owner("acme") in held
    assert b"acme" not in held


def test_each_tenant_has_a_key_of_its_own_and_a_record_is_bound_to_its_name():
    ring = KeyRing({}, masters=[ONE])
    mine, theirs = (owner_row(2, KEYRING.owner(tenant)) for tenant in ("mine", "theirs"))
    assert mine in ring
    assert ring._all(mine) != ring._all(theirs)
    # The users of one tenant share its key, as with a keys file.
    assert ring._all(owner_row(2, KEYRING.owner("mine\x1fuser"))) == ring._all(mine)


def test_the_key_changes_and_what_the_old_one_wrote_is_read_until_it_is_taken_out(tmp_path):
    prompt, records = prompts("acme")
    store = engine(tmp_path, encrypt_key_file=key_file(tmp_path, ONE))
    store.put(records)
    store.close()
    store = engine(tmp_path, encrypt_key_file=key_file(tmp_path, OTHER, ONE))
    assert read(store, prompt, "acme")[0] == 4
    later, more = prompts("beta")
    store.put(more)
    store.close()
    store = engine(tmp_path, encrypt_key_file=key_file(tmp_path, OTHER))
    assert read(store, later, "beta")[0] == 4
    assert read(store, prompt, "acme")[0] == 0
    store.close()


def test_without_the_key_or_with_another_one_everything_is_a_miss_and_nothing_wrong(tmp_path):
    prompt, records = prompts("acme")
    store = engine(tmp_path, encrypt_key_file=key_file(tmp_path, ONE))
    store.put(records)
    store.close()
    for decrypt in (None, KeyRing({}, masters=[OTHER]).decrypt):
        reader = StoreReader(tmp_path / "store", decrypt=decrypt)
        into = [memoryview(bytearray(len(CANARY) * 200)) for _ in range(4)]
        found = reader.read_blocks(prompt.hashes, into, fingerprint=FINGERPRINT, tenant=KEYRING.owner("acme"))
        assert found.num_good == 0
        assert CANARY not in bytes(into[0])
        reader.close()


def test_a_ciphertext_in_another_records_place_does_not_open(tmp_path):
    """An attacker swaps the stored bytes of two records of one tenant and computes the checksums again."""
    store = engine(tmp_path, encrypt_key_file=key_file(tmp_path, ONE))
    _, records = prompts("acme")
    store.put(records)
    headers = store.segments.scan(1, check_payloads=True)
    blocks = [header for header in headers if header.kind is RecordKind.BLOCK][:2]
    raw = store.segments.path(1).read_bytes()
    stored = [raw[h.offset + 256 : h.offset + 256 + h.stored_bytes] for h in blocks]
    keys = KeyRing({}, masters=[ONE])
    assert keys.decrypt(blocks[0], memoryview(stored[0])) == CANARY * 200
    with pytest.raises(BlockCorrupt):
        keys.decrypt(blocks[0], memoryview(stored[1]))
    store.close()


@pytest.mark.parametrize("text", ["", "zz", "00" * 16, "00" * 33, f"{'00' * 32}\n{'11' * 32}"])
def test_a_key_file_that_makes_no_sense_stops_the_start(text, tmp_path):
    path = tmp_path / "store.key"
    path.write_text(text)
    with pytest.raises(ConfigError, match="encrypt_key_file"):
        engine(tmp_path, encrypt_key_file=str(path))
    assert not (tmp_path / "store" / "segments").exists()


def test_a_key_file_that_is_missing_or_open_to_others_stops_the_start(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        engine(tmp_path, encrypt_key_file=str(tmp_path / "missing"))
    path = key_file(tmp_path, ONE)
    (tmp_path / "store.key").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        engine(tmp_path, encrypt_key_file=path)
    with pytest.raises(ConfigError, match="one of the two"):
        KvStoreConfig(encrypt_key_file=path, keys_file=path)


def test_every_file_of_a_store_is_its_owners_whatever_the_umask(tmp_path, open_umask):
    store = engine(tmp_path, usage_log_dir=str(tmp_path / "usage"))
    _, records = prompts("acme")
    store.put(records)
    store.close()
    modes = {
        path: stat.S_IMODE(path.stat().st_mode)
        for top in ("store", "usage")
        for path in [tmp_path / top, *(tmp_path / top).rglob("*")]
    }
    assert len(modes) > 8
    for path, mode in modes.items():
        assert mode == (0o700 if path.is_dir() else 0o600), path

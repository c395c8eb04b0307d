"""A store of every format version that was ever released opens, with its index and without."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import pytest

from antefix.record import RecordKind
from antefix.store_files.encryption import KeyRing
from antefix.store_files.owners import Owners
from antefix.store_files.record_format import FORMAT_VERSION, unpack_identity
from antefix.store_files.seal import Seals
from antefix.store_files.segment_reader import StoreReader
from antefix_kvstore import check_store as fsck
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.storage_engine import StorageEngine
from tests.kvstore.golden import CODED, GOLDEN, KEYRING, KEYS, RAW, SECRET


@pytest.mark.parametrize("version", range(1, FORMAT_VERSION + 1))
@pytest.mark.parametrize("index", ["kept", "lost"])
@pytest.mark.parametrize("variant", ["", "-encrypted"])
def test_a_golden_store_opens(tmp_path: Path, version: int, index: str, variant: str) -> None:
    with tarfile.open(GOLDEN / f"store-v{version}{variant}.tar.gz") as tar:
        tar.extractall(tmp_path, filter="data")
    store = tmp_path / "store"
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps(KEYS))
    keys.chmod(0o600)
    assert fsck.fsck(store).sound
    if index == "lost":
        shutil.rmtree(store / "index")
    secret = tmp_path / "secret"
    secret.write_text(f"3 {SECRET.hex()}\n")
    config = KvStoreConfig(
        dir=str(store), budget_bytes=1 << 20, keys_file=str(keys) if variant else "", secret_file=str(secret)
    )
    engine = StorageEngine(config)
    assert (RAW.check(engine), CODED.check(engine)) == (5, 3)
    found = engine.lookup(RAW.hashes, fingerprint=RAW.fingerprint)
    assert (found.checkpoints, found.block_bytes) == ((5,), 5 * 333)
    assert engine.read(RecordKind.CHECKPOINT, RAW.hashes[4], fingerprint=RAW.fingerprint) == RAW.payload(
        4, RecordKind.CHECKPOINT
    )
    # With the secret, the seals of the decoded, decrypted records are right. Version 1 has no seals.
    ring = KeyRing.from_file(keys, Owners(KEYRING)) if variant else None
    reader = StoreReader(store, decrypt=ring.decrypt if ring else None, seals=Seals(KEYRING), clock_ms=engine.clock_ms)
    for prompt, count in ((RAW, 5), (CODED, 3)):
        into = prompt.buffers(count)
        outcome = reader.read_blocks(prompt.hashes, into, fingerprint=prompt.fingerprint, tenant=KEYRING.owner("acme"))
        assert (outcome.num_good, bool(outcome.forged)) == ((count, False) if version > 1 else (0, True))
    reader.close()
    engine.close()
    assert unpack_identity((store / "STORE").read_bytes()).version == FORMAT_VERSION
    assert fsck.fsck(store).sound

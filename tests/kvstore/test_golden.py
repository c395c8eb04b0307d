"""A store of every format version that was ever released opens, with its index and without."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import pytest

from antefix.record import RecordKind
from antefix.store_files.record_format import FORMAT_VERSION
from antefix_kvstore import check_store as fsck
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.storage_engine import Engine
from tests.kvstore.golden import CODED, GOLDEN, KEYS, RAW


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
    config = KvStoreConfig(dir=str(store), budget_bytes=1 << 20, keys_file=str(keys) if variant else "")
    engine = Engine(config)
    assert (RAW.check(engine), CODED.check(engine)) == (5, 3)
    found = engine.lookup(RAW.hashes, fingerprint=RAW.fingerprint)
    assert (found.checkpoints, found.block_bytes) == ((5,), 5 * 333)
    assert engine.read(RecordKind.CHECKPOINT, RAW.hashes[4], fingerprint=RAW.fingerprint) == RAW.payload(
        4, RecordKind.CHECKPOINT
    )
    engine.close()

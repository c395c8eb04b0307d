"""Under `ulimit -v` the index uses a part of the free address space, or reports that it does not fit."""

import subprocess
import sys

import pytest

from antefix.errors import ConfigError
from antefix.store_files import index as index_module
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.storage_engine import StorageEngine

pytestmark = pytest.mark.services
OPEN = """
import resource, sys
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.storage_engine import StorageEngine
from tests.kvstore.small_store import FINGERPRINT
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
engine = StorageEngine(KvStoreConfig(dir=sys.argv[1], budget_bytes=1 << 44))
engine.register(FINGERPRINT, 16, {})
engine.close()
"""


def test_an_index_of_terabytes_opens_in_four_gigabytes_of_address_space(tmp_path):
    for _ in range(2):
        ran = subprocess.run([sys.executable, "-c", OPEN, tmp_path], capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr


def test_an_index_that_does_not_fit_is_not_made_again(tmp_path, monkeypatch):
    config = KvStoreConfig(dir=str(tmp_path), budget_bytes=64 << 20)
    StorageEngine(config).close()
    before = (tmp_path / "index" / "data.mdb").stat().st_ino

    def full(*_args, **_settings):
        raise index_module.lmdb.MemoryError("mdb_env_open: Cannot allocate memory")

    with monkeypatch.context() as patch, pytest.raises(ConfigError, match=r"address space .*ulimit -v"):
        patch.setattr(index_module.lmdb, "Environment", full)
        StorageEngine(config)
    assert (tmp_path / "index" / "data.mdb").stat().st_ino == before
    StorageEngine(config).close()

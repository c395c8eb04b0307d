"""A reader that was opened early continues to read when the index grows beyond the reader's first map."""

import subprocess
import sys

import pytest

from antefix.record import Record, RecordKind
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.storage_engine import StorageEngine

FINGERPRINT, ROOT = b"f" * 32, b"r" * 32
# 4,000 entries with their ranks and times take about 1.6 MiB of index.
NUM_RECORDS = 4000
READER = """
import sys
from antefix.store_files.segment_reader import StoreReader
reader = StoreReader(sys.argv[1])
chain = [i.to_bytes(32, "little") for i in range(1, int(sys.argv[2]) + 1)]
print(reader.lookup(chain, fingerprint=b"f" * 32).num_blocks, flush=True)
sys.stdin.readline()
print(reader.lookup(chain, fingerprint=b"f" * 32).num_blocks, flush=True)
"""


def records(first, last):
    names = [ROOT, *(i.to_bytes(32, "little") for i in range(1, last + 1))]
    return [
        Record(
            kind=RecordKind.BLOCK, hash=names[i], parent=names[i - 1], fingerprint=FINGERPRINT, position=i * 128,
            payload=b"x" * 64,
        )
        for i in range(first, last + 1)
    ]  # fmt: skip


@pytest.mark.services
def test_a_reader_opened_early_sees_a_large_index(tmp_path):
    engine = StorageEngine(KvStoreConfig(dir=str(tmp_path), budget_bytes=256 << 20, compression="off", durable=False))
    engine.put(records(1, 10))
    command = [sys.executable, "-c", READER, str(tmp_path), str(NUM_RECORDS)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout.readline() == "10\n"
        engine.put(records(11, NUM_RECORDS))
        assert (tmp_path / "index" / "data.mdb").stat().st_size > 1 << 20
        reader.stdin.write("\n")
        reader.stdin.flush()
        assert reader.stdout.readline() == f"{NUM_RECORDS}\n"
    engine.close()

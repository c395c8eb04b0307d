"""A store whose index was damaged on disk counts as a store without answers. Requests continue without it."""

import struct

import pytest

from antefix.errors import Unavailable
from antefix.record import Record, RecordKind
from antefix.store.local_store import LocalStore
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.storage_engine import StorageEngine

FINGERPRINT, ROOT = b"f" * 32, b"r" * 32
NAMES = [i.to_bytes(32, "little") for i in range(1, 1001)]
PAGE = 4096


@pytest.fixture
def directory(tmp_path):
    engine = StorageEngine(KvStoreConfig(dir=str(tmp_path), budget_bytes=64 << 20, compression="off", durable=False))
    parents = [ROOT, *NAMES]
    shared = {"kind": RecordKind.BLOCK, "fingerprint": FINGERPRINT, "payload": b"x" * 64}
    engine.put(
        [
            Record(hash=name, parent=parent, position=128 * number, **shared)
            for number, (name, parent) in enumerate(zip(NAMES, parents, strict=False), start=1)
        ]
    )
    engine.close()
    return tmp_path


def lose_the_way(path):
    """Have every branch of LMDB's trees name pages that are not there.

    A page's header: number u64, pad u16, flags u16 (1: branch), end of the pointers u16, then the pointers, u16 each,
    to nodes that begin with the child's page number in 48 bits.
    """
    data = bytearray(path.read_bytes())
    for page in range(2 * PAGE, len(data), PAGE):
        flags, lower = struct.unpack_from("<HH", data, page + 10)
        if flags == 1:
            for (pointer,) in struct.iter_unpack("<H", bytes(data[page + 16 : page + lower])):
                struct.pack_into("<IH", data, page + pointer, 0xFFFFFFFF, 0)
    with path.open("r+b") as file:
        file.write(data)


async def test_a_damaged_page_of_the_index_is_unavailable_and_no_other_error(directory):
    known = LocalStore(directory, "127.0.0.1:1")
    assert (await known.lookup(NAMES, fingerprint=FINGERPRINT)).num_blocks == len(NAMES)
    lose_the_way(directory / "index" / "data.mdb")
    # Rows that were read before are still valid, because no commit has followed.
    assert (await known.lookup(NAMES, fingerprint=FINGERPRINT)).num_blocks == len(NAMES)
    await known.close()
    store = LocalStore(directory, "127.0.0.1:1")
    try:
        with pytest.raises(Unavailable, match="cannot be read"):
            await store.lookup(NAMES, fingerprint=FINGERPRINT)
        with pytest.raises(Unavailable, match="cannot be read"):
            await store.fate(NAMES[0], fingerprint=FINGERPRINT)
        with pytest.raises(Unavailable, match="cannot be read"):
            await store.get_blocks(NAMES[:1], [memoryview(bytearray(64))], fingerprint=FINGERPRINT)
    finally:
        await store.close()

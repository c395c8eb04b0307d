"""Peers of the store, driven over stdin by benchmarks/store.py and run by their own Python (`make bench-peers`).

Each line holds one JSON command, and each answer is one JSON line. Payloads come from a file that both sides map. The
timings cover the library's work to make values durable, and to read them into the caller's buffers.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.store_limits import drop_cache


class LmdbValues:
    """Values in LMDB, with one transaction per batch. The commit syncs."""

    def __init__(self, directory: Path) -> None:
        import lmdb

        self.env = lmdb.open(str(directory), map_size=1 << 36, readahead=True)

    def close(self) -> None:
        self.env.close()

    def put(self, batch: list[tuple[bytes, memoryview]]) -> None:
        with self.env.begin(write=True) as txn:
            for key, value in batch:
                txn.put(key, value)

    def get(self, keys: list[bytes], into: list[np.ndarray]) -> None:
        with self.env.begin(buffers=True) as txn:
            for key, out in zip(keys, into, strict=True):
                out[:] = np.frombuffer(txn.get(key), np.uint8)


class RocksDB:
    """RocksDB with large values in blob files. The WAL is synced once per batch."""

    def __init__(self, directory: Path) -> None:
        import rocksdict

        options = rocksdict.Options(raw_mode=True)
        options.create_if_missing(True)
        options.set_enable_blob_files(True)
        options.set_min_blob_size(4096)
        options.set_compression_type(rocksdict.DBCompressionType.none())
        self.rocksdict = rocksdict
        self.db = rocksdict.Rdict(str(directory), options)
        self.synced = rocksdict.WriteOptions()
        self.synced.sync = True

    def close(self) -> None:
        self.db.flush()
        self.db.close()

    def put(self, batch: list[tuple[bytes, memoryview]]) -> None:
        writes = self.rocksdict.WriteBatch(raw_mode=True)
        for key, value in batch:
            writes.put(key, bytes(value))
        self.db.write(writes, self.synced)

    def get(self, keys: list[bytes], into: list[np.ndarray]) -> None:
        for key, out in zip(keys, into, strict=True):
            out[:] = np.frombuffer(self.db[key], np.uint8)


class DiskCache:
    """diskcache: a SQLite index, and one file per value.

    diskcache does not sync its files, so a sync of the file system follows.
    """

    def __init__(self, directory: Path) -> None:
        import diskcache

        self.cache = diskcache.Cache(str(directory), eviction_policy="none", size_limit=1 << 40)

    def close(self) -> None:
        self.cache.close()

    def put(self, batch: list[tuple[bytes, memoryview]]) -> None:
        with self.cache.transact():
            for key, value in batch:
                self.cache.set(key, bytes(value))
        os.sync()

    def get(self, keys: list[bytes], into: list[np.ndarray]) -> None:
        for key, out in zip(keys, into, strict=True):
            out[:] = np.frombuffer(self.cache[key], np.uint8)


class FilePerBlock:
    """One file per block, each synced. LMCache's and SGLang's disk tiers do the same, but do not sync."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(exist_ok=True)

    def close(self) -> None:
        """Closing does nothing, because no file stays open."""

    def put(self, batch: list[tuple[bytes, memoryview]]) -> None:
        for key, value in batch:
            fd = os.open(self.directory / key.hex(), os.O_WRONLY | os.O_CREAT, 0o644)
            os.write(fd, value)
            os.fdatasync(fd)
            os.close(fd)
        fd = os.open(self.directory, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)

    def get(self, keys: list[bytes], into: list[np.ndarray]) -> None:
        for key, out in zip(keys, into, strict=True):
            fd = os.open(self.directory / key.hex(), os.O_RDONLY)
            os.preadv(fd, [out], 0)
            os.close(fd)


class LMCacheDisk:
    """LMCache's local disk backend, called directly: one file per chunk, with 4 threads that write and 4 that read.

    The backend syncs nothing and checks nothing, so a sync of the file system follows each batch. The backend's index
    is only in memory, so the backend is not opened again for cold reads. Values are put and returned in the backend's
    own memory objects, without a copy to the caller.
    """

    def __init__(self, directory: Path) -> None:
        os.environ.setdefault("LMCACHE_LOG_LEVEL", "ERROR")
        import torch
        from lmcache.utils import CacheEngineKey
        from lmcache.v1.config import LMCacheEngineConfig
        from lmcache.v1.memory_allocators.host_memory_allocator import HostMemoryAllocator
        from lmcache.v1.memory_management import MemoryFormat
        from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend
        from lmcache.v1.storage_backend.local_disk_backend import LocalDiskBackend

        directory.mkdir(exist_ok=True)
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        config = LMCacheEngineConfig.from_defaults(
            local_disk=str(directory), max_local_disk_size=64.0, local_cpu=False, max_local_cpu_size=1.0
        )
        self.memory = LocalCPUBackend(config, memory_allocator=HostMemoryAllocator(2 << 30), dst_device="cpu")
        self.disk = LocalDiskBackend(config, self.loop, self.memory, dst_device="cpu")
        self.make = lambda nbytes: self.memory.allocate(torch.Size([nbytes]), torch.uint8, MemoryFormat.BINARY)
        self.key = lambda name: CacheEngineKey("model", 1, 0, int.from_bytes(name, "big"), torch.uint8)

    def close(self) -> None:
        """Does nothing. This peer's index is lost when its process ends, so the files cannot be opened again."""

    def put(self, batch: list[tuple[bytes, memoryview]]) -> None:
        left = threading.Semaphore(0)
        objects = []
        for _, value in batch:
            held = self.make(value.nbytes)
            np.frombuffer(held.byte_array, np.uint8)[:] = value
            objects.append(held)
        self.disk.batched_submit_put_task(
            [self.key(name) for name, _ in batch], objects, on_complete_callback=lambda _: left.release()
        )
        for held in objects:
            left.acquire()
            held.ref_count_down()
        os.sync()

    def get(self, keys: list[bytes], into: list[np.ndarray]) -> None:
        found = self.disk.batched_get_blocking([self.key(name) for name in keys])
        # Only the last value is copied, to be compared. Callers of LMCache use the memory objects themselves.
        into[-1][:] = np.frombuffer(found[-1].byte_array, np.uint8)
        for held in found:
            held.ref_count_down()


PEERS = {
    "lmdb_values": LmdbValues,
    "rocksdb": RocksDB,
    "lmcache_disk": LMCacheDisk,
    "diskcache": DiskCache,
    "file_a_block": FilePerBlock,
}
# The module that each peer needs and that is not in the standard library.
MODULES = {"lmdb_values": "lmdb", "rocksdb": "rocksdict", "lmcache_disk": "lmcache", "diskcache": "diskcache"}
# Peers that lose their index when they are closed, so they are not opened again.
FORGETFUL = ("lmcache_disk",)


def main(name: str, directory: Path, payloads: Path, num_blocks: int, block_bytes: int) -> None:
    values = np.memmap(payloads, np.uint8, "r", shape=(num_blocks, block_bytes))
    into = np.zeros((num_blocks, block_bytes), np.uint8)
    keys = [number.to_bytes(32, "big") for number in range(num_blocks)]
    peer: Any = PEERS[name](directory)
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "put":
            batch = [(keys[i], values[i].data) for i in range(num_blocks)]
            step = command["batch"]
            start = time.perf_counter()
            for first in range(0, num_blocks, step):
                peer.put(batch[first : first + step])
        else:
            if command["do"] == "cold":
                # Mapped pages, and values that a library caches itself, stay in memory unless the library is opened
                # again.
                if name not in FORGETFUL:
                    peer.close()
                drop_cache(directory)
                if name not in FORGETFUL:
                    peer = PEERS[name](directory)
            start = time.perf_counter()
            peer.get(keys, list(into))
        elapsed_s = time.perf_counter() - start
        right = command["do"] == "put" or bool(np.array_equal(into[-1], values[-1]))
        into[-1] = 0
        sys.stdout.write(json.dumps({"s": elapsed_s, "right": right}) + "\n")
        sys.stdout.flush()
    # A peer's threads must not keep the process alive.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))

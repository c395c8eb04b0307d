"""Peers of the store, driven over stdin by benchmarks/store.py and run by their own Python (`make bench-peers`).

One JSON command a line, one JSON answer a line. Payloads come from a file that both sides map. What is timed is what
each library does to make values durable, and to have them in the caller's buffers.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


class LmdbValues:
    """Values in LMDB, one transaction a batch; its commit syncs."""

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
    """RocksDB with large values in blob files, WAL synced once a batch."""

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
    """diskcache (SQLite index, file a value); its files are not synced, so a sync of the file system follows."""

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
    """A file a block, synced each: what LMCache's and SGLang's disk tiers do, made durable."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(exist_ok=True)

    def close(self) -> None:
        """Nothing is kept open."""

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


PEERS = {"lmdb_values": LmdbValues, "rocksdb": RocksDB, "diskcache": DiskCache, "file_a_block": FilePerBlock}


def drop_cache(directory: Path) -> None:
    """Have the kernel forget the files' pages, so that a read goes to the disk."""
    os.sync()
    for path in directory.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


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
                # Pages that are mapped, and what a library caches itself, stay unless it is opened anew.
                peer.close()
                drop_cache(directory)
                peer = PEERS[name](directory)
            start = time.perf_counter()
            peer.get(keys, list(into))
        elapsed_s = time.perf_counter() - start
        right = command["do"] == "put" or bool(np.array_equal(into[-1], values[-1]))
        sys.stdout.write(json.dumps({"s": elapsed_s, "right": right}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))

"""Where does a durable put lose speed, step by step from fio's best writer to the store?

Each round writes the same bytes in each of these ways, in random order, each way into new files that are kept until the
end of the round:

    fio             direct I/O, io_uring, 8 pieces of 1 MiB in flight, one fsync
    threads         the same from Python: 8 threads, space allocated in advance, one fdatasync
    synced          the same with a fdatasync per 56 MiB, as the store's batches have
    not_allocated   the same, but each write makes the file longer
    written_over    `synced` over a file that has all its blocks
    new_pages       through the page cache, with early writeback and a fdatasync per 56 MiB
    used_pages      the same right after a file of this size was deleted, whose pages are free again
    put_cached      the store's put through the page cache
    put             the store's put as it is

Figures are medians of each round's throughput over fio's (higher is better).

    python -m benchmarks.store_writes --rounds 5 --dir /var/tmp --json FILE
"""

from __future__ import annotations

import argparse
import itertools
import json
import mmap
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from antefix_kvstore.disk import Disk
from antefix_kvstore.storage_engine import StorageEngine
from benchmarks.fio_limits import fio_rate
from benchmarks.run_record import write
from benchmarks.spread import with_spread
from benchmarks.store import chain, config_of, put_all, records

MIB = 1 << 20
BLOCK_BYTES, NUM_BLOCKS = 449_824, 512
NBYTES, SYNC_BYTES = 224 * MIB, 56 * MIB
FIO = "fio_write_direct_8x1mib"
DEPTH, PIECE_BYTES, CACHED_BYTES = 8, MIB, 4 * MIB


class Ways:
    """Each method writes once and returns bytes per second."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._numbers = itertools.count()
        self._source = mmap.mmap(-1, NBYTES)
        self._source[:] = random.Random(1).randbytes(NBYTES)
        self._payloads = np.random.default_rng(1).integers(0, 256, (NUM_BLOCKS, BLOCK_BYTES), np.uint8)
        self._pool = ThreadPoolExecutor(DEPTH)

    def fio(self) -> float:
        place = self._directory / f"fio-{next(self._numbers)}"
        place.mkdir()
        return fio_rate(place, FIO, NBYTES)

    def threads(self) -> float:
        return self._direct(self._new(), NBYTES, allocates=True)

    def synced(self) -> float:
        return self._direct(self._new(), SYNC_BYTES, allocates=True)

    def not_allocated(self) -> float:
        return self._direct(self._new(), SYNC_BYTES, allocates=False)

    def written_over(self) -> float:
        path = self._new()
        self._direct(path, NBYTES, allocates=True)
        return self._direct(path, SYNC_BYTES, allocates=False)

    def new_pages(self) -> float:
        return self._cached(self._new())

    def used_pages(self) -> float:
        path = self._new()
        self._cached(path)
        path.unlink()
        return self._cached(path)

    def put_cached(self) -> float:
        return self._put(direct_bytes_min=NBYTES)

    def put(self) -> float:
        return self._put(direct_bytes_min=None)

    def _new(self) -> Path:
        return self._directory / f"file-{next(self._numbers)}"

    def _direct(self, path: Path, sync_bytes: int, *, allocates: bool) -> float:
        view = memoryview(self._source)
        started = time.perf_counter()
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
        for begin in range(0, NBYTES, sync_bytes):
            if allocates:
                Disk().allocate(fd, begin, sync_bytes)
            starts = range(begin, begin + sync_bytes, PIECE_BYTES)
            list(self._pool.map(lambda at: os.pwrite(fd, view[at : at + PIECE_BYTES], at), starts))
            os.fdatasync(fd)
        os.close(fd)
        return NBYTES / (time.perf_counter() - started)

    def _cached(self, path: Path) -> float:
        view, disk = memoryview(self._source), Disk()
        started = time.perf_counter()
        fd = disk.create(path)
        for at in range(0, NBYTES, CACHED_BYTES):
            disk.write(fd, [view[at : at + CACHED_BYTES]], at)
            disk.start_writeback(fd, at, CACHED_BYTES)
            if (at + CACHED_BYTES) % SYNC_BYTES == 0:
                disk.sync_data(fd)
        disk.close(fd)
        return NBYTES / (time.perf_counter() - started)

    def _put(self, direct_bytes_min: int | None) -> float:
        number = next(self._numbers)
        engine = StorageEngine(config_of(self._directory / f"store-{number}"))
        # The first batch makes buffers and threads.
        put_all(engine, records(chain(128, salt=1), self._payloads))
        if direct_bytes_min is not None:
            engine.segments.direct_bytes_min = direct_bytes_min
        wanted = records(chain(NUM_BLOCKS, salt=2 << 20), self._payloads)
        started = time.perf_counter()
        put_all(engine, wanted)
        took_s = time.perf_counter() - started
        engine.close()
        return self._payloads.nbytes / took_s


NAMES = (
    *("fio", "threads", "synced", "not_allocated", "written_over"),
    *("new_pages", "used_pages", "put_cached", "put"),
)


def one_round(directory: Path) -> dict[str, float]:
    """Bytes per second of each way."""
    with tempfile.TemporaryDirectory(prefix="antefix-bench-", dir=directory) as name:
        ways = Ways(Path(name))
        found = {}
        for way in random.sample(NAMES, len(NAMES)):
            call: Callable[[], float] = getattr(ways, way)
            found[way] = call()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, help="where to write 3 GB; a temporary directory by default")
    parser.add_argument("--json", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    rounds = [one_round(args.dir) for _ in range(args.rounds)]
    report: dict[str, Any] = {"bytes": NBYTES, "rounds": args.rounds}
    for way in NAMES:
        report[f"{way}_gb_per_s"] = statistics.median(each[way] for each in rounds) / 1e9
        report |= with_spread(f"{way}_over_fio", [each[way] / each["fio"] for each in rounds])
    print(json.dumps(report, indent=2))
    if args.json:
        write(args.json, report, "lmdb")


if __name__ == "__main__":
    main()

"""Measures the disk, the page cache and gRPC without a store. benchmarks/store.py compares with these limits."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from antefix.store_files.checked_copy import SUMS_BYTES, CheckedReads, rows_of
from antefix.store_files.record_format import RECORD_HEADER_BYTES

MIB = 1 << 20
# Pairs of requests in flight, one thread each, and MiB per request.
DIRECT_READERS = ((1, 4), (4, 1), (16, 1), (16, 4))
# Pairs of threads and blocks per call. The last has a thread per core, and calls as large as the store's own.
WARM_READERS = ((1, 1), (2, 1), (2, 9))
Array = Any


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def raw_write(path: Path, payloads: Array, batch_blocks: int) -> float:
    """Seconds to write a new file sequentially, with one fdatasync per batch. The batches are as large as those of the
    store.
    """

    def write() -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        for first in range(0, len(payloads), batch_blocks):
            os.pwrite(fd, payloads[first : first + batch_blocks].reshape(-1).data, first * payloads.shape[1])
            os.fdatasync(fd)
        os.close(fd)

    return seconds(write)


def direct_read(path: Path, *, depth: int, piece_bytes: int) -> float:
    """Seconds to read a file with direct I/O, which bypasses the page cache, with `depth` pieces in flight."""
    local = threading.local()
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)

    def read(offset: int) -> int:
        if not hasattr(local, "buffer"):
            local.buffer = mmap.mmap(-1, piece_bytes)
        return os.preadv(fd, [local.buffer], offset)

    size = path.stat().st_size
    with ThreadPoolExecutor(depth) as pool:
        elapsed_s = seconds(lambda: sum(pool.map(read, range(0, size, piece_bytes))))
    os.close(fd)
    return elapsed_s


def warm_read(
    path: Path, into: Array, *, depth: int, num_blocks: int, check: Callable[[Array], object] | None = None
) -> float:
    """Seconds of preadv from the page cache into the same warm buffers, with `num_blocks` blocks per call.

    The clock covers as little Python as possible: all reads are planned before the clock starts, and each thread takes
    the next read from one queue.

    check: called with each block, such as a checksum, which every reader that verifies must compute.
    """
    fd = os.open(path, os.O_RDONLY)
    views = [row.data for row in into]

    def read(first: int) -> None:
        rows = views[first : first + num_blocks]
        os.preadv(fd, rows, first * into.shape[1])
        if check is not None:
            for row in rows:
                check(row)

    elapsed_s = _shared_out(read, range(0, len(into), num_blocks), depth)
    os.close(fd)
    return elapsed_s


def one_pass_read(path: Path, into: Array, reads: CheckedReads, *, depth: int, num_blocks: int) -> float:
    """Seconds of the same reads through the store's machine code, which copies and hashes in one pass, without a store.
    Nothing is compared.
    """
    num, nbytes = into.shape
    fd = os.open(path, os.O_RDONLY)
    heads, sums = bytearray(num * RECORD_HEADER_BYTES), bytearray(num * SUMS_BYTES)
    # The code reads a header before each block. Here the bytes before a block serve as such.
    offsets = np.maximum(np.arange(num) * nbytes - RECORD_HEADER_BYTES, 0)
    head_at = np.arange(num) * RECORD_HEADER_BYTES
    rows = rows_of(offsets, np.full(num, nbytes), [row.data for row in into], heads, head_at, sums)
    assert rows is not None, "the buffers are aligned"

    def read(first: int) -> None:
        end = min(first + num_blocks, num)
        count = reads.read(fd, rows, first, end, 0, flags=0)
        assert count == end - first, f"{count} of {end - first} blocks were read"

    elapsed_s = _shared_out(read, range(0, num, num_blocks), depth)
    os.close(fd)
    return elapsed_s


def _shared_out(read: Callable[[int], None], firsts: Iterable[int], depth: int) -> float:
    """Seconds until `depth` threads have done all reads. Each thread takes the next one from one queue. If a read
    fails, no time is returned, because it would be that of fewer reads.
    """
    waiting, failures = deque(firsts), list[Exception]()

    def work() -> None:
        while True:
            try:
                first = waiting.popleft()
            except IndexError:
                return
            try:
                read(first)
            except (AssertionError, OSError) as error:
                failures.append(error)
                return

    def run() -> None:
        threads = [threading.Thread(target=work) for _ in range(depth - 1)]
        for thread in threads:
            thread.start()
        work()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]

    return seconds(run)


def drop_cache(directory: Path) -> None:
    """Tell the kernel to drop the files' pages from its cache, so that a read goes to the disk."""
    os.sync()
    for path in directory.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)

"""Measures how fast the store's disk reads, which decides whether compression pays. The measurement bypasses the page
cache if possible.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

PROBE_BYTES: Final = 32 << 20
_PIECE_BYTES: Final = 1 << 20
_NUM_IN_FLIGHT: Final = 4


def read_bytes_per_s(directory: Path) -> float:
    """Measure with a file of 32 MiB, which is deleted afterwards; the measurement takes tens of milliseconds.

    Raises:  OSError: no space for the file.
    """
    path = directory / ".probe"
    try:
        # Random bytes: some disks compress zeros away.
        path.write_bytes(os.urandom(_PIECE_BYTES) * (PROBE_BYTES // _PIECE_BYTES))
        fd = _open_past_cache(path)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            return max(_timed_read(fd) for _ in range(2))
        finally:
            os.close(fd)
    finally:
        path.unlink(missing_ok=True)


def _timed_read(fd: int) -> float:
    buffers = [mmap.mmap(-1, _PIECE_BYTES) for _ in range(_NUM_IN_FLIGHT)]

    def read_share(number: int) -> int:
        return sum(os.preadv(fd, [buffers[number]], offset) for offset in _offsets(number))

    with ThreadPoolExecutor(_NUM_IN_FLIGHT) as pool:
        start = time.perf_counter()
        nbytes = sum(pool.map(read_share, range(_NUM_IN_FLIGHT)))
        elapsed_s = time.perf_counter() - start
    for buffer in buffers:
        buffer.close()
    return nbytes / elapsed_s


def _offsets(number: int) -> Iterator[int]:
    yield from range(number * _PIECE_BYTES, PROBE_BYTES, _NUM_IN_FLIGHT * _PIECE_BYTES)


def _open_past_cache(path: Path) -> int:
    """Open with O_DIRECT where the file system supports it."""
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

"""Machine code that reads blocks and checks them in one pass: each byte is copied into place while it is hashed.

A piece of a block is read with preadv2 into a small buffer that stays in the core's own cache. From there it goes to
its place with stores that bypass the caches, and into the XXH3 checksum. So a block crosses the memory bus twice (from
the page cache, and to its place), where preadv and then XXH3 need more crossings. A map of the segment would save the
first copy as well, but a disk error or a truncated file would then kill the process (SIGBUS); preadv2 returns an error.

Only what the page cache has is read here. Blocks that would have to come from the disk are left to preadv, which reads
them in larger pieces. llvmlite, if it is installed, makes the code for this processor. Without it, `plain_reads` uses
preadv and xxhash.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import xxhash

from antefix.machine_code import MadeOnce
from antefix.store_files.record_format import CHECK_OFFSET, RECORD_HEADER_BYTES

log = logging.getLogger("antefix.store")

DIGEST_BYTES: Final = 16
# Per block: the digest of its payload, and its header's own checksum as an integer of 64 bits.
SUMS_BYTES: Final = DIGEST_BYTES + 8
# Shorter inputs are hashed by another function.
BLOCK_BYTES_MIN: Final = 2048
# What one preadv2 reads. On a core with 512 KiB of cache, blocks of 450 KB in pieces of 64, 128, 256 and 448 KiB were
# read at 0.87, 0.89, 0.94 and 0.97 of the speed of preadv alone. On a core with 1,280 KiB, 256 to 448 KiB are equal.
_PIECE_BYTES: Final = 448 << 10
# One row per block: offset of its record, address for its payload, bytes of payload, address for its header, address
# for its checksums.
ROW_WORDS: Final = 5
# Stores past the caches need aligned places.
ALIGN: Final = 16
# Sizes that are tried before the code is used: around a stripe, a block of the hash and a piece.
_TRIED_BYTES: Final = (2048, 2049, 3135, 3137, _PIECE_BYTES + 1024, _PIECE_BYTES + 1025, 2 * _PIECE_BYTES + 64)

Rows = npt.NDArray[np.int64]
_address_of: Final = ctypes.addressof
_byte_of: Final = ctypes.c_char.from_buffer


class CheckedReads:
    """Reads blocks through machine code. Thread-safe; each thread has a buffer of its own."""

    def __init__(self, read: Callable[..., int], owner: Any) -> None:
        """owner: keeps the machine code in memory."""
        self._read = read
        self._owner = owner
        self._local = threading.local()

    def read(self, fd: int, rows: Rows, first: int, end: int, seed: int, *, flags: int = os.RWF_NOWAIT) -> int:
        """Read the blocks of these rows. Returns how many were read until one could not be read completely; by default
        because the page cache does not have it.

        Shapes:  rows [N, ROW_WORDS], contiguous. All addresses must stay valid until this returns.
        seed: of the headers' checksums.
        Nothing is compared: the caller compares the checksums with those of the headers.
        """
        buffer = self._buffer()
        return int(self._read(fd, rows.ctypes.data + 8 * ROW_WORDS * first, end - first, buffer, flags, seed))

    def _buffer(self) -> int:
        if not hasattr(self._local, "address"):
            # A piece may be 1,024 bytes longer, so that the last one is not too short. The header is before the first,
            # and the code chooses where in the first 2,112 bytes it begins.
            kept = mmap.mmap(-1, _PIECE_BYTES + 4096)
            self._local.kept, self._local.address = kept, _address_of(_byte_of(kept))
        return int(self._local.address)


@functools.cache
def _code() -> MadeOnce[CheckedReads]:
    return MadeOnce(_tried_reads, log, "blocks are read without compiled code, which is slower")


def checked_reads() -> CheckedReads | None:
    """None if llvmlite is not installed, or if what it compiles is not XXH3 on this machine."""
    return _code().now()


def reads_if_ready() -> CheckedReads | None:
    """As `checked_reads`, which takes some 0.3 s, but made in another thread; None until it is ready."""
    return _code().if_ready()


def used_instead(reads: CheckedReads | None) -> contextlib.AbstractContextManager[None]:
    """In this context, all readers of this process use `reads`. For tests and benchmarks."""
    return _code().used_instead(reads)


def _tried_reads() -> CheckedReads:
    from antefix.store_files.checked_copy_code import compiled

    reads = CheckedReads(*compiled(_PIECE_BYTES))
    if wrong := [nbytes for nbytes in _TRIED_BYTES if not _is_right(reads, nbytes)]:
        raise RuntimeError(f"it read blocks of {wrong} bytes wrongly")
    return reads


def rows_of(
    offsets: Rows,
    sizes: Rows,
    into: Sequence[memoryview],
    heads: bytearray,
    head_at: Rows,
    sums: bytearray,
) -> Rows | None:
    """The rows for N records; None if a buffer is too small or not aligned. The buffers must live as long as the rows.

    Shapes:  offsets [N], of the records' headers in their segment.  sizes [N], of the buffers in bytes.
    head_at [N], where in `heads` the headers go.  sums [N * SUMS_BYTES].  Result [N, ROW_WORDS].
    """
    num = len(into)
    rows = np.empty((num, ROW_WORDS), np.int64)
    rows[:, 0] = offsets
    rows[:, 1] = [_address_of(_byte_of(buffer)) for buffer in into]
    rows[:, 2] = sizes
    rows[:, 3] = _address_of(_byte_of(heads)) + head_at
    rows[:, 4] = _address_of(_byte_of(sums)) + SUMS_BYTES * np.arange(num)
    is_possible = not (rows[:, 1] % ALIGN).any() and (rows[:, 2] >= BLOCK_BYTES_MIN).all()
    return rows if is_possible else None


def _is_right(reads: CheckedReads, nbytes: int) -> bool:
    """Whether a block of this size is copied and hashed rightly, to places of both alignments that the code tells
    apart.
    """
    record = np.arange(RECORD_HEADER_BYTES + nbytes, dtype=np.uint32).astype(np.uint8)
    room, header = np.zeros(nbytes + 3 * ALIGN, np.uint8), np.zeros(RECORD_HEADER_BYTES, np.uint8)
    sums, seed = np.zeros(SUMS_BYTES, np.uint8), (1 << 64) - nbytes
    wanted = xxhash.xxh3_128_digest(record[RECORD_HEADER_BYTES:].tobytes())
    wanted += xxhash.xxh3_64_intdigest(record[CHECK_OFFSET:RECORD_HEADER_BYTES].tobytes(), seed).to_bytes(8, "little")
    with os.fdopen(os.memfd_create("antefix-check"), "wb") as file:
        file.write(b"?" + record.tobytes())
        file.flush()
        for shift in (0, ALIGN):
            into = room[-room.ctypes.data % (2 * ALIGN) + shift :][:nbytes]
            into[:] = 0
            row = np.array([[1, into.ctypes.data, nbytes, header.ctypes.data, sums.ctypes.data]], np.int64)
            if reads.read(file.fileno(), row, 0, 1, seed, flags=0) != 1:
                return False
            if not np.array_equal(np.concatenate([header, into]), record) or sums.tobytes() != wanted:
                return False
    return True

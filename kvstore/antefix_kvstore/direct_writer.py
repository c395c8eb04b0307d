"""Writes large batches past the page cache, while the caller prepares the next piece. Knows descriptors, never records.

A write through the page cache needs a new page for every 4 KiB. Where memory was never used before, as in a virtual
machine whose host assigns it on first use, these pages cost more than the disk: 3 to 4 s of processor time per GB,
instead of 0.3 (docs/results/store.md). Direct I/O copies from a few buffers that are used again and again.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Final

import numpy as np
import numpy.typing as npt

from antefix.record import Buffer
from antefix_kvstore.disk import Disk

# Four pieces of 2 MiB in flight. Other choices, from 1 to 4 MiB and from 2 to 8 in flight, gave the same to 10%.
_PIECE_BYTES: Final = 2 << 20
_NUM_IN_FLIGHT: Final = 4
# The first piece of a batch is shorter, so that the disk begins sooner.
_FIRST_BYTES: Final = 512 << 10
# A piece is one huge page where the system has them: contiguous memory, which takes fewer requests to the disk.
_HUGE_PAGE_BYTES: Final = 2 << 20
# What a file system says that opens files for direct I/O but cannot write them in this way.
_CANNOT: Final = (errno.EINVAL, errno.EOPNOTSUPP)


class DirectWriter:
    """Writes batches of one file at a time. The object is not thread-safe; buffers and threads are made for the first
    batch.

    A batch: `begin`, `write` any number of times, `end`, `finish`.
    """

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._threads: ThreadPoolExecutor | None = None
        self._free: list[memoryview] = []
        self._flying: deque[tuple[Future[None], memoryview]] = deque()
        self._fd = self._direct_fd = -1
        self._piece: memoryview | None = None
        # Bytes in the piece, bytes that fit it, and where in the file it begins. The first two pieces of a batch may be
        # shorter, so that the others begin at multiples of their size.
        self._filled = self._room = self._offset = 0

    def begin(self, fd: int, offset: int, nbytes: int) -> bool:
        """Start a batch of `nbytes` at `offset`, both multiples of 4,096. False: the file system has no direct I/O.

        fd: open for writing, until `finish`.  Raises:  OSError: no space, or the batch before could not be written.
        """
        # The batch before may be part of the same commit, as in a compaction: its failure must not be lost.
        self.finish()
        self._fd, self._direct_fd = fd, self._disk.open_direct(fd)
        if self._direct_fd < 0:
            return False
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_NUM_IN_FLIGHT, thread_name_prefix="antefix-write")
            self._free = _pieces(_NUM_IN_FLIGHT + 1)  # one more, to be filled meanwhile
        # Writes that make a file longer wait for each other, so the file gets its new length first.
        self._disk.allocate(fd, offset, nbytes)
        self._offset = offset
        self._room = min(_FIRST_BYTES, _PIECE_BYTES - offset % _PIECE_BYTES)
        return True

    def write(self, buffers: Iterable[Buffer]) -> None:
        """Copy the buffers behind what was written before. The buffers may be used again afterwards.

        Raises:  OSError: an earlier piece could not be written.
        """
        for buffer in buffers:
            rest = memoryview(buffer).cast("B")
            while rest.nbytes:
                piece = self._next_piece() if self._piece is None else self._piece
                taken = min(rest.nbytes, self._room - self._filled)
                # numpy copies without the interpreter's lock, which the writing threads need for their next piece.
                np.copyto(_bytes(piece[self._filled : self._filled + taken]), _bytes(rest[:taken]))
                self._filled += taken
                rest = rest[taken:]
                if self._filled == self._room:
                    self._send()

    def end(self) -> None:
        """Send the last piece of a batch."""
        if self._filled:
            self._send()

    def finish(self) -> None:
        """Wait until the batch is written. The data is durable after a sync of the file. Without a batch, do nothing.

        Raises:  OSError: a piece could not be written, so parts of the batch are missing.
        """
        flying = [sent for sent, _ in self._flying]
        wait(flying)
        self._free += [piece for _, piece in self._flying]
        if self._piece is not None:
            self._free.append(self._piece)
        self._flying.clear()
        self._piece, self._filled = None, 0
        if self._direct_fd >= 0:
            self._disk.close(self._direct_fd)
            self._fd = self._direct_fd = -1
        for sent in flying:
            sent.result()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.finish()
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None

    def _next_piece(self) -> memoryview:
        if not self._free:
            sent, piece = self._flying.popleft()
            self._free.append(piece)
            sent.result()
        self._piece = self._free.pop()
        return self._piece

    def _send(self) -> None:
        assert self._piece is not None and self._threads is not None
        sent = self._threads.submit(self._write_piece, self._piece[: self._filled], self._offset)
        self._flying.append((sent, self._piece))
        self._offset += self._filled
        self._piece, self._filled = None, 0
        self._room = _PIECE_BYTES - self._offset % _PIECE_BYTES

    def _write_piece(self, piece: memoryview, offset: int) -> None:
        try:
            self._disk.write(self._direct_fd, [piece], offset)
        except OSError as err:
            if err.errno not in _CANNOT:
                raise
            self._disk.write(self._fd, [piece], offset)


def _bytes(part: memoryview) -> npt.NDArray[np.uint8]:
    return np.frombuffer(part, np.uint8)


def _pieces(count: int) -> list[memoryview]:
    """Buffers whose addresses direct I/O accepts."""
    # Private, because memory that may be shared with other processes gets no huge pages.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    area = mmap.mmap(-1, count * _PIECE_BYTES + _HUGE_PAGE_BYTES, flags=flags)
    with contextlib.suppress(OSError, AttributeError):
        area.madvise(mmap.MADV_HUGEPAGE)
    first = -ctypes.addressof(ctypes.c_char.from_buffer(area)) % _HUGE_PAGE_BYTES
    whole = memoryview(area)[first : first + count * _PIECE_BYTES]
    return [whole[start : start + _PIECE_BYTES] for start in range(0, len(whole), _PIECE_BYTES)]

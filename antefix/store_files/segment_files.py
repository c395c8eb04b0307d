"""Opens segment files for reading: a bounded cache of descriptors that closes deleted segments.

Segments never change in place, and a deleted segment stays readable while it is open. So an open descriptor is always
valid; holding it too long only keeps disk space in use.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from antefix.own_files import open_to_read
from antefix.store_files.record_format import segment_name

# Far below the usual limit of 1,024 descriptors per process.
NUM_OPEN_MAX: Final = 256
# How long the space of a deleted segment may stay taken by a reader.
SWEEP_S: Final = 1.0
# The most buffers that one preadv accepts.
_IOV_MAX: Final = 1024


class OpenFile:
    """An open file descriptor, and how many threads are using it."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.num_users = 0
        self.doomed = False


class SegmentFiles:
    """Descriptors by segment number. Thread-safe."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._files: OrderedDict[int, OpenFile] = OrderedDict()
        self._swept_s = time.monotonic()
        # Close the descriptors with their last user, because other threads may still be reading.
        weakref.finalize(self, _close_all, self._files).atexit = False

    @property
    def num_open(self) -> int:
        return len(self._files)

    @contextlib.contextmanager
    def use(self, segment: int) -> Iterator[int]:
        """A descriptor of the segment.

        Raises:  FileNotFoundError: the segment is gone; the index has moved on, look up again.
        """
        file = self.borrow(segment)
        try:
            yield file.fd
        finally:
            self.give_back(file)

    def sweep(self) -> None:
        """Close the descriptors of deleted segments, at most once per SWEEP_S; calling this often is cheap."""
        if time.monotonic() - self._swept_s >= SWEEP_S:
            self.let_go()

    def let_go(self) -> None:
        """Close deleted segments now."""
        with self._lock:
            self._swept_s = time.monotonic()
            for segment in [s for s, file in self._files.items() if os.fstat(file.fd).st_nlink == 0]:
                self._doom(segment)

    def close(self) -> None:
        with self._lock:
            for segment in list(self._files):
                self._doom(segment)

    def borrow(self, segment: int) -> OpenFile:
        """As `use`, but as two calls (begin and end), for callers with thousands of records. Raises the same errors."""
        with self._lock:
            file = self._files.get(segment)
            if file is None:
                path = self._directory / segment_name(segment)
                file = self._files[segment] = OpenFile(open_to_read(path))
                if len(self._files) > NUM_OPEN_MAX:
                    self._doom(next(iter(self._files)))
            self._files.move_to_end(segment)
            file.num_users += 1
            return file

    def give_back(self, file: OpenFile) -> None:
        with self._lock:
            file.num_users -= 1
            if file.doomed and file.num_users == 0:
                os.close(file.fd)

    def _doom(self, segment: int) -> None:
        file = self._files.pop(segment)
        file.doomed = True
        if file.num_users == 0:
            os.close(file.fd)


def _close_all(files: OrderedDict[int, OpenFile]) -> None:
    for file in files.values():
        os.close(file.fd)


def preadv_cached(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
    """Bytes read without waiting for the disk; fewer than requested if the page cache does not have all of them, or
    cannot tell.
    """
    try:
        return os.preadv(fd, buffers, offset, os.RWF_NOWAIT)
    except OSError:
        # EAGAIN: the first page is not there.  EOPNOTSUPP: a file system that cannot tell.
        return 0


def preadv_full(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
    """Like os.preadv, but for any number of buffers, and continued after a short read.

    Returns the number of bytes read, which is smaller than requested only at the end of the file.
    """
    total = 0
    for first in range(0, len(buffers), _IOV_MAX):
        part = buffers[first : first + _IOV_MAX]
        got = _preadv(fd, part, offset + total)
        total += got
        if got < sum(buffer.nbytes for buffer in part):
            break
    return total


def _preadv(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
    total = os.preadv(fd, buffers, offset)
    expected = sum(buffer.nbytes for buffer in buffers)
    if total == expected or total == 0:
        return total
    start = 0
    for buffer in buffers:
        at = max(total - start, 0)
        while at < buffer.nbytes:
            got = os.preadv(fd, [buffer[at:]], offset + start + at)
            if got == 0:
                return start + at
            at += got
        start += buffer.nbytes
    return start

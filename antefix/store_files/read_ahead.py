"""Lets the kernel's read-ahead grow before several threads read one stretch of a file.

The kernel reads ahead in steps that grow from one read to the next, and so do the pages in which it keeps what it has
read, from 4 KiB to 2 MiB. When two threads begin a stretch at the same time with large reads, each looks like random
access to the kernel. It then reads nothing ahead, and keeps the whole stretch in pages of 4 KiB: the disk gives about
half of its rate, and later reads from the page cache are slower as well. A few short reads, one after the other, make
the kernel see a sequence, which it then continues whatever the threads do.
"""

from __future__ import annotations

import os
import threading
from typing import Final

# The short reads, in bytes: 3.3 MiB in all. After them, the kernel has read ahead beyond the first large read.
SHORT_READS: Final = (16 << 10,) * 4 + (64 << 10,) * 4 + (256 << 10,) * 4 + (1 << 20,) * 2
# They take at most this part of a stretch, because only one thread reads meanwhile.
_PART_MAX: Final = 1 / 8
# In a shorter stretch, the short reads take longer than they save.
_STRETCH_BYTES_MIN: Final = 8 << 20


class Stretch:
    """Adjacent bytes of a file that several threads read, from `begin` to `end`. Thread-safe."""

    __slots__ = ("_begin", "_end", "_has_begun", "_lock")

    def __init__(self, begin: int, end: int) -> None:
        self._begin = begin
        self._end = end
        self._has_begun = False
        self._lock = threading.Lock()

    def begin(self, fd: int, offset: int) -> bool:
        """To be called before each read. The first caller that finds bytes on the disk, at the start of the stretch or
        at `offset`, makes the short reads there. Other callers wait for it.

        Returns False if the file cannot be read.
        """
        if self._has_begun or self._end - offset < _STRETCH_BYTES_MIN:
            return True
        with self._lock:
            return self._has_begun or self._read_shortly(fd, offset)

    def _read_shortly(self, fd: int, offset: int) -> bool:
        # The thread with the second read may be the first to come here.
        at = next((place for place in (self._begin, offset) if _is_on_disk(fd, place)), None)
        if at is None:
            return True
        room, last = memoryview(bytearray(max(SHORT_READS))), at + _PART_MAX * (self._end - at)
        try:
            for nbytes in SHORT_READS:
                if at + nbytes > last:
                    break
                os.preadv(fd, [room[:nbytes]], at)
                at += nbytes
        except OSError:
            return False
        # Set last: a thread that sees it reads at once.
        self._has_begun = True
        return True


def _is_on_disk(fd: int, offset: int) -> bool:
    """Whether the byte is not in the page cache. False if the file system cannot tell, or if the byte cannot be read:
    the read that follows shows the error.

    Only one byte is asked for: the kernel reads ahead even for a read that does not wait, and more for a longer one.
    """
    try:
        os.preadv(fd, [bytearray(1)], offset, os.RWF_NOWAIT)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False

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

# The short reads, in bytes: 1.3 MiB in all.
SHORT_READS: Final = (16 << 10,) * 4 + (64 << 10,) * 4 + (256 << 10,) * 4
# In a shorter stretch, the short reads take longer than they save.
_STRETCH_BYTES_MIN: Final = 8 << 20


class Stretch:
    """Adjacent bytes of a file that several threads read, up to `end`. Thread-safe."""

    __slots__ = ("_end", "_has_begun", "_lock")

    def __init__(self, end: int) -> None:
        self._end = end
        self._has_begun = False
        self._lock = threading.Lock()

    def begin(self, fd: int, offset: int) -> bool:
        """To be called before each read. The first caller whose bytes at `offset` are not in the page cache makes the
        short reads, and other callers wait for it.

        Returns False if the file cannot be read.
        """
        if self._has_begun or self._end - offset < _STRETCH_BYTES_MIN:
            return True
        with self._lock:
            if self._has_begun or not _is_on_disk(fd, offset):
                return True
            room = memoryview(bytearray(max(SHORT_READS)))
            try:
                for nbytes in SHORT_READS:
                    os.preadv(fd, [room[:nbytes]], offset)
                    offset += nbytes
            except OSError:
                return False
            # Set last: a thread that sees it reads at once.
            self._has_begun = True
        return True


def _is_on_disk(fd: int, offset: int) -> bool:
    """Whether the byte is not in the page cache; False if the file system cannot tell.

    Only one byte is asked for: the kernel reads ahead even for a read that does not wait, and more for a longer one.
    """
    try:
        os.preadv(fd, [bytearray(1)], offset, os.RWF_NOWAIT)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False

"""Remembers what was written past the page cache, and reads it into the cache while nobody waits for the disk.

Most hits come within minutes of a put, and a read from the page cache is several times faster than one from the disk.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from pathlib import Path
from typing import Final

from antefix.own_files import open_to_read

# A put that comes during a step waits for it: 2 ms at 1 GB/s.
STEP_BYTES: Final = 2 << 20
# The newest bytes that may wait to be read; older ones stay on the disk alone.
_WAITING_BYTES_MAX: Final = 1 << 30


class FreshBytes:
    """The object is not thread-safe. written_bytes, read_bytes: bytes written past the page cache, and read into it,
    since the start.
    """

    def __init__(self) -> None:
        self.written_bytes = self.read_bytes = 0
        # (file, offset, bytes), oldest first.
        self._waiting: deque[tuple[Path, int, int]] = deque()
        self._waiting_bytes = 0

    def note(self, path: Path, offset: int, nbytes: int) -> None:
        self.written_bytes += nbytes
        self._waiting.append((path, offset, nbytes))
        self._waiting_bytes += nbytes
        while self._waiting_bytes > _WAITING_BYTES_MAX:
            self._waiting_bytes -= self._waiting.popleft()[2]

    def read_some(self) -> bool:
        """Read STEP_BYTES of the newest batch into the page cache. Returns False if nothing was left to be read."""
        if not self._waiting:
            return False
        path, offset, nbytes = self._waiting.pop()
        step = min(nbytes, STEP_BYTES)
        if nbytes > step:
            self._waiting.append((path, offset + step, nbytes - step))
        self._waiting_bytes -= step
        # The segment may be deleted, or the batch cut off again.
        with contextlib.suppress(OSError):
            fd = open_to_read(path)
            try:
                os.posix_fadvise(fd, offset, step, os.POSIX_FADV_WILLNEED)
                # This waits for the last byte, so that the next put finds no queue at the disk.
                self.read_bytes += step if os.pread(fd, 1, offset + step - 1) else 0
            finally:
                os.close(fd)
        return True

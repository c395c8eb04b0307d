"""Space on the file system that the ledger has before it needs it, so that nothing else can fill the disk under it.

It is allocated behind the end of the file that is written, without changing what the file holds or how long it is
(`fallocate` with FALLOC_FL_KEEP_SIZE): readers see nothing of it, and a write into it cannot find the disk full.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
from typing import Final

log = logging.getLogger("antefix_billing")

# Some 5,700 requests of 1.4 KB on a disk that has no other byte left.
RESERVE_BYTES: Final = 8 << 20
# On a small file system it takes no more than this part.
_SHARE_MAX: Final = 1 / 16
# A part of what is left of a nearly full disk is better than nothing; less than this is not worth a call.
_BYTES_MIN: Final = 16 << 10
# Allocated beyond the reserve, so that not every batch allocates.
_STEP_BYTES: Final = 1 << 20

_FALLOC_FL_KEEP_SIZE: Final = 1
_fallocate: Final = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
if _fallocate is not None:
    _fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def allocate(fd: int, offset: int, nbytes: int) -> None:
    """Blocks for bytes `offset` on, whatever the file's length, which stays as it is.

    Raises:  OSError: no space, or a file system that cannot do it (EOPNOTSUPP).
    """
    if _fallocate is None:
        raise OSError(errno.EOPNOTSUPP, "this C library has no fallocate")
    if _fallocate(fd, _FALLOC_FL_KEEP_SIZE, offset, nbytes):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


class LedgerReserve:
    """What is allocated behind the end of one ledger's open segment. nbytes: what is wanted."""

    def __init__(self, directory: str | os.PathLike[str], nbytes: int = RESERVE_BYTES) -> None:
        space = os.statvfs(directory)
        self.nbytes = min(nbytes, int(space.f_blocks * space.f_frsize * _SHARE_MAX))
        self.held_until = 0
        self._is_supported = True

    def moved(self) -> None:
        """Another file is written now, or this one was cut: nothing is known to be allocated."""
        self.held_until = 0

    def held(self, end: int) -> int:
        """Bytes allocated behind a file's end."""
        return max(0, self.held_until - end)

    def hold(self, fd: int, end: int) -> None:
        """See to it that `nbytes` behind `end` are allocated; as many as the disk has where it has fewer."""
        wanted = end + self.nbytes
        if self.held_until >= wanted or not self._is_supported:
            return
        nbytes = self.nbytes + _STEP_BYTES
        while nbytes >= _BYTES_MIN and end + nbytes > self.held_until:
            try:
                allocate(fd, end, nbytes)
            except OSError as err:
                if err.errno in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                    self._is_supported = False
                    log.warning(
                        "this file system cannot hold space for the ledger: %s; keep its disk from filling", err
                    )
                    return
                nbytes = self.nbytes if nbytes > self.nbytes else nbytes // 2
            else:
                self.held_until = end + nbytes
                return

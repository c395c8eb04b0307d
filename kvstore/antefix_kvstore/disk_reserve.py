"""Disk space set aside for the moment when the disk is full: LMDB copies pages before it frees any, so evicting records
needs space too. The reserve is a file, which is deleted when an eviction runs out of space, and made again later.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from pathlib import Path
from typing import Final

import lmdb

from antefix.own_files import put_aside

# The errors of a disk without space and of a file system quota that is used up.
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
_NEARLY_FULL_BYTES: Final = 8 << 20
RESERVE_FILE: Final = "RESERVE"
_BYTES_MIN: Final = 64 << 10
_BYTES_MAX: Final = 4 << 20
_BUDGET_SHARE: Final = 64


class DiskReserve:
    """A file of `nbytes` in the store's directory, which may or may not exist at present."""

    def __init__(self, directory: Path, budget_bytes: int) -> None:
        self._path = directory / RESERVE_FILE
        self.nbytes = max(_BYTES_MIN, min(_BYTES_MAX, budget_bytes // _BUDGET_SHARE))
        if self.held:
            # The file may have been made under another budget.
            self.nbytes = max(self.nbytes, min(_BYTES_MAX, self._path.stat().st_size))

    @property
    def held(self) -> bool:
        return self._path.is_file()

    def hold(self) -> bool:
        """Make the reserve file if it does not exist. Returns whether the reserve file exists now; on a full disk it
        cannot be made.
        """
        if self.held:
            return True
        put_aside(self._path)
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, self.nbytes)
        except OSError:
            self.release()
            return False
        finally:
            os.close(fd)
        return True

    def release(self) -> bool:
        """Give the reserve's space back to the file system. Returns whether there was any."""
        with contextlib.suppress(OSError):
            self._path.unlink()
            return True
        return False


def is_full(err: lmdb.Error | OSError, directory: Path) -> bool:
    """Whether the disk, LMDB's map of the index or a file system quota is full.

    LMDB reports a full disk as a plain error, and a page that was written only partly as an input/output error. So the
    file system itself is asked whether it is full.
    """
    if isinstance(err, OSError):
        return err.errno in _FULL
    if isinstance(err, lmdb.MapFullError) or "No space" in str(err):
        return True
    return "Input/output" in str(err) and shutil.disk_usage(directory).free < _NEARLY_FULL_BYTES

"""A lock on a directory, so that one process at a time may write to it.

The lock is on the directory itself and on a file in it. A lock on the file alone would not be enough: if the file is
deleted, a second process locks a new file of the same name. The file is locked too, because older versions know only
the lock on the file.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from antefix.own_files import put_aside


class DirectoryLock:
    """A held lock: from construction until `close`, or until the process ends."""

    def __init__(self, directory: Path, file_name: str) -> None:
        """Raises:  BlockingIOError: another process has the lock.  OSError: the directory or file cannot be opened."""
        self._directory = directory
        self._fds: list[int] = []
        try:
            self._take(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            put_aside(directory / file_name)
            self._take(os.open(directory / file_name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        except BaseException:
            self.close()
            raise

    def _take(self, fd: int) -> None:
        self._fds.append(fd)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    @property
    def is_held(self) -> bool:
        return bool(self._fds)

    @property
    def is_of_the_present(self) -> bool:
        """Whether the locked directory is still the one at its path. False: the directory was renamed, deleted or
        replaced.
        """
        try:
            return self.is_held and os.path.samestat(os.fstat(self._fds[0]), self._directory.stat())
        except OSError:
            return False

    def close(self) -> None:
        """Release the lock. Closing again does nothing."""
        while self._fds:
            os.close(self._fds.pop())

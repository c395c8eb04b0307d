"""The right to write a directory, which one process has at a time.

The lock is on the directory itself and on a file in it. The file can be deleted, and then a second process would lock
another file of the same name; the directory cannot be replaced without its content going, too. The file is locked for
versions that know nothing of the directory's lock.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from antefix.own_files import put_aside


class DirectoryLock:
    """Held from its making until `close`, or until the process ends."""

    def __init__(self, directory: Path, file_name: str) -> None:
        """Raises:  BlockingIOError: another process has it.  OSError: the directory or the file cannot be opened."""
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
        """False when the directory that we locked is no longer the one under its path."""
        try:
            return self.is_held and os.path.samestat(os.fstat(self._fds[0]), self._directory.stat())
        except OSError:
            return False

    def close(self) -> None:
        """Give it back; closing again does nothing."""
        while self._fds:
            os.close(self._fds.pop())

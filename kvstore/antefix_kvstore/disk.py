"""The file operations that durability needs, in one place, so that tests can simulate power loss and full disks.

All files that the engine writes go through a Disk, except the index, which LMDB writes. Reads do not go through a Disk,
because they change nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

# From fcntl.h: start writing dirty pages, without waiting.
_SYNC_FILE_RANGE_WRITE: Final = 2
_libc: Final = ctypes.CDLL(None, use_errno=True)
_sync_file_range: Final = getattr(_libc, "sync_file_range", None)
if _sync_file_range is not None:
    _sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)

_fallocate: Final = getattr(_libc, "fallocate", None)
if _fallocate is not None:
    _fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
# What a file system answers that cannot allocate space in advance.
_CANNOT_ALLOCATE: Final = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_O_DIRECT: Final = getattr(os, "O_DIRECT", 0)

# pwritev takes at most IOV_MAX buffers.
IOV_MAX: Final = 1024


class Disk:
    """The real disk. A write that returns is in the page cache; only `sync_data` and `sync_directory` make it
    durable.
    """

    def create(self, path: Path) -> int:
        """Create a new file, open for reading and writing.

        Raises:  FileExistsError.
        """
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def open(self, path: Path) -> int:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def open_direct(self, fd: int) -> int:
        """Open the file of `fd` once more, for writes that bypass the page cache; -1 where that is not possible."""
        if _O_DIRECT:
            with contextlib.suppress(OSError):
                return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | _O_DIRECT | os.O_CLOEXEC)
        return -1

    def close(self, fd: int) -> None:
        os.close(fd)

    def write(self, fd: int, buffers: Sequence[bytes | bytearray | memoryview], offset: int) -> None:
        """Write all buffers, one after the other, starting at `offset`.

        Raises:  OSError: part of the bytes may have been written; the caller truncates the file.
        """
        for first in range(0, len(buffers), IOV_MAX):
            part = [memoryview(buffer).cast("B") for buffer in buffers[first : first + IOV_MAX]]
            offset = self._write_part(fd, part, offset)

    def _write_part(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        while buffers:
            written = os.pwritev(fd, buffers, offset)
            offset += written
            while buffers and written >= buffers[0].nbytes:
                written -= buffers.pop(0).nbytes
            if written:
                buffers[0] = buffers[0][written:]
        return offset

    def allocate(self, fd: int, offset: int, nbytes: int) -> None:
        """Make the file long enough, with space on the disk where the file system can allocate it in advance.

        `os.posix_fallocate` would write zeros where it cannot.  Raises:  OSError: no space.
        """
        while _fallocate is not None and _fallocate(fd, 0, offset, nbytes):
            number = ctypes.get_errno()
            if number in _CANNOT_ALLOCATE:
                return
            if number != errno.EINTR:
                raise OSError(number, os.strerror(number))

    def start_writeback(self, fd: int, offset: int, nbytes: int) -> None:
        """Ask the kernel to begin writing these bytes to disk, so that the next sync has less to wait for.

        The request to the kernel is only a hint: it promises nothing, and does nothing if the C library has no such
        call.
        """
        if _sync_file_range is not None:
            _sync_file_range(fd, offset, nbytes, _SYNC_FILE_RANGE_WRITE)

    def truncate(self, fd: int, nbytes: int) -> None:
        os.ftruncate(fd, nbytes)

    def sync_data(self, fd: int) -> None:
        os.fdatasync(fd)

    def sync_directory(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def unlink(self, path: Path) -> None:
        path.unlink()

    def rename(self, source: Path, target: Path) -> None:
        """Rename a file. Durable only after `sync_directory`."""
        source.rename(target)

    def replace_file(self, path: Path, content: bytes) -> None:
        """Write a small file atomically: after a crash, either the whole file is there or nothing."""
        draft = path.with_suffix(".new")
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            self.write(fd, [content], 0)
            self.sync_data(fd)
        finally:
            self.close(fd)
        self.rename(draft, path)
        self.sync_directory(path.parent)

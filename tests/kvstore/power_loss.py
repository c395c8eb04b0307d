"""A disk that loses power: bytes that were written but not synced may survive, be torn, or be lost.

The files on the real disk are what a process sees (the page cache). `PowerLossDisk` also keeps the durable state: each
file's content at its last sync, the names at the last sync of their directory, and the writes since then.
`lose_power` rewrites the directory: of each file's unsynced writes any subset survives, sector by sector, and of the
unsynced names any subset is undone. A sector has 512 bytes, and the device writes a sector whole or not at all.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from antefix_kvstore.disk import Disk

SECTOR = 512


@dataclass
class _File:
    """synced: the durable content.  writes: (offset, bytes) of each later write; a truncation is (size, None)."""

    synced: bytes = b""
    writes: list[tuple[int, bytes | None]] = field(default_factory=list)
    named: bool = False


class PowerLossDisk(Disk):
    """The real disk, which also records what a power loss could undo."""

    def __init__(self) -> None:
        self.files: dict[Path, _File] = {}
        self._paths: dict[int, Path] = {}
        self._unlinked: dict[Path, _File] = {}

    def create(self, path: Path) -> int:
        fd = super().create(path)
        self.files[path] = _File()
        self._paths[fd] = path
        return fd

    def open(self, path: Path) -> int:
        fd = super().open(path)
        # Files of an earlier process are durable, because it ended by a power loss or a clean close.
        self.files.setdefault(path, _File(synced=path.read_bytes(), named=True))
        self._paths[fd] = path
        return fd

    def open_direct(self, fd: int) -> int:
        # Without O_DIRECT, because not every file system of tests has it. A write is as little durable either way.
        direct = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC)
        self._paths[direct] = self._paths[fd]
        return direct

    def allocate(self, fd: int, offset: int, nbytes: int) -> None:
        super().allocate(fd, offset, nbytes)
        self.files[self._paths[fd]].writes.append((offset, bytes(nbytes)))

    def close(self, fd: int) -> None:
        self._paths.pop(fd, None)
        super().close(fd)

    def write(self, fd: int, buffers: Sequence[bytes | bytearray | memoryview], offset: int) -> None:
        super().write(fd, buffers, offset)
        if fd in self._paths:
            whole = b"".join(bytes(buffer) for buffer in buffers)
            self.files[self._paths[fd]].writes.append((offset, whole))

    def truncate(self, fd: int, nbytes: int) -> None:
        super().truncate(fd, nbytes)
        self.files[self._paths[fd]].writes.append((nbytes, None))

    def sync_data(self, fd: int) -> None:
        if fd in self._paths:
            file = self.files[self._paths[fd]]
            file.synced, file.writes = self._paths[fd].read_bytes(), []

    def sync_directory(self, path: Path) -> None:
        for name, file in self.files.items():
            if name.parent == path:
                file.named = True
        self._unlinked = {name: file for name, file in self._unlinked.items() if name.parent != path}

    def unlink(self, path: Path) -> None:
        file = self.files.pop(path, None)
        self._unlinked[path] = file or _File(synced=path.read_bytes(), named=True)
        super().unlink(path)

    def lose_power(self, rng: random.Random) -> None:
        """Change the directory to a state that the next boot may find."""
        for path, file in self._unlinked.items():
            if file.named and rng.random() < 0.5:
                path.write_bytes(_survivor(file, rng))
        for path, file in self.files.items():
            # A file whose name was never synced may be lost with its content.
            if file.named or rng.random() < 0.5:
                path.write_bytes(_survivor(file, rng))
            else:
                path.unlink(missing_ok=True)


def _survivor(file: _File, rng: random.Random) -> bytes:
    """The durable content plus any subset of unsynced sectors. Sectors never written read as zeros or garbage."""
    content = bytearray(file.synced)
    for offset, written in file.writes:
        if written is None:
            if rng.random() < 0.5:
                content = content[:offset].ljust(min(len(content), offset), b"\0")
            continue
        size_survives = rng.random() < 0.7
        if size_survives:
            content.extend(bytes(max(0, offset + len(written) - len(content))))
        for start in range(0, len(written), SECTOR):
            end = min(offset + start + SECTOR, offset + len(written))
            if rng.random() < 0.5 and end <= len(content):
                content[offset + start : end] = written[start : start + SECTOR]
            elif rng.random() < 0.1 and end <= len(content):
                content[offset + start : end] = rng.randbytes(end - offset - start)
    return bytes(content)

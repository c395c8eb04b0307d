"""Takes a file's pages out of this process' memory while the file stays mapped.

The pages stay in the page cache, and the next access maps them again. So a process that walks through a large map needs
little memory, and need not close and map the file for that.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

_MAPS = Path("/proc/self/maps")


class MappedPages:
    """The maps that this process has of a file now. Maps that are made later are not known."""

    def __init__(self, path: Path) -> None:
        self._areas = list(_areas_of(path))

    def drop(self) -> bool:
        """Take the pages out of memory. Only for maps to which nobody writes. Returns False if the file is not mapped,
        or if the kernel refuses.
        """
        libc = ctypes.CDLL(None)
        sizes = [(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin)) for begin, end in self._areas]
        return bool(sizes) and all(libc.madvise(begin, nbytes, mmap.MADV_DONTNEED) == 0 for begin, nbytes in sizes)


def _areas_of(path: Path) -> list[tuple[int, int]]:
    """The first and last address of each map.

    Other files on the same device have other inode numbers. Overlays and btrfs show another device here than `stat`
    does, but the same inode number and path.
    """
    stat = path.stat()
    device, resolved = f"{os.major(stat.st_dev):02x}:{os.minor(stat.st_dev):02x}", str(path.resolve())
    try:
        text = _MAPS.read_text(errors="replace")
    except OSError:
        return []
    found = []
    # Paths may have characters at which `splitlines` would split.
    for line in text.split("\n"):
        # Addresses, rights, offset, device, inode, path.
        area, _, _, on, inode, name = [*line.split(maxsplit=5), *[""] * 6][:6]
        if inode == str(stat.st_ino) and (on == device or name == resolved):
            begin, end = area.split("-")
            found.append((int(begin, 16), int(end, 16)))
    return found

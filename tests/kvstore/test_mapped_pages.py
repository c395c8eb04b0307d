"""A rebuild drops the pages of its index's map, so that they do not fill its memory."""

from __future__ import annotations

import mmap
import os
import re
from pathlib import Path

from antefix_kvstore.mapped_pages import MappedPages

PAGES = 512


def mapped_kib(path: Path) -> int:
    """KiB of this file's maps that are in this process' memory now."""
    text = Path("/proc/self/smaps").read_text()
    return sum(map(int, re.findall(re.escape(str(path)) + r"\n(?:(?!\w+-\w+ ).*\n)*?Rss: +(\d+) kB", text)))


def test_dropped_pages_leave_memory_and_come_back_unchanged(tmp_path: Path) -> None:
    path, content = tmp_path / "data.mdb", os.urandom(mmap.PAGESIZE) * PAGES
    path.write_bytes(content)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert mapped[:] == content
        assert mapped_kib(path) >= PAGES * mmap.PAGESIZE >> 10
        pages = MappedPages(path)
        assert pages.drop()
        assert mapped_kib(path) == 0
        assert mapped[:] == content
        assert pages.drop()


def test_a_file_without_a_map_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "data.mdb"
    path.write_bytes(bytes(mmap.PAGESIZE))
    assert not MappedPages(path).drop()

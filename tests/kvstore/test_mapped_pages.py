"""A rebuild drops the pages of its index's map, so that they do not fill its memory."""

from __future__ import annotations

import mmap
import os
import re
from pathlib import Path

import pytest

from antefix_kvstore import mapped_pages
from antefix_kvstore.mapped_pages import MappedPages

PAGES = 512
pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="this system does not list its maps")


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


def test_a_map_is_found_where_the_system_shows_another_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on overlays and btrfs. Another file's path may have characters at which `splitlines` splits."""
    path, maps = tmp_path / "data.mdb", tmp_path / "maps"
    path.write_bytes(bytes(mmap.PAGESIZE * PAGES))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert not any(mapped[:])
        shown = re.sub(r"(?m)^(\S+ \S+ \S+) \S+", r"\1 00:ff", mapped_pages._MAPS.read_text())
        maps.write_text(f"{shown}7f0000000000-7f0000001000 r--p 00000000 00:ff 7   /a\x0cb\u2028c\n")
        monkeypatch.setattr(mapped_pages, "_MAPS", maps)
        assert MappedPages(path).drop()
        assert mapped_kib(path) == 0


def test_a_file_without_a_map_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "data.mdb"
    path.write_bytes(bytes(mmap.PAGESIZE))
    assert not MappedPages(path).drop()

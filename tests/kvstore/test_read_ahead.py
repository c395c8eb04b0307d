"""Short reads come before those of several threads, once per stretch that is read from the disk."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from antefix.store_files import read_ahead
from antefix.store_files.read_ahead import SHORT_READS, Stretch
from tests.waiting import AT_MOST_S

FD, OFFSET = 77, 4096
END = OFFSET + (32 << 20)


class Disk:
    """Stands for os.preadv. probe: what a read that does not wait raises; None: the page cache has the byte."""

    def __init__(self, probe: OSError | None = None, failure: OSError | None = None, cached_to: int = 0) -> None:
        self.probe, self.failure, self.cached_to = probe, failure, cached_to
        self.reads: list[tuple[int, int]] = []
        self.may_end = threading.Event()
        self.may_end.set()
        self.has_begun = threading.Event()

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        assert fd == FD
        if flags:
            if self.probe is not None and offset >= self.cached_to:
                raise self.probe
            return 1
        self.has_begun.set()
        assert self.may_end.wait(AT_MOST_S)
        if self.failure is not None:
            raise self.failure
        (buffer,) = buffers
        self.reads.append((offset, len(buffer)))
        return len(buffer)


def on(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> Disk:
    monkeypatch.setattr(os, "preadv", disk.preadv)
    return disk


def test_a_stretch_on_the_disk_begins_with_short_reads_once(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = on(Disk(BlockingIOError()), monkeypatch)
    stretch = Stretch(OFFSET, END)
    assert stretch.begin(FD, OFFSET)
    assert [nbytes for _, nbytes in disk.reads] == list(SHORT_READS)
    ends = [offset + nbytes for offset, nbytes in disk.reads]
    assert [offset for offset, _ in disk.reads] == [OFFSET, *ends[:-1]]
    assert stretch.begin(FD, OFFSET + (4 << 20))
    assert len(disk.reads) == len(SHORT_READS)


@pytest.mark.parametrize("probe", [None, OSError(errno.EOPNOTSUPP, "cannot tell")])
def test_no_short_reads_if_the_bytes_are_in_the_page_cache_or_nobody_can_tell(
    probe: OSError | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = on(Disk(probe), monkeypatch)
    assert Stretch(OFFSET, END).begin(FD, OFFSET)
    assert disk.reads == []


def test_a_stretch_whose_beginning_is_cached_begins_where_the_disk_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = on(Disk(BlockingIOError(), cached_to=OFFSET + (3 << 20)), monkeypatch)
    stretch = Stretch(OFFSET, END)
    assert stretch.begin(FD, OFFSET)
    assert disk.reads == []
    assert stretch.begin(FD, OFFSET + (4 << 20))
    assert disk.reads[0] == (OFFSET + (4 << 20), SHORT_READS[0])


def test_the_short_reads_are_at_the_start_whichever_thread_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = on(Disk(BlockingIOError()), monkeypatch)
    assert Stretch(OFFSET, END).begin(FD, OFFSET + (4 << 20))
    assert disk.reads[0] == (OFFSET, SHORT_READS[0])


def test_short_reads_are_a_small_part_of_a_stretch(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = on(Disk(BlockingIOError()), monkeypatch)
    assert Stretch(OFFSET, OFFSET + (8 << 20)).begin(FD, OFFSET)
    assert 0 < sum(nbytes for _, nbytes in disk.reads) <= 1 << 20


def test_a_short_stretch_has_no_short_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = on(Disk(BlockingIOError()), monkeypatch)
    assert Stretch(OFFSET, OFFSET + (7 << 20)).begin(FD, OFFSET)
    assert disk.reads == []


def test_a_file_that_cannot_be_read_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    on(Disk(BlockingIOError(), OSError(errno.EIO, "the disk failed")), monkeypatch)
    assert not Stretch(OFFSET, END).begin(FD, OFFSET)


def test_another_thread_waits_for_the_short_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    disk, stretch = on(Disk(BlockingIOError()), monkeypatch), Stretch(OFFSET, END)
    disk.may_end.clear()
    first = threading.Thread(target=stretch.begin, args=(FD, OFFSET))
    ended: list[int] = []

    def second() -> None:
        stretch.begin(FD, OFFSET + (4 << 20))
        ended.append(len(disk.reads))

    other = threading.Thread(target=second)
    first.start()
    assert disk.has_begun.wait(AT_MOST_S)
    other.start()
    other.join(0.05)
    assert other.is_alive()
    disk.may_end.set()
    first.join()
    other.join()
    assert ended == [len(SHORT_READS)]


def test_a_file_in_the_page_cache_is_not_on_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    fd = os.open(path, os.O_RDONLY)
    try:
        assert not read_ahead._is_on_disk(fd, 4096)
    finally:
        os.close(fd)

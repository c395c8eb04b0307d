"""Large batches are written past the page cache: the same bytes, the same promises, and readable from memory later."""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import os
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from antefix_kvstore.disk import Disk
from antefix_kvstore.fresh_bytes import STEP_BYTES, FreshBytes
from antefix_kvstore.group_commit import GroupCommitter
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.storage_engine import StorageEngine
from tests.kvstore.small_store import BLOCK, Prompt
from tests.waiting import AT_MOST_S, wait_until

MIB = 1 << 20


class DirectDisk(Disk):
    """A disk with direct I/O on any file system.

    fails: the error of each direct write at the offset `at` or behind it; with `once`, of one of them.
    """

    def __init__(self, *, opens: bool = True) -> None:
        self.opens = opens
        self.fails, self.at, self.once = 0, 0, False
        self.direct: set[int] = set()
        self.offsets: list[int] = []

    def open_direct(self, fd: int) -> int:
        if not self.opens:
            return -1
        self.direct.add(direct := os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC))
        return direct

    def close(self, fd: int) -> None:
        self.direct.discard(fd)
        super().close(fd)

    def write(self, fd: int, buffers: Sequence[bytes | bytearray | memoryview], offset: int) -> None:
        if fd in self.direct:
            if self.fails and offset >= self.at:
                number, self.fails = self.fails, 0 if self.once else self.fails
                raise OSError(number, os.strerror(number))
            assert offset % 4096 == 0 and all(memoryview(buffer).nbytes % 4096 == 0 for buffer in buffers)
            self.offsets.append(offset)
        super().write(fd, buffers, offset)


def _huge_pages_are_given() -> bool:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.exists() and "[never]" not in setting.read_text()


# Five blocks that fill several pieces and end inside one.
LARGE = Prompt([3] * BLOCK * 5, payload_bytes=MIB + 100)


@pytest.fixture
def disk() -> DirectDisk:
    return DirectDisk()


@pytest.fixture
def engine(tmp_path: Path, disk: DirectDisk) -> Iterator[StorageEngine]:
    engine = StorageEngine(KvStoreConfig(dir=str(tmp_path / "store"), budget_bytes=256 * MIB), disk=disk)
    engine.segments.direct_bytes_min = 4 * MIB
    yield engine
    engine.close()


def test_a_large_batch_is_written_past_the_page_cache_and_reads_the_same(
    engine: StorageEngine, disk: DirectDisk
) -> None:
    assert engine.put(LARGE.blocks()).num_stored == 5
    assert LARGE.check(engine) == 5
    # The first piece is short. The second one ends where the file's offset is a multiple of 2 MiB.
    assert sorted(disk.offsets) == [4096, 4096 + MIB // 2, 2 * MIB, 4 * MIB]
    assert engine.segments.fresh.written_bytes > 5 * MIB
    assert not disk.direct, "a descriptor stays open"


@pytest.mark.skipif(not _huge_pages_are_given(), reason="the system gives no huge pages")
def test_pieces_are_huge_pages(engine: StorageEngine) -> None:
    engine.put(LARGE.blocks())
    piece = engine.segments._direct._free[0]
    piece[:] = bytes(piece.nbytes)
    address = ctypes.addressof(ctypes.c_char.from_buffer(piece))
    maps = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    [area] = [each for each in maps[1:] if _has(each, address)]
    found = re.search(r"^AnonHugePages: +(\d+) kB", area, re.MULTILINE)
    assert found and int(found[1]) << 10 >= piece.nbytes


def _has(area: str, address: int) -> bool:
    first, end = (int(each, 16) for each in area.split(maxsplit=1)[0].split("-"))
    return first <= address < end


def test_a_small_batch_goes_through_the_page_cache(engine: StorageEngine, disk: DirectDisk) -> None:
    engine.put(Prompt([1] * BLOCK * 5).blocks())
    assert not disk.offsets and engine.segments.fresh.written_bytes == 0


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_refuses_direct_writes_gets_ordinary_ones(
    engine: StorageEngine, disk: DirectDisk, number: int
) -> None:
    disk.fails = number
    assert engine.put(LARGE.blocks()).num_stored == 5
    assert LARGE.check(engine) == 5


def test_a_file_system_without_direct_io_gets_ordinary_writes(engine: StorageEngine, disk: DirectDisk) -> None:
    disk.opens = False
    assert engine.put(LARGE.blocks()).num_stored == 5
    assert LARGE.check(engine) == 5 and engine.segments.fresh.written_bytes == 0


def test_a_full_disk_in_the_middle_of_a_batch_leaves_nothing_of_it(engine: StorageEngine, disk: DirectDisk) -> None:
    small = Prompt([1] * BLOCK * 2)
    engine.put(small.blocks())
    end = engine.segments.used_bytes
    disk.fails, disk.at = errno.ENOSPC, 2 * MIB
    assert set(engine.put(LARGE.blocks()).refused) == set(LARGE.hashes)
    assert engine.segments.used_bytes == end == sum(p.stat().st_size for p in engine.segments.directory.iterdir())
    disk.fails = 0
    assert engine.put(LARGE.blocks()).num_stored == 5
    assert (small.check(engine), LARGE.check(engine)) == (2, 5)
    assert not disk.direct


def test_a_batch_that_was_given_up_does_not_reach_the_next_one(engine: StorageEngine) -> None:
    drafts = engine._drafter.drafts(LARGE.blocks(), set())
    writer = engine.segments._direct
    engine.segments.make_way(8 * MIB, engine.clock_ms())
    # As after an exception between two groups: pieces on their way, and one half full.
    writer.begin(engine.segments._fd, 4096, 8 * MIB)
    writer.write([b"x" * (5 * MIB)])
    engine.segments.append(drafts, engine.clock_ms())
    engine.segments.sync()
    found = engine.segments.scan(engine.segments.active or 0, check_payloads=True)
    assert [header.hash for header in found] == LARGE.hashes


def test_a_failed_write_of_one_group_fails_the_whole_compaction(engine: StorageEngine, disk: DirectDisk) -> None:
    engine.put(LARGE.blocks())
    headers = list(engine.segments.scan(engine.segments.active or 0, check_payloads=False))
    # The copy begins a new segment. Four blocks are one group, the fifth is the next; the first group's last piece
    # fails.
    engine.segments.direct_bytes_min = MIB
    disk.fails, disk.at, disk.once = errno.EIO, 4 * MIB, True
    with pytest.raises(OSError, match="Input/output"):
        engine.space.compactor.copy(headers)
    assert not disk.fails and not disk.direct
    assert LARGE.check(engine) == 5
    assert engine.space.compactor.copy(headers) and LARGE.check(engine) == 5


def test_after_any_exception_no_piece_is_left_on_its_way(engine: StorageEngine, disk: DirectDisk) -> None:
    drafts = engine._drafter.drafts(LARGE.blocks(), set())
    engine.segments.make_way(8 * MIB, engine.clock_ms())
    end = engine.segments.used_bytes
    # Not C-contiguous, so its bytes cannot be taken: a bug of ours, which is no OSError.
    drafts[4] = dataclasses.replace(drafts[4], stored=memoryview(bytes(2 * (MIB + 100)))[::2], sealed=True)
    with pytest.raises(TypeError):
        engine.segments.append(drafts, engine.clock_ms())
    assert not disk.direct and engine.segments.used_bytes == end
    assert engine.segments.path(engine.segments.active or 0).stat().st_size == end


def test_an_interrupted_allocation_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = [errno.EINTR, errno.EINTR, 0]

    def fallocate(*_args: int) -> int:
        ctypes.set_errno(number := numbers.pop(0))
        return -1 if number else 0

    monkeypatch.setattr("antefix_kvstore.disk._fallocate", fallocate)
    Disk().allocate(0, 0, 4096)
    assert not numbers


def test_bytes_are_read_back_newest_batch_first(tmp_path: Path) -> None:
    path, gone = tmp_path / "file", tmp_path / "gone"
    path.write_bytes(bytes(3 * STEP_BYTES))
    fresh = FreshBytes()
    fresh.note(path, 0, STEP_BYTES + 1)
    fresh.note(gone, 0, STEP_BYTES)
    fresh.note(path, STEP_BYTES, STEP_BYTES)
    read = []
    while fresh.read_some():
        read.append(fresh.read_bytes)
    # The deleted file counts for nothing.
    assert read == [STEP_BYTES, STEP_BYTES, 2 * STEP_BYTES, 2 * STEP_BYTES + 1]
    assert fresh.written_bytes == 3 * STEP_BYTES + 1


def test_the_writer_reads_back_when_no_put_waits(engine: StorageEngine) -> None:
    writer = GroupCommitter(engine)
    assert writer.submit(LARGE.blocks()).result().num_stored == 5
    fresh = engine.segments.fresh
    wait_until(lambda: fresh.read_bytes >= fresh.written_bytes)
    writer.stop()
    assert fresh.read_bytes == fresh.written_bytes > 5 * MIB


def test_a_failure_to_read_back_does_not_end_the_writer(engine: StorageEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = threading.Event()

    def fail() -> bool:
        asked.set()
        raise ValueError("nobody expected this")

    monkeypatch.setattr(engine, "read_back", fail)
    writer = GroupCommitter(engine)
    assert asked.wait(AT_MOST_S)
    assert writer.submit(LARGE.blocks()).result(AT_MOST_S).num_stored == 5
    writer.stop()

"""Blocks that machine code reads are the same as without it, and what it cannot read is read by preadv."""

from __future__ import annotations

import ctypes
import dataclasses
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from antefix.machine_code import MadeOnce
from antefix.record import RecordKind
from antefix.store_files import checked_copy, plain_reads, shared_read
from antefix.store_files.checked_copy import (
    ALIGN,
    SUMS_BYTES,
    CheckedReads,
    Rows,
    checked_reads,
    rows_of,
    used_instead,
)
from antefix.store_files.record_format import CHECK_OFFSET, RECORD_HEADER_BYTES, SEGMENT_DIR, segment_name
from antefix.store_files.segment_files import OpenFile
from antefix.store_files.segment_reader import ReadOutcome
from antefix.store_files.shared_read import SharedRead
from antefix_kvstore.storage_engine import StorageEngine
from tests.kvstore.small_store import BLOCK, FINGERPRINT, Prompt

OpenEngine = Callable[..., StorageEngine]
NUM, PAYLOAD_BYTES = 40, 3136


class PythonReads(CheckedReads):
    """Does what the machine code does, and reads at most `num_max` blocks per call: others are not in the cache."""

    def __init__(self, num_max: int = 1 << 30) -> None:
        self.num_max = num_max
        self.num_read = 0

    def read(self, fd: int, rows: Rows, first: int, end: int, seed: int, *, flags: int = 0) -> int:
        num = min(end - first, self.num_max)
        for offset, into, nbytes, header, sums in rows[first : first + num].tolist():
            raw = os.pread(fd, RECORD_HEADER_BYTES + nbytes, offset)
            if len(raw) < RECORD_HEADER_BYTES + nbytes:
                return 0
            ctypes.memmove(header, raw, RECORD_HEADER_BYTES)
            ctypes.memmove(into, raw[RECORD_HEADER_BYTES:], nbytes)
            header_sum = xxhash.xxh3_64_intdigest(raw[CHECK_OFFSET:RECORD_HEADER_BYTES], seed)
            payload_sum = xxhash.xxh3_128_digest(raw[RECORD_HEADER_BYTES:])
            ctypes.memmove(sums, payload_sum + header_sum.to_bytes(8, "little"), SUMS_BYTES)
        self.num_read += num
        return num


@pytest.fixture(autouse=True)
def small_restores_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_reads, "_COMPILED_BYTES_MIN", 0)


@pytest.fixture(params=["python", "a part of each run", "machine code"])
def reads(request: pytest.FixtureRequest) -> Iterator[CheckedReads]:
    if request.param == "machine code":
        pytest.importorskip("llvmlite")
        compiled = checked_reads()
        assert compiled is not None, "what llvmlite compiled is not right on this machine"
        made = compiled
    else:
        made = PythonReads(*([2] if request.param != "python" else []))
    with used_instead(made):
        yield made


@pytest.fixture
def of() -> Prompt:
    return Prompt(list(range(BLOCK * NUM)), payload_bytes=PAYLOAD_BYTES)


def buffers(num: int = NUM, shift: int = 0) -> list[memoryview]:
    base = np.zeros(num * PAYLOAD_BYTES + 4 * ALIGN, np.uint8)
    base = base[-base.ctypes.data % (2 * ALIGN) + shift :][: num * PAYLOAD_BYTES]
    return [row.data for row in base.reshape(num, PAYLOAD_BYTES)]


def is_read(of: Prompt, into: list[memoryview], num: int = NUM) -> bool:
    return all(bytes(into[number]) == of.payload(number) for number in range(num))


@pytest.mark.parametrize("later_min", [8, 1 << 30])
def test_blocks_are_read_rightly_in_one_part_and_in_two(
    open_engine: OpenEngine, of: Prompt, reads: CheckedReads, later_min: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_reads, "_LOCATED_LATER_MIN", later_min)
    engine, into = open_engine(), buffers()
    engine.put(of.blocks()[:25])
    engine.put(of.blocks()[25:])
    outcome = engine.reader.read_blocks(of.hashes, into, fingerprint=FINGERPRINT)
    assert outcome == ReadOutcome(NUM, NUM * PAYLOAD_BYTES)
    assert is_read(of, into)
    if isinstance(reads, PythonReads):
        assert reads.num_read == NUM if reads.num_max > NUM else 0 < reads.num_read < NUM
    # A prefix of which only a part is stored, and one that is too short for it.
    for stored in (33, 9, 5):
        other = Prompt(list(range(stored, stored + BLOCK * NUM)), payload_bytes=PAYLOAD_BYTES)
        engine.put(other.blocks()[:stored])
        outcome = engine.reader.read_blocks(other.hashes, into, fingerprint=FINGERPRINT)
        assert outcome.num_good == stored
        assert is_read(other, into, stored)


def place_of(engine: StorageEngine, of: Prompt, number: int) -> tuple[Path, int]:
    """The segment that holds this block, and the offset of its record."""
    with engine.index.txn() as txn:
        entry = engine.index.entry(txn, RecordKind.BLOCK, of.hashes[number])
    assert entry is not None
    return engine.reader.directory / SEGMENT_DIR / segment_name(entry.segment), entry.offset


@pytest.mark.parametrize("number", [0, 9, 30, NUM - 1])
def test_a_damaged_block_is_found_and_named(
    open_engine: OpenEngine, of: Prompt, reads: CheckedReads, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_reads, "_LOCATED_LATER_MIN", 8)
    engine = open_engine()
    engine.put(of.blocks())
    path, offset = place_of(engine, of, number)
    for at in (60, RECORD_HEADER_BYTES, RECORD_HEADER_BYTES + PAYLOAD_BYTES - 1):
        raw = path.read_bytes()[offset + at]
        with path.open("r+b") as file:
            os.pwrite(file.fileno(), bytes([raw ^ 4]), offset + at)
            into = buffers()
            outcome = engine.reader.read_blocks(of.hashes, into, fingerprint=FINGERPRINT)
            os.pwrite(file.fileno(), bytes([raw]), offset + at)
        assert (outcome.num_good, outcome.suspects[0]) == (number, of.hashes[number])
        assert is_read(of, into, number)


def test_a_truncated_segment_is_a_miss_and_kills_nobody(
    open_engine: OpenEngine, of: Prompt, reads: CheckedReads
) -> None:
    engine = open_engine()
    engine.put(of.blocks())
    path, offset = place_of(engine, of, 20)
    with path.open("r+b") as file:
        file.truncate(offset + RECORD_HEADER_BYTES + 100)
    into = buffers()
    assert engine.reader.read_blocks(of.hashes, into, fingerprint=FINGERPRINT).num_good == 20
    assert is_read(of, into, 20)


@pytest.mark.parametrize("shift", [0, ALIGN])
def test_buffers_of_every_alignment_that_the_code_can_use_are_filled_by_it(
    open_engine: OpenEngine, of: Prompt, reads: CheckedReads, shift: int
) -> None:
    engine, into = open_engine(), buffers(shift=shift)
    engine.put(of.blocks())
    assert engine.reader.read_blocks(of.hashes, into, fingerprint=FINGERPRINT).num_good == NUM
    assert is_read(of, into)


def test_a_segment_that_goes_after_the_first_share_leaves_no_thread_waiting(
    open_engine: OpenEngine, of: Prompt, reads: CheckedReads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_reads, "_LOCATED_LATER_MIN", 8)
    engine, into = open_engine(), buffers()
    engine.put(of.blocks())
    files, num_borrowed = engine.reader.runs.files, 0
    borrow = files.borrow

    def borrow_or_fail(segment: int) -> OpenFile:
        nonlocal num_borrowed
        num_borrowed += 1
        if num_borrowed == 2:
            raise FileNotFoundError(segment)
        return borrow(segment)

    monkeypatch.setattr(files, "borrow", borrow_or_fail)
    # All blocks are read again one by one.
    assert engine.reader.read_blocks(of.hashes, into, fingerprint=FINGERPRINT) == ReadOutcome(NUM, NUM * PAYLOAD_BYTES)
    assert is_read(of, into)
    assert num_borrowed > 2
    assert all(file.num_users == 0 for file in files._files.values())


def test_a_thread_that_is_overtaken_by_the_others_does_not_wait_for_ever(open_engine: OpenEngine, of: Prompt) -> None:
    engine, into = open_engine(), buffers()
    engine.put(of.blocks())
    plain = engine.reader._plain
    part = plain.locate(of.hashes, into, fingerprint=FINGERPRINT, tenant=b"", now_ms=0, num_threads=2)
    runs = [plain_reads.Run(at, at + 1, int(segment)) for at, segment in enumerate(part.places.segment)]
    part = dataclasses.replace(part, runs=runs)
    shared = SharedRead(plain, engine.reader.seed, 2)
    waiting = shared._waiting

    class Overtaken:
        """The other thread reads all runs after this thread has counted them. Waiting for ever raises Empty."""

        put, get = waiting.put, waiting.get_nowait

        def qsize(self) -> int:
            found = waiting.qsize()
            shared.work()
            return found

    overtaken: Any = Overtaken()
    shared._waiting = overtaken
    shared.locate_and_work([part])
    assert shared.close() == (NUM, NUM * PAYLOAD_BYTES)
    assert is_read(of, into)


def test_blocks_that_no_thread_has_read_never_count(open_engine: OpenEngine, of: Prompt, reads: CheckedReads) -> None:
    engine, into = open_engine(), buffers()
    engine.put(of.blocks())
    plain = engine.reader._plain
    part = plain.locate(of.hashes, into, fingerprint=FINGERPRINT, tenant=b"", now_ms=0, num_threads=2)
    shared = SharedRead(plain, engine.reader.seed, 1)
    shared.add(part)
    shared.end()
    shared.stop()
    shared.work()
    assert shared.close() == (0, 0)


def test_a_thread_that_locates_lets_another_begin_but_does_not_wait_for_ever(
    open_engine: OpenEngine, of: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_read, "_BEGINS_S", 60)
    engine, into = open_engine(), buffers()
    engine.put(of.blocks())
    plain = engine.reader._plain
    part = plain.locate(of.hashes, into, fingerprint=FINGERPRINT, tenant=b"", now_ms=0, num_threads=2)
    shared = SharedRead(plain, engine.reader.seed, 2)
    shared.add(part)
    # The thread can begin only while this one waits.
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(shared.work)
        shared.let_another_begin()
        assert shared._has_begun
        shared.end()
        reading.result()
    assert shared.close() == (NUM, NUM * PAYLOAD_BYTES)
    # Nobody begins here.
    monkeypatch.setattr(shared_read, "_BEGINS_S", 0.001)
    SharedRead(plain, engine.reader.seed, 2).let_another_begin()


def test_the_last_runs_are_short_and_no_block_is_left_out() -> None:
    num, nbytes = 200, 449824
    offsets = np.arange(num) * (RECORD_HEADER_BYTES + nbytes)
    segments = np.repeat([1, 2], num // 2)
    runs = list(plain_reads._runs(plain_reads.Places(segments, offsets, np.full(num, nbytes)), 2))
    assert [at for run in runs for at in range(run.first, run.end)] == list(range(num))
    assert {(run.segment, segments[run.first], segments[run.end - 1]) for run in runs} == {(1, 1, 1), (2, 2, 2)}
    sizes = [run.end - run.first for run in runs]
    assert sizes[0] == 9
    assert sizes[-4:-1] == [2, 2, 2]
    assert sorted(sizes[-9:], reverse=True) == sizes[-9:]


def test_buffers_that_are_not_aligned_are_filled_without_machine_code(
    open_engine: OpenEngine, of: Prompt, reads: CheckedReads
) -> None:
    engine, into = open_engine(), buffers(shift=3)
    engine.put(of.blocks())
    heads = bytearray(NUM * RECORD_HEADER_BYTES)
    sizes = np.full(NUM, PAYLOAD_BYTES)
    assert rows_of(np.arange(NUM), sizes, into, heads, np.arange(NUM), bytearray(NUM * SUMS_BYTES)) is None
    assert engine.reader.read_blocks(of.hashes, into, fingerprint=FINGERPRINT).num_good == NUM
    assert is_read(of, into)


def test_the_code_hashes_and_copies_blocks_of_all_sizes() -> None:
    pytest.importorskip("llvmlite")
    compiled = checked_reads()
    assert compiled is not None
    random = np.random.default_rng(5)
    piece = checked_copy._PIECE_BYTES
    around = [whole + more for whole in (2048, 3072, piece, piece + 1024, 3 * piece) for more in (0, 1, 63, 64, 65)]
    for nbytes in (*around, *random.integers(2048, 2 * piece, 20).tolist()):
        assert checked_copy._is_right(compiled, nbytes), nbytes


def test_without_llvmlite_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    made = MadeOnce(lambda: pytest.fail("was made"), logging.getLogger(), "")
    assert made.if_ready() is None

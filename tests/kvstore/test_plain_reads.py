"""Checking many blocks at once gives the same answer as checking record by record."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from antefix.record import Record, RecordKind
from antefix.store_files import plain_reads
from antefix.store_files.plain_reads import PlainReads
from antefix.store_files.record_format import IndexEntry, short_fields, short_places
from antefix.store_files.seal import Seals
from antefix.store_files.segment_reader import ReadOutcome, StoreReader
from antefix_kvstore.storage_engine import StorageEngine
from tests.kvstore.small_store import BLOCK, FINGERPRINT, Clock, Prompt

OpenEngine = Callable[..., StorageEngine]
NUM = 12
HEADER_BYTES = 256


class OneKey:
    generation = 1

    def __init__(self, key: bytes) -> None:
        self._key = key

    def seal_key(self, owner: bytes, generation: int) -> bytes:
        return self._key


def prompt(payload_bytes: int) -> Prompt:
    return Prompt(list(range(BLOCK * NUM)), payload_bytes=payload_bytes)


def both_ways(
    monkeypatch: pytest.MonkeyPatch, reader: StoreReader, of: Prompt, *, fingerprint: bytes = FINGERPRINT
) -> tuple[ReadOutcome, bool]:
    """Read both ways, which must agree. Returns the outcome, and whether the blocks were checked at once."""
    whole: list[bool] = []
    is_right = PlainReads.is_right

    def noted(*args: object) -> bool:
        whole.append(is_right(*args))  # type: ignore[arg-type]
        return whole[-1]

    into = of.buffers()
    with monkeypatch.context() as patch:
        patch.setattr(PlainReads, "is_right", staticmethod(noted))
        found = reader.read_blocks(of.hashes, into, fingerprint=fingerprint)
    with monkeypatch.context() as patch:
        patch.setattr(plain_reads, "_RECORDS_MIN", 1 << 30)
        expected = reader.read_blocks(of.hashes, of.buffers(), fingerprint=fingerprint)
    assert found == expected
    assert [bytes(each) for each in into[: found.num_good]] == [of.payload(i) for i in range(found.num_good)]
    return found, any(whole) and found.num_good == len(of.hashes)


@pytest.mark.parametrize("payload_bytes", [1, 7, 8, 300, 4096])
def test_whole_prompts_are_taken_as_a_whole_whatever_their_padding(
    payload_bytes: int, open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, of = open_engine(), prompt(payload_bytes)
    # Several batches, so that there are gaps between runs of records.
    for first in (0, 5, 6):
        engine.put(of.blocks()[first : first + 6])
    outcome, whole = both_ways(monkeypatch, engine.reader, of)
    assert outcome.num_good == NUM
    assert whole
    assert outcome.bytes_read == NUM * payload_bytes


def test_any_flipped_byte_is_found(open_engine: OpenEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, of = open_engine(), prompt(12)
    engine.put(of.blocks())
    (path,) = (tmp_path / "store" / "segments").iterdir()
    raw = path.read_bytes()
    with engine.index.txn() as txn:
        entry = engine.index.entry(txn, RecordKind.BLOCK, of.hashes[7])
    assert entry is not None
    begin = entry.offset
    rng = random.Random(3)
    with path.open("r+b") as file:
        for at in range(begin, begin + HEADER_BYTES + 12):
            os.pwrite(file.fileno(), bytes([raw[at] ^ 1 << rng.randrange(8)]), at)
            into = of.buffers()
            outcome = engine.reader.read_blocks(of.hashes, into, fingerprint=FINGERPRINT)
            assert (outcome.num_good, outcome.suspects) == (7, [of.hashes[7]]), at - begin
            assert [bytes(each) for each in into[:7]] == [of.payload(i) for i in range(7)]
            os.pwrite(file.fileno(), raw[at : at + 1], at)
    assert both_ways(monkeypatch, engine.reader, of)[1]


def test_what_is_not_there_or_not_plain_is_read_one_by_one(
    open_engine: OpenEngine, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, of = open_engine(), prompt(40)
    blocks = of.blocks()
    engine.put([*blocks[:10], dataclasses.replace(blocks[10], ttl_s=5.0)])
    # 1. The last block is missing.
    assert both_ways(monkeypatch, engine.reader, of)[0].num_good == 11
    # 2. One block has expired.
    clock.advance(6)
    assert both_ways(monkeypatch, engine.reader, of)[0].num_good == 10
    # 3. Another model's fingerprint finds none of the blocks.
    assert both_ways(monkeypatch, engine.reader, of, fingerprint=b"G" * 32)[0].num_good == 0
    # 4. Pinned blocks have another form in the index.
    engine.put(blocks[10:])
    assert engine.pin([(RecordKind.BLOCK, of.hashes[4])], 60) == 1
    assert both_ways(monkeypatch, engine.reader, of) == (ReadOutcome(NUM, NUM * 40), True)
    # 5. A quarantined block ends the prefix.
    engine.quarantine((RecordKind.BLOCK, of.hashes[9]), judge=False)
    assert both_ways(monkeypatch, engine.reader, of)[0].num_good == 9


def test_records_of_another_version_or_coded_ones_follow_plain_ones(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, of = open_engine(), prompt(64)
    old = Prompt(list(range(BLOCK * NUM)), payload_bytes=64, version=1)
    engine.put([*of.blocks()[:9], *old.blocks()[9:]])
    outcome, _ = both_ways(monkeypatch, engine.reader, of)
    assert outcome == ReadOutcome(NUM, NUM * 64)


def test_a_forged_record_among_many_is_named(open_engine: OpenEngine, tmp_path: Path) -> None:
    ours, theirs = Seals(OneKey(b"s" * 32)), Seals(OneKey(b"t" * 32))
    engine, of = open_engine(), prompt(30)
    blocks: list[Record] = of.blocks()
    engine.put([(theirs if number == 9 else ours).seal(block) for number, block in enumerate(blocks)])
    reader = StoreReader(tmp_path / "store", seals=ours, index=engine.index)
    outcome = reader.read_blocks(of.hashes, of.buffers(), fingerprint=FINGERPRINT)
    assert (outcome.num_good, outcome.forged, ours.num_broken) == (9, [of.hashes[9]], 1)
    good = reader.read_blocks(of.hashes[:9], of.buffers(9), fingerprint=FINGERPRINT, tenant=blocks[0].tenant)
    others = reader.read_blocks(of.hashes[:9], of.buffers(9), fingerprint=FINGERPRINT, tenant=b"o" * 24)
    assert (good.num_good, others.num_good) == (9, 0)
    reader.close()


def test_a_segment_that_is_gone_or_short_is_a_miss(
    open_engine: OpenEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, of = open_engine(), prompt(500)
    engine.put(of.blocks())
    (path,) = (tmp_path / "store" / "segments").iterdir()
    end = path.read_bytes().find(of.payload(8))
    with path.open("r+b") as file:
        file.truncate(end + 100)
    assert both_ways(monkeypatch, engine.reader, of)[0].num_good == 8
    path.unlink()
    engine.reader.runs.files.close()
    assert both_ways(monkeypatch, engine.reader, of)[0].num_good == 0


def test_the_places_of_short_entries_are_their_fields() -> None:
    words = np.random.default_rng(3).integers(0, 1 << 64, (6, 50), dtype=np.uint64)
    fields = dict(zip((each.name for each in dataclasses.fields(IndexEntry)), short_fields(*words), strict=False))
    for name, column in zip(plain_reads._NEEDED, short_places(*words[:5]), strict=True):
        assert np.array_equal(column, fields[name]), name

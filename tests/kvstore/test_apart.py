"""Records whose parents are in another store are stored, found, kept, rebuilt and evicted like any other."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from antefix.record import Held, LookupResult, RecordKind, RefusalReason
from antefix_kvstore.check_store import fsck
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.storage_engine import StorageEngine
from tests.kvstore.small_store import BLOCK, FINGERPRINT, Clock, Prompt

PROMPT = Prompt(list(range(BLOCK * 30)))


def open_engine(directory: Path, **settings: object) -> StorageEngine:
    config = KvStoreConfig(dir=str(directory), budget_bytes=8 << 20, scrub_bytes_per_s=0, **settings)  # type: ignore[arg-type]
    return StorageEngine(config, clock_ms=Clock())


@pytest.fixture
def engine(tmp_path: Path) -> StorageEngine:
    return open_engine(tmp_path / "store")


def put(engine: StorageEngine, start: int, stop: int, *, elsewhere: bool = True) -> int:
    records = [PROMPT.block(index, parent_elsewhere=elsewhere) for index in range(start, stop)]
    return engine.put(records).num_stored


def held(engine: StorageEngine, start: int = 0) -> Held:
    return engine.held(PROMPT.hashes[start:], fingerprint=FINGERPRINT)


def lookup(engine: StorageEngine) -> LookupResult:
    return engine.lookup(PROMPT.hashes, fingerprint=FINGERPRINT)


def sound(engine: StorageEngine) -> None:
    directory = engine.reader.directory
    engine.close()
    report = fsck(directory)
    assert not report.problems, report.problems


def test_only_what_says_so_is_stored_without_its_parent(engine: StorageEngine) -> None:
    put(engine, 0, 1, elsewhere=False)
    refused = engine.put([PROMPT.block(10)]).refused
    assert [refusal.reason for refusal in refused.values()] == [RefusalReason.NO_PARENT]
    assert put(engine, 10, 14) == 4
    assert held(engine).spans == ((0, 1), (10, 14))
    sound(engine)


def test_a_prefix_is_never_promised_across_a_gap(engine: StorageEngine) -> None:
    put(engine, 10, 30)
    assert lookup(engine).num_blocks == 0
    put(engine, 0, 4)
    assert lookup(engine).num_blocks == 4
    put(engine, 4, 10)
    assert lookup(engine).num_blocks == 30
    assert PROMPT.check(engine) == 30
    sound(engine)


def test_a_part_of_a_chain_is_found_by_its_own_blocks(engine: StorageEngine) -> None:
    put(engine, 5, 9)
    assert held(engine, 6).spans == ((0, 3),)
    assert held(engine, 9).spans == ()
    sound(engine)


def test_a_checkpoint_is_stored_without_its_block(engine: StorageEngine) -> None:
    engine.put([PROMPT.checkpoint(7, parent_elsewhere=True)])
    assert held(engine) == Held(spans=(), checkpoints=(8,))
    payload = engine.read(RecordKind.CHECKPOINT, PROMPT.hashes[7], fingerprint=FINGERPRINT)
    assert payload == PROMPT.payload(7, RecordKind.CHECKPOINT)
    sound(engine)


@pytest.mark.parametrize("seed", range(6))
def test_any_order_of_coming_and_going_leaves_a_sound_store(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    engine = open_engine(tmp_path / "store")
    there: set[int] = set()
    for _ in range(25):
        start = chance.randrange(30)
        stop = min(30, start + chance.randrange(1, 8))
        if chance.random() < 0.6:
            put(engine, start, stop)
            there |= set(range(start, stop))
        elif chance.random() < 0.5:
            engine.evict([(RecordKind.BLOCK, PROMPT.hashes[start])])
            # The eviction also removes dependent records, perhaps without naming them. The remaining ones must be
            # readable.
            there = {index for index in there if _is_held(engine, index)}
            assert start not in there
        else:
            engine.abandon() if chance.random() < 0.5 else engine.close()
            engine = open_engine(tmp_path / "store")
        assert {index for index in range(30) if _is_held(engine, index)} == there
        leading = next(index for index in range(31) if index not in there)
        assert lookup(engine).num_blocks == leading == PROMPT.check(engine)
    sound(engine)


def _is_held(engine: StorageEngine, index: int) -> bool:
    return any(start <= index < stop for start, stop in held(engine).spans)


def test_a_rebuilt_index_has_them_all(tmp_path: Path) -> None:
    engine = open_engine(tmp_path / "store")
    put(engine, 20, 25)
    put(engine, 3, 8)
    engine.put([PROMPT.checkpoint(12, parent_elsewhere=True)])
    before = held(engine)
    engine.close()
    for path in (tmp_path / "store" / "index").iterdir():
        path.unlink()
    engine = open_engine(tmp_path / "store")
    assert held(engine) == before == Held(spans=((3, 8), (20, 25)), checkpoints=(13,))
    sound(engine)


def test_eviction_takes_what_stands_apart_from_its_end(tmp_path: Path) -> None:
    engine = open_engine(tmp_path / "store")
    put(engine, 10, 20)
    engine.space.evict(1)
    assert held(engine).spans == ((10, 19),)
    put(engine, 5, 10)
    while engine.space.evict(1):
        pass
    assert held(engine).spans == ()
    sound(engine)


def test_what_stood_apart_hangs_on_its_parent_when_it_is_healed(engine: StorageEngine) -> None:
    put(engine, 10, 11)
    put(engine, 9, 10)
    engine.quarantine((RecordKind.BLOCK, PROMPT.hashes[10]), judge=False)
    put(engine, 10, 11)
    engine.space.evict(1)
    # The parent is no longer a leaf, so its child is evicted first.
    assert held(engine).spans == ((9, 10),)
    sound(engine)

"""An index is rebuilt from the segments in bounded memory, whatever the order of their records."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from antefix.record import Record
from antefix_kvstore import index_rebuild
from antefix_kvstore.check_store import fsck
from antefix_kvstore.storage_engine import StorageEngine
from tests.kvstore.small_store import BLOCK, FINGERPRINT, Prompt

OpenEngine = Callable[..., StorageEngine]
PROMPTS = [Prompt([number] * BLOCK * 12, payload_bytes=64) for number in range(6)]


def shuffled(engine: StorageEngine, seed: int) -> None:
    """Move records to new segments in random order, as compactions may do. The old records stay as dead copies."""
    rng = random.Random(seed)
    headers = [
        header
        for number in sorted(engine.segments.sizes)
        for header in engine.segments.scan(number, check_payloads=False)
    ]
    rng.shuffle(headers)
    for first in range(0, len(headers), 9):
        engine.segments.roll(engine.clock_ms())
        engine.space.compactor.copy(headers[first : first + 9])
    engine.space.compactor.drop_dead()


def rebuilt(engine: StorageEngine, tmp_path: Path, open_engine: OpenEngine) -> StorageEngine:
    engine.abandon()
    shutil.rmtree(tmp_path / "store" / "index")
    return open_engine(budget_bytes=16 << 20)


@pytest.mark.parametrize("waiting", [10_000, 5, 0])
def test_records_in_any_order_come_back(
    open_engine: OpenEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waiting: int
) -> None:
    monkeypatch.setattr(index_rebuild, "_WAITING_MAX", waiting)
    monkeypatch.setattr(index_rebuild, "_GROUP_RECORDS", 7)
    monkeypatch.setattr(index_rebuild, "_CHUNK_RECORDS", 3)
    engine = open_engine(budget_bytes=16 << 20)
    for prompt in PROMPTS:
        engine.put([*prompt.blocks(), prompt.checkpoint(5), prompt.checkpoint(11)])
    shuffled(engine, seed=waiting)
    engine = rebuilt(engine, tmp_path, open_engine)
    assert [prompt.check(engine) for prompt in PROMPTS] == [12] * len(PROMPTS)
    for prompt in PROMPTS:
        assert engine.lookup(prompt.hashes, fingerprint=FINGERPRINT).checkpoints == (6, 12)
    engine.close()
    assert fsck(tmp_path / "store").sound


@pytest.mark.parametrize("waiting", [10_000, 0])
def test_what_stands_apart_comes_back_with_what_hangs_on_it(
    open_engine: OpenEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waiting: int
) -> None:
    monkeypatch.setattr(index_rebuild, "_WAITING_MAX", waiting)
    monkeypatch.setattr(index_rebuild, "_GROUP_RECORDS", 3)
    engine = open_engine(budget_bytes=16 << 20)
    engine.put(PROMPTS[0].blocks())
    apart: list[Record] = [PROMPTS[1].block(4, parent_elsewhere=True), *(PROMPTS[1].block(at) for at in range(5, 9))]
    assert engine.put(apart).num_stored == 5
    shuffled(engine, seed=3)
    engine = rebuilt(engine, tmp_path, open_engine)
    assert PROMPTS[0].check(engine) == 12
    held = engine.held(PROMPTS[1].hashes, fingerprint=FINGERPRINT)
    assert held.spans == ((4, 9),)
    engine.close()
    assert fsck(tmp_path / "store").sound


def test_of_two_copies_the_later_one_counts(open_engine: OpenEngine, tmp_path: Path) -> None:
    engine = open_engine(budget_bytes=16 << 20)
    engine.put(PROMPTS[0].blocks())
    places = {header.hash: header.segment for header in engine.segments.scan(1, check_payloads=False)}
    headers = list(engine.segments.scan(1, check_payloads=False))[3:6]
    engine.segments.roll(engine.clock_ms())
    engine.space.compactor.copy(headers)
    engine = rebuilt(engine, tmp_path, open_engine)
    with engine.index.txn() as txn:
        entries = [engine.index.entry(txn, header.kind, header.hash) for header in headers]
    assert all(entry is not None and entry.segment > places[headers[0].hash] for entry in entries)
    assert PROMPTS[0].check(engine) == 12

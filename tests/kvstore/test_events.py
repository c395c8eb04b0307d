"""Events: a follower that starts from a snapshot and follows the numbers always knows what is stored."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from antefix.events.block_events import BlockEvent, EventKind
from antefix.events.numbered_log import EVENT_BLOCKS_MAX, Batch
from antefix.record import RecordKind
from antefix.store_files.hit_log import StoreEventKind as LoggedKind
from antefix.store_files.hit_log import read_store_log
from antefix_kvstore import event_log as events
from antefix_kvstore.storage_engine import StorageEngine
from tests.kvstore.small_store import BLOCK, FINGERPRINT, Clock, Prompt

OpenEngine = Callable[..., StorageEngine]


class Follower:
    """Keeps the set of records that are stored according to events."""

    def __init__(self) -> None:
        self.known: set[tuple[RecordKind, bytes]] = set()

    def apply(self, event: BlockEvent) -> None:
        assert event.fingerprint == FINGERPRINT
        kind = RecordKind.BLOCK if event.kind in (EventKind.STORED, EventKind.EVICTED) else RecordKind.CHECKPOINT
        names = {(kind, block_hash) for block_hash in event.names()}
        if event.kind in (EventKind.STORED, EventKind.CHECKPOINTED):
            self.known |= names
        else:
            assert names <= self.known
            self.known -= names


def stored(engine: StorageEngine, prompts: list[Prompt]) -> set[tuple[RecordKind, bytes]]:
    return {
        (kind, h)
        for prompt in prompts
        for h in prompt.hashes
        for kind in (RecordKind.BLOCK, RecordKind.CHECKPOINT)
        if engine.read(kind, h, fingerprint=FINGERPRINT) is not None
    }


def test_following_from_a_snapshot_tells_what_is_stored(open_engine: OpenEngine, clock: Clock, tmp_path: Path) -> None:
    engine = open_engine(checkpoint_ttl_s=30.0)
    prompts = [Prompt([0] * BLOCK * 2 + [n] * BLOCK * 4, payload_bytes=200) for n in range(8)]
    rng = random.Random(3)
    follower = Follower()
    engine.put(prompts[0].blocks())
    pieces = engine.snapshot()
    # Records stored after the snapshot was taken are not in it, although the snapshot is read only now.
    engine.put(prompts[1].blocks())
    for piece in pieces:
        cursor = piece.cursor
        for event in piece.events:
            follower.apply(event)
    for _ in range(60):
        clock.advance(7)
        prompt = rng.choice(prompts)
        action = rng.randrange(4)
        if action < 2:
            engine.put([*prompt.blocks(rng.randrange(1, 7)), prompt.checkpoint(0)])
        elif action == 2:
            engine.space.evict(rng.randrange(2000))
        else:
            engine.maintain()
        found = engine.events.since(cursor)
        assert found is not None
        assert found.cursor.number == cursor.number + len(found.events)
        assert found.cursor == engine.events.cursor
        for event in found.events:
            follower.apply(event)
        engine.space.expire()
        found = engine.events.since(found.cursor)
        assert found is not None
        for event in found.events:
            follower.apply(event)
        cursor = engine.events.cursor
        assert follower.known == stored(engine, prompts)


def test_quarantine_and_healing_are_events(open_engine: OpenEngine, tmp_path: Path) -> None:
    engine = open_engine()
    prompt = Prompt([1] * BLOCK * 2)
    engine.put(prompt.blocks())
    cursor = engine.events.cursor
    path = next((tmp_path / "store" / "segments").iterdir())
    raw = path.read_bytes()
    path.write_bytes(raw.replace(prompt.payload(1), b"!" * 300))
    prompt.check(engine)
    engine.put(prompt.blocks())
    found = engine.events.since(cursor)
    assert found is not None
    assert [(event.kind, event.names()) for event in found.events] == [
        (EventKind.EVICTED, [prompt.hashes[1]]),
        (EventKind.STORED, [prompt.hashes[1]]),
    ]


def test_compaction_is_no_event(open_engine: OpenEngine) -> None:
    engine = open_engine()
    prompt = Prompt([1] * BLOCK * 9, payload_bytes=3000)
    engine.put(prompt.blocks())
    engine.evict([(RecordKind.BLOCK, prompt.hashes[1])])
    cursor = engine.events.cursor
    assert engine.space.compactor.compact_one(0.0) is not None
    assert engine.events.cursor == cursor


def test_a_watcher_that_fell_behind_must_take_a_snapshot(open_engine: OpenEngine, monkeypatch) -> None:
    monkeypatch.setattr(events, "NUM_BLOCKS_MAX", 10)
    engine = open_engine()
    for number in range(10):
        engine.put(Prompt([number] * BLOCK * 3).blocks())
    log, last = engine.events, engine.events.cursor
    assert log.since(replace(last, number=1)) is None
    assert log.since(last) == Batch(cursor=last)
    assert log.since(replace(last, number=last.number + 1)) is None
    assert log.since(replace(last, epoch=b"another epoch...")) is None
    recent = log.since(replace(last, number=last.number - 2))
    assert recent is not None
    assert (recent.cursor, len(recent.events)) == (last, 2)


def test_one_transaction_of_many_records_is_events_that_fit_a_message(open_engine: OpenEngine) -> None:
    engine = open_engine()
    prompt = Prompt([1] * BLOCK * (EVENT_BLOCKS_MAX + 5), payload_bytes=8)
    cursor = engine.events.cursor
    engine.put(prompt.blocks())
    engine.evict([(RecordKind.BLOCK, prompt.hashes[0])])
    told: list[tuple[EventKind, bytes]] = []
    while (found := engine.events.since(cursor)) is not None and found.events:
        assert all(event.num_blocks <= EVENT_BLOCKS_MAX for event in found.events)
        told += [(event.kind, name) for event in found.events for name in event.names()]
        cursor = found.cursor
    assert told[: len(prompt.hashes)] == [(EventKind.STORED, name) for name in prompt.hashes]
    assert set(told[len(prompt.hashes) :]) == {(EventKind.EVICTED, name) for name in prompt.hashes}


def test_each_opening_is_an_epoch(open_engine: OpenEngine) -> None:
    engine = open_engine()
    epoch = engine.events.cursor.epoch
    engine.close()
    assert open_engine().events.cursor.epoch != epoch


def test_the_log_that_bills_are_checked_against(open_engine: OpenEngine, tmp_path: Path) -> None:
    engine = open_engine(usage_log_dir=str(tmp_path / "log"))
    prompt = Prompt([1] * BLOCK * 3)
    engine.put([*prompt.blocks(), prompt.checkpoint(2)])
    prompt.check(engine)
    engine.close()
    found = [(event.kind, event.hash) for event in read_store_log(tmp_path / "log")]
    assert found == [
        *((LoggedKind.STORED, h.hex()) for h in prompt.hashes),
        (LoggedKind.READ, prompt.hashes[2].hex()),
    ]

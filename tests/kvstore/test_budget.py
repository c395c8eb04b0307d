"""The budget is hard. Eviction keeps the store prefix-closed. With a full disk, puts are refused and reads work."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from antefix.record import RecordKind
from antefix_kvstore.disk import Disk
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.storage_engine import StorageEngine
from tests.kvstore.small_store import BLOCK, FINGERPRINT, Clock, Prompt

OpenEngine = Callable[..., StorageEngine]
MIB = 1 << 20


def directory_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file() and path.name != "lock.mdb")


@pytest.mark.slow
def test_many_times_the_budget_ends_inside_it(open_engine: OpenEngine, tmp_path: Path, clock: Clock) -> None:
    soak(open_engine(budget_bytes=2 * MIB), clock, written_bytes=6 * MIB)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_twenty_times_the_budget_ends_inside_it(open_engine: OpenEngine, tmp_path: Path, clock: Clock) -> None:
    soak(open_engine(budget_bytes=4 * MIB), clock, written_bytes=80 * MIB)


def soak(engine: StorageEngine, clock: Clock, *, written_bytes: int) -> None:
    """Put growing conversations until `written_bytes` are written. The directory is measured after every put."""
    rng = random.Random(5)
    written = 0
    conversations = [[n] * BLOCK for n in range(12)]
    while written < written_bytes:
        clock.advance(1)
        tokens = conversations[rng.randrange(len(conversations))]
        tokens += [rng.randrange(1000) for _ in range(BLOCK * rng.randrange(1, 6))]
        prompt = Prompt(tokens, payload_bytes=9_000)
        result = engine.put([*prompt.blocks(), prompt.checkpoint(len(prompt.hashes) - 1)])
        assert not result.refused
        written += result.num_stored * 9_000
        assert prompt.check(engine) == len(prompt.hashes)
        assert directory_bytes(Path(engine.config.dir)) <= engine.config.budget_bytes
        if len(tokens) > BLOCK * 40:
            del tokens[BLOCK:]
    assert engine.space.counters.evictions > 200
    assert engine.counters.corrupt == 0


def test_eviction_takes_leaves_only(open_engine: OpenEngine, clock: Clock) -> None:
    engine = open_engine(budget_bytes=2 * MIB)
    trunk = [1] * BLOCK * 10
    prompts = [Prompt(trunk + [n] * BLOCK * 10, payload_bytes=2000) for n in range(2, 20)]
    for prompt in prompts:
        clock.advance(1)
        engine.put(prompt.blocks())
    for _ in range(20):
        engine.space.evict(10_000)
        for prompt in prompts:
            stored = [engine.read(RecordKind.BLOCK, h, fingerprint=FINGERPRINT) is not None for h in prompt.hashes]
            assert stored == sorted(stored, reverse=True)


def test_the_least_recently_used_leaf_goes_first(open_engine: OpenEngine, clock: Clock) -> None:
    engine = open_engine()
    old, new = Prompt([1] * BLOCK * 4), Prompt([2] * BLOCK * 4)
    for prompt in (old, new):
        engine.put(prompt.blocks())
        clock.advance(10)
    old.check(engine)
    engine.flush_touches()
    engine.space.evict(1)
    assert (old.check(engine), new.check(engine)) == (4, 3)


def test_what_cost_more_to_compute_stays_longer(open_engine: OpenEngine, clock: Clock) -> None:
    engine = open_engine()
    cheap, dear = Prompt([1] * BLOCK), Prompt([2] * BLOCK)
    engine.put([dear.block(0, cost_s=0.08)])
    clock.advance(10)
    engine.put([cheap.block(0, cost_s=0.000_01)])
    engine.space.evict(1)
    assert (cheap.check(engine), dear.check(engine)) == (0, 1)


def test_pins_hold_until_they_end(open_engine: OpenEngine, clock: Clock) -> None:
    engine = open_engine()
    pinned, other = Prompt([1] * BLOCK * 3), Prompt([2] * BLOCK * 3)
    engine.put(pinned.blocks())
    clock.advance(10)
    engine.put(other.blocks())
    assert engine.pin([(RecordKind.BLOCK, pinned.hashes[-1])], 60) == 1
    engine.space.evict(1 << 20)
    assert (pinned.check(engine), other.check(engine)) == (3, 0)
    clock.advance(61)
    engine.space.evict(1 << 20)
    assert pinned.check(engine) == 0


def test_a_batch_larger_than_the_budget_is_refused_and_the_store_goes_on(open_engine: OpenEngine) -> None:
    engine = open_engine(budget_bytes=2 * MIB)
    prompt = Prompt([3] * BLOCK * 200, payload_bytes=20_000)
    result = engine.put(prompt.blocks())
    assert 0 < result.num_stored < 200
    assert result.num_stored + len(result.refused) == 200
    assert prompt.check(engine) == result.num_stored


class FullDisk(Disk):
    """A file system with room for `room_bytes` more."""

    def __init__(self) -> None:
        self.room_bytes = 1 << 40

    def write(self, fd: int, buffers: Sequence[bytes | bytearray | memoryview], offset: int) -> None:
        whole = b"".join(bytes(buffer) for buffer in buffers)
        super().write(fd, [whole[: self.room_bytes]], offset)
        if len(whole) > self.room_bytes:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room_bytes -= len(whole)


def test_a_full_disk_refuses_writes_and_goes_on_reading(tmp_path: Path) -> None:
    disk = FullDisk()
    engine = StorageEngine(KvStoreConfig(dir=str(tmp_path / "store"), budget_bytes=4 * MIB), disk=disk)
    first, second = Prompt([1] * BLOCK * 3), Prompt([2] * BLOCK * 3)
    engine.put(first.blocks())
    disk.room_bytes = 700
    result = engine.put(second.blocks())
    assert set(result.refused) == set(second.hashes)
    assert all("full" in str(reason) for reason in result.refused.values())
    assert (first.check(engine), second.check(engine)) == (3, 0)
    # After space becomes free, the store writes again without a restart.
    disk.room_bytes = 1 << 40
    assert engine.put(second.blocks()).num_stored == 3
    assert second.check(engine) == 3
    engine.close()


@pytest.mark.parametrize("kind", [RecordKind.BLOCK, RecordKind.CHECKPOINT])
def test_totals_follow_every_change(open_engine: OpenEngine, kind: RecordKind) -> None:
    engine = open_engine()
    prompt = Prompt([1] * BLOCK * 4)
    engine.put([*prompt.blocks(), prompt.checkpoint(3)])
    count = {RecordKind.BLOCK: 4, RecordKind.CHECKPOINT: 1}[kind]
    assert engine.totals()[b"k" + bytes([kind])] == (count, count * (256 + 304), count * 300)
    engine.evict([(RecordKind.BLOCK, prompt.hashes[0])])
    assert engine.totals()[b"k" + bytes([kind])] == (0, 0, 0)

"""fsck, inspect, the scrubber and background compaction."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from antefix.block import differing_fields, digest_of, hash_kind_of
from antefix.errors import ConfigError, InvalidRequest
from antefix.record import RecordKind
from antefix_kvstore import check_store as fsck
from antefix_kvstore import describe_store as inspect
from antefix_kvstore.disk import Disk
from antefix_kvstore.index_writer import IndexTxn
from antefix_kvstore.kvstore_config import GIB, MIB, SEGMENTS_PER_BUDGET, KvStoreConfig
from antefix_kvstore.registration import register_fingerprint
from antefix_kvstore.scrubber import Scrubber
from antefix_kvstore.storage_engine import StorageEngine
from tests.kvstore.small_store import BLOCK, FINGERPRINT, Clock, Prompt

OpenEngine = Callable[..., StorageEngine]
PROMPT = Prompt(list(range(BLOCK * 6)))


def damage(directory: Path, payload: bytes) -> None:
    path = next(p for p in (directory / "segments").iterdir() if payload in p.read_bytes())
    with path.open("r+b") as file:
        file.seek(path.read_bytes().find(payload) + 5)
        file.write(b"!")


def test_a_used_store_is_sound(open_engine: OpenEngine, tmp_path: Path) -> None:
    engine = open_engine(segment_bytes=64 << 10)
    for number in range(30):
        tokens = [number % 7] * BLOCK * 3 + [number] * BLOCK * 3
        prompt = Prompt(tokens, payload_bytes=2000, version=1 + number % 2)
        engine.put([*prompt.blocks(), prompt.checkpoint(5)])
    engine.space.evict(50_000)
    engine.space.compactor.compact_one(0.0)
    engine.close()
    report = fsck.fsck(tmp_path / "store")
    assert report.sound, fsck.render(report)
    assert report.num_records > 50


@pytest.mark.parametrize("target", ["payload", "header", "index", "identity", "segment header"])
def test_repair_keeps_all_that_is_sound(open_engine: OpenEngine, tmp_path: Path, target: str) -> None:
    engine = open_engine()
    engine.put([*PROMPT.blocks(), PROMPT.checkpoint(1), PROMPT.checkpoint(5)])
    engine.close()
    store = tmp_path / "store"
    expected = 6
    if target == "payload":
        damage(store, PROMPT.payload(3))
        expected = 3
    elif target == "header":
        damage(store, PROMPT.hashes[3] + PROMPT.hashes[2])
        expected = 3
    elif target == "index":
        shutil.rmtree(store / "index")
    elif target == "identity":
        (store / "STORE").write_bytes(b"nonsense")
    else:
        damage(store, b"AFXSEGMT")
    report = fsck.fsck(store)
    assert not report.sound
    assert "damaged" in fsck.render(report)
    report = fsck.fsck(store, repair=True)
    assert report.repaired, fsck.render(report)
    assert fsck.fsck(store).sound
    engine = open_engine()
    assert PROMPT.check(engine) == expected
    assert engine.lookup(PROMPT.hashes, fingerprint=FINGERPRINT).checkpoints == ((2, 6) if expected == 6 else (2,))


def test_fsck_leaves_a_running_store_alone(open_engine: OpenEngine, tmp_path: Path) -> None:
    open_engine()
    with pytest.raises(ConfigError, match="another process"):
        fsck.fsck(tmp_path / "store")
    with pytest.raises(ConfigError, match="not an Antefix store"):
        fsck.fsck(tmp_path)


def test_inspect_counts_and_draws(open_engine: OpenEngine, tmp_path: Path) -> None:
    engine = open_engine()
    trunk = [0] * BLOCK * 4
    prompts = [Prompt(trunk + [n] * BLOCK * 2) for n in (1, 2, 3)]
    for prompt in prompts:
        engine.put([*prompt.blocks(), prompt.checkpoint(5)])
    report = inspect.inspect(tmp_path / "store")
    blocks, checkpoints = report.holdings
    assert (blocks.kind, blocks.num_records, blocks.payload_bytes) == (RecordKind.BLOCK, 10, 3000)
    assert (checkpoints.kind, checkpoints.num_records) == (RecordKind.CHECKPOINT, 3)
    assert [(run.depth, run.num_blocks, run.num_checkpoints) for run in report.forest] == [
        (0, 4, 0),
        (1, 2, 1),
        (1, 2, 1),
        (1, 2, 1),
    ]
    text = inspect.render(report)
    assert "to token 32: 4 blocks" in text
    with pytest.raises(ConfigError, match="not an Antefix store"):
        inspect.inspect(tmp_path)


def test_the_scrubber_finds_damage_before_a_reader_does(open_engine: OpenEngine, tmp_path: Path) -> None:
    engine = open_engine()
    engine.put([*PROMPT.blocks(), PROMPT.checkpoint(1)])
    scrubber = Scrubber(engine, 1 << 40)
    assert scrubber.scrub() == 0
    assert scrubber.counters.records == 7
    damage(tmp_path / "store", PROMPT.payload(4))
    damage(tmp_path / "store", PROMPT.payload(1, RecordKind.CHECKPOINT))
    assert scrubber.scrub() == 2
    found = engine.lookup(PROMPT.hashes, fingerprint=FINGERPRINT)
    assert (found.num_blocks, found.checkpoints) == (4, ())
    assert scrubber.scrub() == 0


def test_half_dead_segments_are_compacted_a_step_at_a_time(open_engine: OpenEngine) -> None:
    engine = open_engine(segment_bytes=64 << 10, compact_bytes_per_s=40_000)
    prompts = [Prompt([n] * BLOCK * 3, payload_bytes=3000) for n in range(20)]
    for prompt in prompts:
        engine.put(prompt.blocks())
    before = engine.segments.used_bytes
    for prompt in prompts[::3] + prompts[1::3]:
        engine.evict([(RecordKind.BLOCK, prompt.hashes[0])])
    engine.maintain()
    assert 0 < engine.space.counters.compacted_bytes < 20_000
    for _ in range(40):
        engine.maintain()
    assert engine.segments.used_bytes < before / 2
    assert all(prompt.check(engine) == 3 for prompt in prompts[2::3])


def test_background_compaction_copies_half_as_much_while_payloads_are_read(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(compact_bytes_per_s=1_000_000)
    engine.put(PROMPT.blocks())
    steps: list[int] = []
    monkeypatch.setattr(engine.space.compactor, "compact_step", lambda _gain_min, nbytes: steps.append(nbytes))
    engine.maintain()
    outcome = engine.reader.read(RecordKind.BLOCK, PROMPT.hashes[0], fingerprint=FINGERPRINT)[1]
    engine.settle(RecordKind.BLOCK, PROMPT.hashes[:1], outcome, num_missed=0)
    engine.maintain()
    engine.maintain()
    assert steps == [250_000, 125_000, 250_000]


class CountingDisk(Disk):
    def __init__(self) -> None:
        self.num_syncs = self.num_names = 0

    def sync_data(self, fd: int) -> None:
        self.num_syncs += 1
        super().sync_data(fd)

    def sync_directory(self, path: Path) -> None:
        self.num_names += 1
        super().sync_directory(path)


def test_several_segments_are_compacted_by_one_sync_and_one_commit(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = CountingDisk()
    engine = open_engine(segment_bytes=64 << 10)
    engine.segments.disk = disk
    kept = [Prompt([number] * BLOCK, payload_bytes=9_000) for number in range(4)]
    dead = [Prompt([number] * BLOCK * 4, payload_bytes=9_000) for number in range(50, 54)]
    for one, other in zip(kept, dead, strict=True):
        engine.put([*one.blocks(), *other.blocks()])
        engine.segments.roll(engine.clock_ms())
    engine.evict([(RecordKind.BLOCK, prompt.hashes[0]) for prompt in dead])
    before = set(engine.segments.sizes)
    disk.num_syncs = disk.num_names = 0
    commits: list[IndexTxn] = []
    leave = IndexTxn.__exit__
    monkeypatch.setattr(IndexTxn, "__exit__", lambda txn, *raised: commits.append(txn) or leave(txn, *raised))
    assert engine.space.compactor.compact_together(0.0, 3 * 36_000)
    assert (disk.num_syncs, disk.num_names, len(commits)) == (1, 1, 1)
    assert len(before & set(engine.segments.sizes)) == len(before) - 3
    assert [prompt.check(engine) for prompt in kept] == [1] * 4


@pytest.mark.parametrize(
    ("budget", "segment"),
    [(16 * MIB, MIB // 2), (256 * MIB, 8 * MIB), (512 * MIB, 8 * MIB), (GIB, 16 * MIB), (64 * GIB, 256 * MIB)],
)
def test_segments_are_small_but_hold_the_records_of_small_stores(budget: int, segment: int) -> None:
    assert KvStoreConfig(budget_bytes=budget).segment_bytes_in_force == segment


def test_a_full_store_copies_little_for_what_it_stores(open_engine: OpenEngine, clock: Clock) -> None:
    # Four conversations per put, and eight used again, as in benchmarks/store_upkeep.py with a 16th of the bytes.
    engine = open_engine(budget_bytes=32 << 20, segment_bytes=(32 << 20) // SEGMENTS_PER_BUDGET)
    random, leaves = Random(1), []
    for number in range(250):
        prompts = [Prompt([4 * number + more] * BLOCK * 4, payload_bytes=28 << 10) for more in range(4)]
        engine.put_group([prompt.blocks() for prompt in prompts])
        leaves += [(RecordKind.BLOCK, prompt.hashes[-1]) for prompt in prompts]
        engine.note_use(random.choices(leaves[-292:], k=8), [])
        clock.advance(0.02)
    written = engine.counters.bytes_written + engine.space.counters.compacted_bytes
    assert engine.space.counters.compacted_bytes > 0
    # With segments of a 32nd of the budget instead of a 64th, it was 1.38.
    assert written < 1.28 * engine.counters.payload_bytes_written


def test_eviction_lets_go_of_dead_segments_in_its_own_commit(open_engine: OpenEngine) -> None:
    engine = open_engine(segment_bytes=64 << 10)
    engine.put(Prompt([1] * BLOCK * 4, payload_bytes=9_000).blocks())
    engine.segments.roll(engine.clock_ms())
    last = Prompt([2] * BLOCK, payload_bytes=9_000)
    engine.put(last.blocks())
    num_segments = len(engine.segments.sizes)
    assert engine.space.evict(36_000) == 4
    assert len(engine.segments.sizes) == num_segments - 1
    assert engine.space.counters.dropped_segments == 1
    assert last.check(engine) == 1


def test_what_fits_no_segment_is_copied_in_parts(open_engine: OpenEngine, tmp_path: Path) -> None:
    engine = open_engine(segment_bytes=64 << 10)
    prompts = [Prompt([n] * BLOCK * 3, payload_bytes=3001) for n in range(20)]
    for prompt in prompts:
        engine.put(prompt.blocks())
    before = set(engine.segments.sizes)
    assert len(before) > 2
    headers = [header for number in sorted(before) for header in engine.segments.scan(number, check_payloads=False)]
    copied = engine.space.compactor.copy(headers)
    # 1. All records are copied, each part into a segment that has room for it.
    assert copied == sum(header.extent_bytes for header in headers)
    assert max(engine.segments.sizes.values()) <= 64 << 10
    assert all(prompt.check(engine) == 3 for prompt in prompts)
    # 2. The old segments are deleted, and no process has them open.
    engine.close()
    assert not before & {int(path.stem) for path in (tmp_path / "store" / "segments").iterdir()} - {max(before)}
    opened = [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert not [name for name in opened if str(tmp_path) in name]
    assert fsck.fsck(tmp_path / "store").sound


@pytest.mark.parametrize("statement", [b"junk", b"[1]", b"5", b"\xff", b"[" * 9999, b"{}"])
def test_a_store_with_statements_of_nobody_is_described(
    open_engine: OpenEngine, tmp_path: Path, statement: bytes
) -> None:
    engine = open_engine()
    digest = digest_of(statement)
    with pytest.raises(InvalidRequest, match="nothing was registered"):
        engine.register(digest, BLOCK, {}, statement=statement)
    with IndexTxn(engine.index) as txn:
        assert txn.fingerprint(digest) is None
        register_fingerprint(txn, digest, BLOCK, {}, statement)  # as earlier versions did
    engine.put([dataclasses.replace(record, fingerprint=digest) for record in Prompt([1] * BLOCK * 3).blocks()])
    engine.close()
    (holding,) = inspect.inspect(tmp_path / "store").holdings
    assert inspect.render(inspect.inspect(tmp_path / "store"))
    assert (holding.about, holding.num_records) == ({}, 3)
    assert hash_kind_of(statement) is None and differing_fields(statement, b'{"a":1}') == ("a",)

"""Damaged files cause a miss at most, which is counted and healed by a new put, but no wrong byte and no crash."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from antefix.record import RecordKind
from antefix_kvstore.check_store import fsck
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.storage_engine import StorageEngine
from tests.kvstore.small_store import BLOCK, FINGERPRINT, Clock, Prompt, owner

OpenEngine = Callable[..., StorageEngine]
PROMPT = Prompt(list(range(BLOCK * 6)), payload_bytes=100)


def segment_files(directory: Path) -> list[Path]:
    return sorted((directory / "segments").iterdir())


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


def test_torn_payload_is_a_miss_and_heals(open_engine: OpenEngine, tmp_path: Path) -> None:
    engine = open_engine()
    engine.put([*PROMPT.blocks(), PROMPT.checkpoint(5)])
    path = segment_files(tmp_path / "store")[0]
    offset = path.read_bytes().find(PROMPT.payload(3))
    flip(path, offset + 50)
    # 1. The look-up does not see the damage, but the read does. Blocks before the torn one are right.
    assert PROMPT.check(engine) == 3
    assert engine.counters.corrupt == 1
    # 2. From now on the torn block is a miss, and so are the blocks after it.
    assert engine.lookup(PROMPT.hashes, fingerprint=FINGERPRINT).num_blocks == 3
    # 3. Putting the block again makes all of them hits.
    result = engine.put(PROMPT.blocks())
    assert (result.num_stored, result.num_existing) == (1, 5)
    assert PROMPT.check(engine) == 6
    assert engine.lookup(PROMPT.hashes, fingerprint=FINGERPRINT).checkpoints == (6,)


def test_quarantine_survives_reopening(open_engine: OpenEngine, tmp_path: Path) -> None:
    engine = open_engine()
    engine.put(PROMPT.blocks())
    path = segment_files(tmp_path / "store")[0]
    flip(path, path.read_bytes().find(PROMPT.payload(2)))
    PROMPT.check(engine)
    engine.close()
    engine = open_engine()
    assert engine.lookup(PROMPT.hashes, fingerprint=FINGERPRINT).num_blocks == 2


def test_a_record_in_the_wrong_place_is_caught(open_engine: OpenEngine, tmp_path: Path) -> None:
    """Two records of one size are swapped, with their headers and checksums."""
    engine = open_engine()
    engine.put(PROMPT.blocks())
    path = segment_files(tmp_path / "store")[0]
    raw = bytearray(path.read_bytes())
    first, second = (raw.find(PROMPT.payload(i)) - 256 for i in (1, 4))
    extent = 256 + 104
    raw[first : first + extent], raw[second : second + extent] = (
        raw[second : second + extent],
        raw[first : first + extent],
    )
    path.write_bytes(raw)
    assert PROMPT.check(engine) == 1


def test_a_truncated_segment_loses_only_its_tail(open_engine: OpenEngine, tmp_path: Path) -> None:
    engine = open_engine()
    engine.put(PROMPT.blocks())
    engine.close()
    path = segment_files(tmp_path / "store")[0]
    with path.open("r+b") as file:
        file.truncate(path.read_bytes().find(PROMPT.payload(4)) + 10)
    engine = open_engine()
    assert PROMPT.check(engine) == 4
    assert not engine.put(PROMPT.blocks()).refused
    assert PROMPT.check(engine) == 6


def test_a_torn_header_before_the_cut_does_not_hide_the_next_batch(open_engine: OpenEngine, tmp_path: Path) -> None:
    """Simulated power loss found this case: the next batch overwrote the torn payload, and a scan skipped both."""
    engine = open_engine()
    engine.put(PROMPT.blocks(1))
    engine.abandon()
    path = segment_files(tmp_path / "store")[0]
    # A batch of two records. The second was cut off after its header and a part of its payload.
    engine = open_engine()
    engine.put([PROMPT.block(i, payload=PROMPT.payload(i) * 30) for i in (1, 2)])
    engine.abandon()
    torn = path.read_bytes()
    second = torn.find(PROMPT.hashes[2] + PROMPT.hashes[1]) - 32
    path.write_bytes(torn[: second + 256 + 500].ljust(second + 256 + 3000, b"\0"))
    shutil.rmtree(tmp_path / "store" / "index")
    engine = open_engine()
    other = Prompt([5] * BLOCK * 3, payload_bytes=100)
    engine.put(other.blocks())
    # Compaction and repair find records with such a scan.
    scanned = [header.hash for header in engine.segments.scan(1, check_payloads=False)]
    assert scanned == [*PROMPT.hashes[:2], *other.hashes]


@pytest.mark.parametrize("at", [0, 8, 100, 164, 165, 168, 228, 200, 240])
def test_a_scan_of_many_records_of_one_size_leaves_out_only_the_damaged_one(
    open_engine: OpenEngine, tmp_path: Path, at: int
) -> None:
    engine = open_engine()
    prompt = Prompt([7] * BLOCK * 40, payload_bytes=100)
    engine.put(prompt.blocks())
    engine.abandon()
    path = segment_files(tmp_path / "store")[0]
    raw = bytearray(path.read_bytes())
    raw[raw.find(prompt.hashes[29] + prompt.hashes[28]) - 32 + at] ^= 1
    path.write_bytes(raw)
    scanned = [header.hash for header in engine.segments.scan(1, check_payloads=False)]
    assert scanned == [*prompt.hashes[:29], *prompt.hashes[30:]]


@pytest.mark.parametrize("check_payloads", [True, False])
def test_a_scan_that_checks_payloads_leaves_out_damaged_ones_among_many(
    open_engine: OpenEngine, tmp_path: Path, check_payloads: bool
) -> None:
    engine = open_engine()
    prompt = Prompt([8] * BLOCK * 80, payload_bytes=100)
    # Two batches, with padding between them.
    engine.put(prompt.blocks(41))
    engine.put([prompt.block(number) for number in range(41, 80)])
    engine.abandon()
    path, damaged = segment_files(tmp_path / "store")[0], {0, 1, 29, 40, 41, 60, 79}
    raw = bytearray(path.read_bytes())
    for number in damaged:
        raw[raw.find(prompt.payload(number)) + 3] ^= 1
    path.write_bytes(raw)
    scanned = [header.hash for header in engine.segments.scan(1, check_payloads=check_payloads)]
    left_out = damaged if check_payloads else set()
    assert scanned == [each for number, each in enumerate(prompt.hashes) if number not in left_out]


@pytest.mark.parametrize("step", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_every_flipped_byte_of_a_segment_is_a_miss_or_harmless(
    open_engine: OpenEngine, tmp_path: Path, step: int
) -> None:
    engine = open_engine()
    engine.put([*PROMPT.blocks(3), PROMPT.checkpoint(1)])
    path = segment_files(tmp_path / "store")[0]
    raw = path.read_bytes()
    for offset in range(0, len(raw), step):
        flip(path, offset)
        into = PROMPT.buffers(3)
        num_good = engine.reader.read_blocks(PROMPT.hashes[:3], into, fingerprint=FINGERPRINT).num_good
        assert [bytes(b) for b in into[:num_good]] == [PROMPT.payload(i) for i in range(num_good)]
        checkpoint, _ = engine.reader.read(RecordKind.CHECKPOINT, PROMPT.hashes[1], fingerprint=FINGERPRINT)
        assert checkpoint in (None, PROMPT.payload(1, RecordKind.CHECKPOINT))
        # Every byte of a record matters. The bytes after a record are padding and do not matter.
        spoiled = raw[offset : offset + 1] != b"\0" and offset >= 4096
        assert (num_good < 3 or checkpoint is None) or not spoiled
        flip(path, offset)


@pytest.mark.slow
@pytest.mark.parametrize("state", ["clean", "crashed"])
@pytest.mark.parametrize("target", ["STORE", "LOCK", "CLEAN", "segments"])
def test_a_store_with_a_flipped_byte_opens(tmp_path: Path, state: str, target: str) -> None:
    """Flips every 61st byte of segments, and every byte of other files. The long run flips every byte."""
    flip_and_open(tmp_path, state, target, step=61)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("state", ["clean", "crashed"])
def test_a_store_with_any_flipped_byte_in_a_segment_opens(tmp_path: Path, state: str) -> None:
    flip_and_open(tmp_path, state, "segments", step=1)


def flip_and_open(tmp_path: Path, state: str, target: str, *, step: int) -> None:
    directory = tmp_path / "store"
    config = KvStoreConfig(dir=str(directory), budget_bytes=4 << 20)
    engine = StorageEngine(config)
    engine.put([*PROMPT.blocks(3), PROMPT.checkpoint(1)])
    engine.close() if state == "clean" else engine.abandon()
    saved = tmp_path / "saved"
    shutil.copytree(directory, saved)
    path = segment_files(directory)[0] if target == "segments" else directory / target
    nbytes = path.stat().st_size if path.exists() else 0
    for offset in range(0, nbytes, step if target == "segments" else 1):
        shutil.rmtree(directory)
        shutil.copytree(saved, directory)
        flip(path, offset)
        engine = StorageEngine(config)
        num_good = PROMPT.check(engine)
        checkpoint = engine.read(RecordKind.CHECKPOINT, PROMPT.hashes[1], fingerprint=FINGERPRINT)
        assert checkpoint in (None, PROMPT.payload(1, RecordKind.CHECKPOINT))
        assert num_good == 3 or target == "segments"
        assert not engine.put(PROMPT.blocks(3)).refused
        assert PROMPT.check(engine) == 3
        engine.abandon()


@pytest.mark.slow
def test_an_index_that_a_crash_left_is_used_and_not_rebuilt(
    open_engine: OpenEngine, clock: Clock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The check of an index must accept every state of a healthy index."""
    rng = random.Random(3)
    prompts = [Prompt([n] * BLOCK + list(range(BLOCK * 8)), payload_bytes=9_000, version=1 + n % 2) for n in range(40)]
    for life in range(12):
        engine = open_engine(budget_bytes=2 << 20, block_ttl_s=500.0, checkpoint_ttl_s=100.0)
        for _ in range(20):
            prompt, count = rng.choice(prompts), rng.randrange(1, 9)
            engine.put([*prompt.blocks(count), prompt.checkpoint(count - 1)])
            engine.pin([(RecordKind.BLOCK, prompt.hashes[count - 1])], rng.choice((0.0, 60.0)))
            clock.advance(rng.randrange(1, 20))
            engine.maintain()
        last = rng.choice(prompts)
        engine.put([last.block(0, tenant=owner(f"tenant {life}"))])
        damaged = segment_files(tmp_path / "store")[-1]
        at = damaged.read_bytes().rfind(last.payload(0))
        if at >= 0:
            flip(damaged, at)
            last.check(engine)
        engine.abandon()
    assert not [record for record in caplog.records if "rebuilding" in record.message and "none" not in record.message]
    assert engine.space.counters.evictions + engine.space.counters.expirations > 0


@pytest.mark.slow
@pytest.mark.parametrize("state", ["clean", "crashed"])
def test_flipped_bytes_of_the_index_never_return_wrong_data(tmp_path: Path, state: str) -> None:
    """Flips every 397th byte. The long run flips every byte."""
    flip_index(tmp_path, state, step=397)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("state", ["clean", "crashed"])
def test_every_flipped_byte_of_the_index_never_returns_wrong_data(tmp_path: Path, state: str) -> None:
    flip_index(tmp_path, state, step=1)


@pytest.mark.parametrize("table", ["names", "segments", "totals", "leaves", "expiry"])
def test_every_table_of_an_index_is_compared_with_its_entries(
    open_engine: OpenEngine, tmp_path: Path, table: str
) -> None:
    """LMDB does not notice a changed value. After a crash the index is rebuilt, and fsck reports the change."""
    engine = open_engine()
    engine.put([*PROMPT.blocks(3), PROMPT.checkpoint(1)])
    with engine.index.env.begin(write=True) as txn, txn.cursor(db=engine.index.db[table]) as cursor:
        assert cursor.last()
        key, value = cursor.item()
        changed = value[:-1] + bytes([value[-1] ^ 1]) if value else b""
        txn.delete(key, db=engine.index.db[table])
        txn.put(key if value else key[:-1] + b"?", changed, db=engine.index.db[table])
    engine.abandon()
    report = fsck(tmp_path / "store")
    assert report.problems["index"] == 1
    engine = open_engine()
    assert PROMPT.check(engine) == 3
    engine.close()
    assert fsck(tmp_path / "store").sound


def flip_index(tmp_path: Path, state: str, *, step: int) -> None:
    directory = tmp_path / "store"
    config = KvStoreConfig(dir=str(directory), budget_bytes=4 << 20)
    engine = StorageEngine(config)
    engine.put([*PROMPT.blocks(3), PROMPT.checkpoint(1)])
    engine.close() if state == "clean" else engine.abandon()
    saved = tmp_path / "saved"
    shutil.copytree(directory, saved)
    data = directory / "index" / "data.mdb"
    for offset in range(0, data.stat().st_size, step):
        shutil.rmtree(directory)
        shutil.copytree(saved, directory)
        flip(data, offset)
        engine = StorageEngine(config)
        # The segments are intact, so no record is lost. The index is used as it is, or rebuilt.
        assert PROMPT.check(engine) == 3, offset
        engine.abandon()

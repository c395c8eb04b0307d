"""The engine's promises, one by one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from antefix.block import Labels
from antefix.errors import ConfigError, InvalidRequest
from antefix.record import RecordKind
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.storage_engine import StorageEngine
from tests.kvstore.small_store import BLOCK, FINGERPRINT, Clock, Prompt

OpenEngine = Callable[..., StorageEngine]
PROMPT = Prompt(list(range(BLOCK * 20)))


def test_what_was_put_is_read_back(open_engine: OpenEngine) -> None:
    engine = open_engine()
    result = engine.put([*PROMPT.blocks(), PROMPT.checkpoint(9), PROMPT.checkpoint(19)])
    assert (result.num_stored, result.num_existing, result.refused) == (22, 0, {})
    assert PROMPT.check(engine) == 20
    found = engine.lookup(PROMPT.hashes, fingerprint=FINGERPRINT)
    assert found.checkpoints == (10, 20)
    assert found.block_bytes == 20 * PROMPT.payload_bytes
    checkpoint = engine.read(RecordKind.CHECKPOINT, PROMPT.hashes[9], fingerprint=FINGERPRINT)
    assert checkpoint == PROMPT.payload(9, RecordKind.CHECKPOINT)


def test_putting_again_writes_nothing(open_engine: OpenEngine) -> None:
    engine = open_engine()
    engine.put(PROMPT.blocks())
    written = engine.counters.bytes_written
    again = engine.put(PROMPT.blocks())
    assert (again.num_stored, again.num_existing) == (0, 20)
    assert engine.counters.bytes_written == written


def test_a_record_put_twice_in_one_group_is_stored_once(open_engine: OpenEngine) -> None:
    engine = open_engine()
    first, second = engine.put_group([PROMPT.blocks(5), PROMPT.blocks(7)])
    assert (first.num_stored, first.num_existing) == (5, 0)
    assert (second.num_stored, second.num_existing) == (2, 5)


def test_a_block_without_its_parent_is_refused(open_engine: OpenEngine) -> None:
    engine = open_engine()
    engine.put(PROMPT.blocks(2))
    result = engine.put([PROMPT.block(4), PROMPT.block(5)])
    assert set(result.refused) == {PROMPT.hashes[4], PROMPT.hashes[5]}
    assert PROMPT.check(engine) == 2


def test_a_checkpoint_without_its_block_is_refused(open_engine: OpenEngine) -> None:
    engine = open_engine()
    engine.put(PROMPT.blocks(2))
    assert PROMPT.hashes[3] in engine.put([PROMPT.checkpoint(3)]).refused


def test_a_middle_put_first_of_all_is_dropped_when_the_beginning_comes(open_engine: OpenEngine) -> None:
    """A worker whose store was wiped continues in mid-chain. The store does not know yet where chains begin."""
    engine = open_engine()
    engine.put([PROMPT.block(5)])
    engine.put(PROMPT.blocks(3))
    assert engine.lookup(PROMPT.hashes, fingerprint=FINGERPRINT).num_blocks == 3
    assert engine.read(RecordKind.BLOCK, PROMPT.hashes[5], fingerprint=FINGERPRINT) is None
    assert engine.put([PROMPT.block(5)]).refused


def test_another_fingerprint_is_a_miss(open_engine: OpenEngine) -> None:
    engine = open_engine()
    engine.put(PROMPT.blocks())
    other = b"G" * 32
    assert engine.lookup(PROMPT.hashes, fingerprint=other).num_blocks == 0
    assert engine.read(RecordKind.BLOCK, PROMPT.hashes[0], fingerprint=other) is None
    # The result is the same with a fingerprint that the store knows.
    engine.put(Prompt([7] * BLOCK, fingerprint=other).blocks())
    assert engine.read(RecordKind.BLOCK, PROMPT.hashes[0], fingerprint=other) is None


def test_a_store_holds_many_fingerprints(open_engine: OpenEngine) -> None:
    engine = open_engine()
    other = Prompt(list(range(BLOCK * 5)), fingerprint=b"G" * 32, payload_bytes=77)
    engine.put(PROMPT.blocks())
    engine.put(other.blocks())
    assert (PROMPT.check(engine), other.check(engine)) == (20, 5)


def test_malformed_records_change_nothing(open_engine: OpenEngine) -> None:
    engine = open_engine()
    for bad in (
        PROMPT.block(0, hash=b"short"),
        PROMPT.block(0, payload=b""),
        PROMPT.block(0, payload=bytes(8 << 20)),
        PROMPT.block(0, position=1 << 40),
        PROMPT.block(0, tenant=b"t" * 45),
        PROMPT.block(0, tenant=b"t" * 45, version=1),
        PROMPT.block(0, mac=bytes(15)),
        PROMPT.block(0, generation=1 << 16),
        PROMPT.block(0, labels=Labels(num_cards=1 << 16)),
        PROMPT.block(0, kind=RecordKind.POOLED),
        PROMPT.block(0, ttl_s=-1.0),
    ):
        with pytest.raises(InvalidRequest):
            engine.put([PROMPT.block(0), bad])
    assert PROMPT.check(engine) == 0


def test_everything_is_there_after_reopening(open_engine: OpenEngine) -> None:
    engine = open_engine()
    engine.put([*PROMPT.blocks(), PROMPT.checkpoint(4)])
    engine.close()
    engine = open_engine()
    assert PROMPT.check(engine) == 20
    assert engine.lookup(PROMPT.hashes, fingerprint=FINGERPRINT).checkpoints == (5,)


def test_a_second_writer_is_refused(open_engine: OpenEngine, tmp_path: Path) -> None:
    open_engine()
    with pytest.raises(ConfigError, match="another process"):
        open_engine()


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear reader")
    with pytest.raises(ConfigError, match="not an Antefix store"):
        StorageEngine(KvStoreConfig(dir=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_another_format_version_is_refused(open_engine: OpenEngine, tmp_path: Path) -> None:
    from antefix.store_files.record_format import FORMAT_VERSION, StoreIdentity, pack_identity

    open_engine().close()
    newer = StoreIdentity(store_id=bytes(16), created_ms=0, version=FORMAT_VERSION + 1)
    (tmp_path / "store" / "STORE").write_bytes(pack_identity(newer))
    with pytest.raises(ConfigError, match=f"format version {FORMAT_VERSION + 1}"):
        open_engine()


def test_expired_leaves_are_misses_and_their_ancestors_follow(open_engine: OpenEngine, clock: Clock) -> None:
    engine = open_engine(block_ttl_s=100.0, checkpoint_ttl_s=10.0)
    engine.put([*PROMPT.blocks(), PROMPT.checkpoint(19)])
    clock.advance(11)
    assert engine.lookup(PROMPT.hashes, fingerprint=FINGERPRINT).checkpoints == ()
    assert PROMPT.check(engine) == 20
    clock.advance(95)
    engine.maintain()
    # The read at 11 s renewed the last use of the whole prefix.
    assert PROMPT.check(engine) == 20
    clock.advance(101)
    engine.maintain()
    assert engine.lookup(PROMPT.hashes, fingerprint=FINGERPRINT).num_blocks == 0
    assert engine.totals()[b"k\x01"] == (0, 0, 0)


def test_a_payload_of_any_size_comes_back(open_engine: OpenEngine) -> None:
    engine = open_engine(budget_bytes=8 << 20)
    for nbytes in (1, 7, 8, 255, 256, 4095, 4096, 4097, 100_003):
        prompt = Prompt([nbytes] * BLOCK * 3, payload_bytes=nbytes)
        engine.put(prompt.blocks())
        assert prompt.check(engine) == 3


@pytest.mark.parametrize("made_before", [False, True])
def test_a_new_stores_directory_is_its_owners_alone(tmp_path: Path, made_before: bool) -> None:
    directory = tmp_path / "store"
    if made_before:
        directory.mkdir()
        directory.chmod(0o750)  # the user who made the directory chose its mode
    StorageEngine(KvStoreConfig(dir=str(directory), budget_bytes=64 << 20)).close()
    assert directory.stat().st_mode & 0o777 == (0o750 if made_before else 0o700)


def test_a_store_where_none_can_be_says_so(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear reader")
    for place in (tmp_path / "letter.txt", tmp_path / "letter.txt" / "store"):
        with pytest.raises(ConfigError, match=r"cannot be used as a store.*nothing in it was changed"):
            StorageEngine(KvStoreConfig(dir=str(place), budget_bytes=64 << 20))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -1.0, 1e300])
def test_invalid_times_are_refused(open_engine: OpenEngine, number: float) -> None:
    engine = open_engine()
    with pytest.raises(InvalidRequest, match="cost_s"):
        engine.put([PROMPT.block(0, cost_s=number)])
    with pytest.raises(InvalidRequest, match="ttl_s"):
        engine.put([PROMPT.block(0, ttl_s=number)])
    with pytest.raises(InvalidRequest, match="pinned"):
        engine.pin([(RecordKind.BLOCK, PROMPT.hashes[0])], number)


@pytest.mark.parametrize("name", [b"\xff\xfe", b"a b", "東".encode(), b"two\nlines"])
def test_a_directory_may_have_any_name(tmp_path: Path, name: bytes) -> None:
    config = KvStoreConfig(dir=str(tmp_path / os.fsdecode(name)), budget_bytes=64 << 20)
    with contextlib.closing(StorageEngine(config)) as engine:
        engine.put(PROMPT.blocks(3))
    with contextlib.closing(StorageEngine(config)) as engine:
        assert PROMPT.check(engine) == 3


@pytest.mark.parametrize("num_others", [0, 1, 40])
def test_few_checkpoints_are_found_as_many_are(open_engine: OpenEngine, num_others: int) -> None:
    # With few checkpoints the table is scanned. With many, each block of the chain is looked up.
    engine = open_engine(budget_bytes=16 << 20)
    prompt, twin = Prompt(list(range(BLOCK * 96))), Prompt(list(range(BLOCK * 96)), fingerprint=b"G" * 32)
    engine.put([*prompt.blocks(), prompt.checkpoint(3), prompt.checkpoint(95)])
    engine.put([*twin.blocks(4), twin.checkpoint(2)])
    for number in range(num_others):
        other = Prompt([1000 + number] * BLOCK)
        engine.put([*other.blocks(), other.checkpoint(0)])
    # A pinned entry has the long form.
    assert engine.pin([(RecordKind.CHECKPOINT, prompt.hashes[3])], 60.0) == 1
    assert engine.lookup(prompt.hashes, fingerprint=FINGERPRINT).checkpoints == (4, 96)
    assert engine.lookup(prompt.hashes[:95], fingerprint=FINGERPRINT).checkpoints == (4,)
    assert engine.held(prompt.hashes, fingerprint=FINGERPRINT).checkpoints == (4, 96)

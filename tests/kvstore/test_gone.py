"""The store remembers why a block is no longer stored, as long as there is room, and never gives a wrong reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from antefix.miss_reason import MissReason
from antefix.record import RecordKind
from antefix.store_files.gone_blocks import GONE_FILE, SLOT_BYTES, GoneWriter, fate_of, remembered
from antefix_kvstore.storage_engine import StorageEngine
from tests.kvstore.small_store import BLOCK, FINGERPRINT, Clock, Prompt

OpenEngine = Callable[..., StorageEngine]
OTHER = b"G" * 32


def fates(engine: StorageEngine, prompt: Prompt, *, fingerprint: bytes = FINGERPRINT) -> list[MissReason]:
    directory, now_ms = Path(engine.config.dir), engine.clock_ms()
    found = [fate_of(directory, engine.index, h, fingerprint=fingerprint, now_ms=now_ms) for h in prompt.hashes]
    return [each.reason for each in found]


def test_evicted_expired_and_never_seen_are_told_apart(open_engine: OpenEngine, clock: Clock) -> None:
    engine = open_engine(block_ttl_s=100.0)
    kept, old, unknown = (Prompt([n] * BLOCK * 3) for n in (1, 2, 3))
    engine.put(old.blocks())
    clock.advance(60)
    engine.put(kept.blocks())
    assert fates(engine, old) == [MissReason.NONE] * 3
    clock.advance(60)
    # The block has expired but is still in the index. It is already a miss. Its ancestors expire once they are leaves.
    assert fates(engine, old)[2] is MissReason.EXPIRED
    engine.maintain()
    assert fates(engine, old) == [MissReason.EXPIRED] * 3
    assert engine.evict([(RecordKind.BLOCK, kept.hashes[1])]) == 2
    assert fates(engine, kept) == [MissReason.NONE, MissReason.EVICTED, MissReason.EVICTED]
    assert fates(engine, unknown) == [MissReason.FIRST_SEEN] * 3


def test_what_is_stored_again_is_stored(open_engine: OpenEngine) -> None:
    engine, prompt = open_engine(), Prompt([1] * BLOCK * 2)
    engine.put(prompt.blocks())
    engine.space.evict(1 << 30)
    assert fates(engine, prompt) == [MissReason.EVICTED] * 2
    engine.put(prompt.blocks())
    assert fates(engine, prompt) == [MissReason.NONE] * 2


def test_it_outlives_a_restart_and_a_crash(open_engine: OpenEngine) -> None:
    engine, prompt = open_engine(), Prompt([1] * BLOCK * 2)
    engine.put(prompt.blocks())
    engine.space.evict(1 << 30)
    engine.abandon()
    again = open_engine()
    assert fates(again, prompt) == [MissReason.EVICTED] * 2
    again.close()
    assert fates(open_engine(), prompt) == [MissReason.EVICTED] * 2


def test_a_broken_block_and_another_fingerprint_are_told(open_engine: OpenEngine) -> None:
    engine, prompt = open_engine(), Prompt([1] * BLOCK * 2)
    engine.put(prompt.blocks())
    assert fates(engine, prompt, fingerprint=OTHER) == [MissReason.FINGERPRINT_DIFFERS] * 2
    (segment,) = (Path(engine.config.dir) / "segments").iterdir()
    data = bytearray(segment.read_bytes())
    data[data.find(prompt.payload(1)) + 5] ^= 1
    segment.write_bytes(bytes(data))
    assert prompt.check(engine) == 1
    assert fates(engine, prompt) == [MissReason.NONE, MissReason.CORRUPT]


def test_the_other_fingerprints_of_the_store_are_listed(open_engine: OpenEngine) -> None:
    engine = open_engine()
    for fingerprint in (FINGERPRINT, OTHER):
        engine.put(Prompt([1] * BLOCK, fingerprint=fingerprint).blocks())
    directory = Path(engine.config.dir)
    found = fate_of(directory, engine.index, b"x" * 32, fingerprint=FINGERPRINT, now_ms=engine.clock_ms())
    assert found.fingerprints == (OTHER,)


def test_its_room_is_bounded_and_a_taken_slot_forgets_the_old_name(tmp_path: Path) -> None:
    writer = GoneWriter(tmp_path, 1 << 20)
    names = [bytes([n >> 8, n & 255]) * 16 for n in range(1000)]
    for name in names:
        writer.note(name, MissReason.EVICTED)
        assert remembered(tmp_path, name) is MissReason.EVICTED
    known = [remembered(tmp_path, name) for name in names]
    assert set(known) == {MissReason.EVICTED, MissReason.FIRST_SEEN}
    assert (tmp_path / GONE_FILE).stat().st_size == writer.nbytes == 256 * SLOT_BYTES
    # With another budget every name has another slot, so the file starts empty instead of giving wrong answers.
    GoneWriter(tmp_path, 1 << 30).note(b"z" * 32, MissReason.EXPIRED)
    assert (
        remembered(tmp_path, names[-1]) is MissReason.FIRST_SEEN
        and remembered(tmp_path, b"z" * 32) is MissReason.EXPIRED
    )


def test_a_damaged_or_missing_file_only_forgets(tmp_path: Path) -> None:
    assert remembered(tmp_path, b"a" * 32) is MissReason.FIRST_SEEN
    GoneWriter(tmp_path, 1 << 20).note(b"a" * 32, MissReason.EVICTED)
    path = tmp_path / GONE_FILE
    data = path.read_bytes()
    for broken in (b"", data[:7], data.replace(b"\x01", b"\x77"), bytes(len(data))):
        path.write_bytes(broken)
        assert remembered(tmp_path, b"a" * 32) is MissReason.FIRST_SEEN

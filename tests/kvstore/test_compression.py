"""Compression inside the store: registered layouts only, chosen by measurement in auto mode, invisible to readers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from antefix.errors import FingerprintMismatch, InvalidRequest
from antefix.record import RecordKind
from antefix.store_files.codec import PlanePart, PlanePlan
from antefix_kvstore.compression import Compression, judge
from antefix_kvstore.storage_engine import StorageEngine
from tests.kvstore.small_store import BLOCK, FINGERPRINT, Prompt

OpenEngine = Callable[..., StorageEngine]
PLAN = PlanePlan(parts=(PlanePart(num_rows=64, fields=((96, 1), (64, 2))),))


class Bells(Prompt):
    """Payloads whose bytes have narrow histograms, like rounded KV."""

    def __init__(self, tokens: list[int]) -> None:
        super().__init__(tokens, payload_bytes=PLAN.payload_bytes)

    def payload(self, index: int, kind: int = 1) -> bytes:
        rng = np.random.default_rng(int.from_bytes(self.hashes[index][:8], "little") + kind)
        return np.clip(rng.normal(128, 9, self.payload_bytes), 0, 255).astype(np.uint8).tobytes()


def test_registered_blocks_are_smaller_and_read_back_the_same(open_engine: OpenEngine) -> None:
    engine = open_engine(compression="zstd")
    before, after = Bells([1] * BLOCK * 4), Bells([2] * BLOCK * 4)
    engine.put(before.blocks())
    raw_bytes = engine.counters.bytes_written
    engine.register(FINGERPRINT, BLOCK, {RecordKind.BLOCK: PLAN})
    engine.put(after.blocks())
    assert engine.counters.bytes_written - raw_bytes < 0.85 * raw_bytes
    assert (before.check(engine), after.check(engine)) == (4, 4)


def test_layouts_are_remembered_over_restarts(open_engine: OpenEngine) -> None:
    engine = open_engine(compression="zstd")
    engine.register(FINGERPRINT, BLOCK, {RecordKind.BLOCK: PLAN})
    engine.close()
    engine = open_engine(compression="zstd")
    prompt = Bells([1] * BLOCK * 4)
    engine.put(prompt.blocks())
    assert engine.counters.bytes_written < 0.85 * engine.counters.payload_bytes_written
    assert prompt.check(engine) == 4


def test_checkpoints_have_their_own_layout(open_engine: OpenEngine) -> None:
    engine = open_engine(compression="zstd")
    engine.register(FINGERPRINT, BLOCK, {RecordKind.CHECKPOINT: PLAN})
    prompt = Bells([1] * BLOCK * 2)
    engine.put(prompt.blocks())
    raw_bytes = engine.counters.bytes_written
    engine.put([prompt.checkpoint(0), prompt.checkpoint(1)])
    assert engine.counters.bytes_written - raw_bytes < 0.85 * raw_bytes
    stored = engine.read(RecordKind.CHECKPOINT, prompt.hashes[1], fingerprint=FINGERPRINT)
    assert stored == prompt.payload(1, RecordKind.CHECKPOINT)


def test_off_stores_raw(open_engine: OpenEngine) -> None:
    engine = open_engine(compression="off")
    engine.register(FINGERPRINT, BLOCK, {RecordKind.BLOCK: PLAN})
    engine.put(Bells([1] * BLOCK * 4).blocks())
    assert engine.counters.bytes_written >= engine.counters.payload_bytes_written


def test_auto_follows_what_the_reader_is_short_of() -> None:
    """With a disk that is slower than the codec, blocks are compressed. With a faster disk, they are not."""
    prompt = Bells([1] * BLOCK * 8)
    for disk_bytes_per_s, compresses in ((1e4, True), (1e13, False)):
        compression = Compression("auto", lambda speed=disk_bytes_per_s: speed)
        compression.register(FINGERPRINT, RecordKind.BLOCK, PLAN)
        for record in prompt.blocks():
            compression.encode(record)
        assert compression.judgements[FINGERPRINT, RecordKind.BLOCK].compress is compresses
        assert (compression.encode(prompt.block(0)) is not None) is compresses


def test_a_disk_that_cannot_be_measured_does_not_stop_a_put(open_engine: OpenEngine, tmp_path: Path) -> None:
    def fails() -> float:
        raise OSError("no space")

    compression = Compression("auto", fails)
    compression.register(FINGERPRINT, RecordKind.BLOCK, PLAN)
    for record in Bells([1] * BLOCK * 8).blocks():
        compression.encode(record)
    assert (FINGERPRINT, RecordKind.BLOCK) in compression.judgements


def test_a_judgement_is_said_in_words() -> None:
    told = str(judge(ratio=1.5, codec_bytes_per_s=8e9, disk_bytes_per_s=5e8))
    assert told.startswith("compressed: compression makes them 1.50 times smaller") and "0.50 GB/s" in told
    assert str(judge(ratio=1.0, codec_bytes_per_s=8e9, disk_bytes_per_s=5e8)).startswith("stored as they are: ")


def test_judgement_at_the_break_even_point() -> None:
    # At ratio 1.25 compression saves a fifth of the read time, so the codec may take at most that time.
    assert judge(ratio=1.25, codec_bytes_per_s=5.1e9, disk_bytes_per_s=1e9).compress
    assert not judge(ratio=1.25, codec_bytes_per_s=4.9e9, disk_bytes_per_s=1e9).compress


def test_a_checkpoint_may_hold_more_than_its_layout_names(open_engine: OpenEngine) -> None:
    """A draft layer's state may follow. A shorter checkpoint, or a block of another size, is an error."""
    engine = open_engine(compression="zstd")
    engine.register(FINGERPRINT, BLOCK, {RecordKind.BLOCK: PLAN, RecordKind.CHECKPOINT: PLAN})
    prompt = Bells([1] * BLOCK)
    engine.put(prompt.blocks())
    more = prompt.payload(0, RecordKind.CHECKPOINT) + b"draft state."
    for payload in (more[:-1], more[:-20], more[: PLAN.payload_bytes - 1]):
        with pytest.raises(InvalidRequest, match="by its registered layout"):
            engine.put([prompt.checkpoint(0, payload=payload)])
    with pytest.raises(InvalidRequest, match="by its registered layout"):
        engine.put([prompt.block(0, payload=more)])
    engine.put([prompt.checkpoint(0, payload=more)])
    assert bytes(engine.read(RecordKind.CHECKPOINT, prompt.hashes[0], fingerprint=FINGERPRINT)) == more


def test_a_block_of_another_size_under_a_known_name_is_refused_with_both_sizes(open_engine: OpenEngine) -> None:
    engine = open_engine(compression="zstd")
    engine.register(FINGERPRINT, BLOCK, {})
    with pytest.raises(FingerprintMismatch, match=rf"blocks have {2 * BLOCK} tokens, but the KV .* blocks of {BLOCK}:"):
        engine.register(FINGERPRINT, 2 * BLOCK, {})
    # A registration without a block size leaves the registered size unchanged.
    engine.register(FINGERPRINT, 0, {})
    with engine.index.txn() as txn:
        assert engine.index.block_tokens(txn, FINGERPRINT) == BLOCK

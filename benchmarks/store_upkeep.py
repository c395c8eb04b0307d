"""How much do eviction and compaction slow down puts and restores that run at the same time?

Two stores take the same puts in turn, each put a new conversation. One store has room for all of them, and the other
must evict and compact for every byte. Old conversations are used sometimes, so evicted blocks are spread over the
segments. Then a prefix is restored, alone and during background compaction at its rate. Part of `antefix bench store`.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from antefix.block import chain_of
from antefix.record import Record, RecordKind, RecordName
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.storage_engine import MAINTAIN_S, StorageEngine
from benchmarks.spread import over_neighbours, with_spread

FINGERPRINT = b"F" * 32
BLOCK_TOKENS = 128
# Conversations are short, four per put. So a segment holds many, and dead records are spread over all segments.
TALK_BLOCKS = 4
PUT_TALKS = 4
# Conversations used again per put.
USED_AGAIN = 8
# Bytes of a block of V4-Flash, and of a smaller model.
LARGE, SMALL = 448 << 10, 64 << 10
RESTORED_BLOCKS = 128
RESTORE_S = 0.75
HALF_DEAD_BYTES = 128 << 20
# Compact segments with fewer dead bytes than the background requires, so that every round has bytes to copy.
GAIN_MIN = 1 / 8


def talk(number: int, payload: bytes, num_blocks: int = TALK_BLOCKS) -> list[Record]:
    """A conversation that shares no prefix with any other."""
    tokens = np.arange(num_blocks * BLOCK_TOKENS, dtype=np.uint32) + np.uint32(number << 8)
    chain = chain_of(tokens, fingerprint_digest=FINGERPRINT, key=b"k" * 32, block_size=BLOCK_TOKENS)
    return [
        Record(
            kind=RecordKind.BLOCK,
            hash=block_hash,
            parent=chain.parent(at),
            fingerprint=FINGERPRINT,
            position=(at + 1) * BLOCK_TOKENS,
            payload=payload,
        )
        for at, block_hash in enumerate(chain.hashes)
    ]


def _engine(directory: Path, budget_bytes: int) -> StorageEngine:
    return StorageEngine(
        KvStoreConfig(dir=str(directory), budget_bytes=budget_bytes, compression="off", scrub_bytes_per_s=0)
    )


def churn(directory: Path, block_bytes: int, budget_bytes: int, rounds: int) -> dict[str, float]:
    """Rates of puts into a roomy and a full store, in turn.

    After the budget is full, each round writes a quarter of it.
    """
    engines = {"roomy": _engine(directory / "roomy", 64 << 30), "full": _engine(directory / "full", budget_bytes)}
    rng, payload = random.Random(1), os.urandom(block_bytes)
    leaves: list[RecordName] = []
    rates: list[dict[str, float]] = []
    for number in range(rounds + 5):
        took, stored = dict.fromkeys(engines, 0.0), dict.fromkeys(engines, 0)
        while stored["full"] < budget_bytes // 4:
            group = [talk(len(leaves) + more, payload) for more in range(PUT_TALKS)]
            leaves += [(RecordKind.BLOCK, records[-1].hash) for records in group]
            used = rng.choices(leaves[-budget_bytes // (TALK_BLOCKS * block_bytes) :], k=USED_AGAIN)
            for name, engine in engines.items():
                started = time.perf_counter()
                stored[name] += block_bytes * sum(result.num_stored for result in engine.put_group(group))
                engine.note_use(used, [])
                took[name] += time.perf_counter() - started
        if number >= 5:
            rates.append({name: stored[name] / took[name] for name in engines})
    full = engines["full"]
    space, counters = full.space.counters, full.counters
    out = {
        "gb_per_s": statistics.median(rate["full"] for rate in rates) / 1e9,
        **with_spread("over_put", [rate["full"] / rate["roomy"] for rate in rates]),
        "write_amplification": (counters.bytes_written + space.compacted_bytes) / counters.payload_bytes_written,
        "used_of_budget": full.space.used_bytes / budget_bytes,
    }
    for engine in engines.values():
        engine.close()
    return out


def restores(directory: Path, block_bytes: int, rounds: int) -> dict[str, float]:
    """The speed of warm restores while background compaction copies, divided by their speed alone."""
    engine = _engine(directory / "restored", 4 << 30)
    payload = os.urandom(block_bytes)
    kept = talk(0, payload, RESTORED_BLOCKS)
    engine.put(kept)
    engine.pin([(RecordKind.BLOCK, record.hash) for record in kept], 3600)
    into = [row.data for row in np.zeros((len(kept), block_bytes), np.uint8)]
    hashes = [record.hash for record in kept]

    def restore() -> float:
        """Restores per second."""
        started, count = time.perf_counter(), 0
        while time.perf_counter() - started < RESTORE_S:
            outcome = engine.reader.read_blocks(hashes, into, fingerprint=FINGERPRINT)
            assert outcome.num_good == len(hashes)
            engine.settle(RecordKind.BLOCK, hashes, outcome, num_missed=0)
            count += 1
        return count / (time.perf_counter() - started)

    restore()
    alone, next_to = [], []
    for number in range(rounds):
        _half_kill(engine, payload, first=1 + (number << 10))
        alone.append(restore())
        copied = engine.space.counters.compacted_bytes
        with _compacting(engine):
            next_to.append(restore())
        assert engine.space.counters.compacted_bytes > copied, "nothing was compacted"
    alone.append(restore())
    engine.close()
    return with_spread("restore_over_alone", over_neighbours(next_to, alone))


def _half_kill(engine: StorageEngine, payload: bytes, first: int) -> None:
    """Write segments in which every second conversation is dead."""
    num_talks = HALF_DEAD_BYTES // (TALK_BLOCKS * len(payload))
    written = [talk(first + number, payload) for number in range(num_talks)]
    for records in written:
        engine.put(records)
    engine.segments.roll(engine.clock_ms())
    engine.evict([(RecordKind.BLOCK, records[0].hash) for records in written[::2]])


@contextlib.contextmanager
def _compacting(engine: StorageEngine) -> Iterator[None]:
    """Run compaction at the background's rate in a separate thread, as the service does."""
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            engine.compact_in_background(GAIN_MIN)
            stop.wait(MAINTAIN_S)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def measure(directory: Path, rounds: int) -> dict[str, float]:
    """All figures, for large and for small blocks."""
    out: dict[str, float] = {}
    for name, block_bytes in (("large", LARGE), ("small", SMALL)):
        place = directory / f"upkeep-{name}"
        out |= {f"upkeep_{name}_{key}": value for key, value in churn(place, block_bytes, 512 << 20, rounds).items()}
        out |= {f"upkeep_{name}_{key}": value for key, value in restores(place, block_bytes, rounds).items()}
        shutil.rmtree(place)
    return out

"""The window pool in the store service's memory. It uses the calls for handoffs, with its own names."""

import numpy as np
import pytest

from antefix.errors import Unavailable
from antefix.record import PutResult, Record, RecordKind, Refusal, RefusalReason
from antefix.window_pool import StoreMemoryPool
from antefix_prefill.run_prompt import run_prompt

FINGERPRINT = b"f" * 32
NAMES = [bytes([n]) * 32 for n in range(1, 30)]
RNG = np.random.default_rng(6)
TURN = RNG.integers(0, 256, 330)
NEXT = np.concatenate((TURN, RNG.integers(0, 256, 40)))


def checkpoint(name, payload):
    return Record(
        kind=RecordKind.CHECKPOINT, hash=name, parent=b"p" * 32, fingerprint=FINGERPRINT, position=64, payload=payload
    )  # fmt: skip


async def test_the_nearest_one_comes_back(store):
    pool = StoreMemoryPool(store)
    for index in (0, 7, 20):
        assert await pool.put(checkpoint(NAMES[index], b"%d" % index))
    for first, expected in ((0, 0), (1, 7), (8, 20)):
        found = await pool.nearest(NAMES[first:], fingerprint=FINGERPRINT)
        assert (found.index + first, found.payload) == (expected, b"%d" % expected)
    assert await pool.nearest(NAMES[21:], fingerprint=FINGERPRINT) is None


async def test_a_checkpoint_never_meets_a_handoff_of_the_same_name(store):
    await StoreMemoryPool(store).put(checkpoint(NAMES[0], b"window"))
    assert (RecordKind.HANDOFF, NAMES[0]) not in store.records
    assert (RecordKind.POOLED, NAMES[0]) in store.records


async def test_no_room_is_told(store):
    async def full(records):
        return PutResult(num_stored=0, num_existing=0, refused={records[0].hash: Refusal(RefusalReason.FULL, "full")})

    store.put = full
    assert not await StoreMemoryPool(store).put(checkpoint(NAMES[0], b"window"))


async def test_a_dead_service_raises_for_the_caller_to_count(store):
    store.broken = {"get"}
    with pytest.raises(Unavailable):
        await StoreMemoryPool(store).nearest(NAMES, fingerprint=FINGERPRINT)


async def test_a_turn_resumes_from_it_as_from_disk(make_engine, make_prompt, store):
    logits = []
    for ends in ("pool", "disk"):
        store.records.clear()
        first, second = (make_engine(f"auto(ends={ends})") for _ in range(2))
        first.window_pool, second.window_pool = StoreMemoryPool(store), StoreMemoryPool(store)
        for engine, tokens in ((first, TURN), (second, NEXT)):
            computed = await run_prompt(engine, make_prompt(engine, tokens))
            engine.blocks.release(computed.sequence.block_table)
        assert (computed.report.plan, computed.report.hit_tokens) == ("checkpoint", 320)
        on_disk = [name for name in store.records if name[0] is RecordKind.CHECKPOINT]
        assert bool(on_disk) == (ends == "disk")
        logits.append(computed.logits)
    assert np.array_equal(*logits)


async def test_a_payload_of_a_wrong_size_is_a_miss(make_engine, make_prompt, store):
    first = make_engine("auto(ends=pool)")
    first.window_pool = StoreMemoryPool(store)
    computed = await run_prompt(first, make_prompt(first, TURN))
    first.blocks.release(computed.sequence.block_table)
    for name, payload in list(store.records.items()):
        if name[0] is RecordKind.POOLED:
            store.records[name] = payload[:-8]
    second = make_engine("auto(ends=pool)")
    second.window_pool = StoreMemoryPool(store)
    computed = await run_prompt(second, make_prompt(second, NEXT))
    assert computed.report.plan != "checkpoint"
    assert second.counters.by_kind == {"BlockCorrupt": 1}

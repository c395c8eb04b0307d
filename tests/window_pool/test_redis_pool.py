"""The window pool in a real Redis: its contents, lifetimes and limits, and the cost of its loss."""

import asyncio
import dataclasses

import numpy as np
import pytest
from redis.asyncio import Redis

from antefix.errors import BlockCorrupt, ConfigError, Unavailable
from antefix.record import Record, RecordKind
from antefix.window_pool import RedisWindowPool, check_address, open_window_pool
from antefix.window_pool.pool_format import HEADER_BYTES, pack, unpack
from antefix.window_pool.redis_pool import key_of
from antefix_prefill.run_prompt import run_prompt

FINGERPRINT, OTHER = b"f" * 32, b"o" * 32
NAMES = [bytes([n]) * 32 for n in range(1, 9)]


def checkpoint(name=NAMES[0], payload=b"window state" * 1000, ttl_s=60.0, fingerprint=FINGERPRINT):
    return Record(
        kind=RecordKind.CHECKPOINT, hash=name, parent=b"p" * 32, fingerprint=fingerprint, position=128,
        payload=payload, ttl_s=ttl_s,
    )  # fmt: skip


@pytest.fixture
async def pool(redis):
    made = RedisWindowPool(redis.url, bytes_max=1 << 30)
    yield made
    await made.close()


async def test_the_nearest_one_comes_back_whole(pool):
    assert await pool.put(checkpoint(NAMES[2], b"third"))
    assert await pool.put(checkpoint(NAMES[5], b"sixth"))
    found = await pool.nearest(NAMES, fingerprint=FINGERPRINT)
    assert (found.index, found.payload) == (2, b"third")
    assert await pool.nearest(NAMES[6:], fingerprint=FINGERPRINT) is None
    assert await pool.nearest([], fingerprint=FINGERPRINT) is None


async def test_another_fingerprint_never_sees_it(pool):
    await pool.put(checkpoint())
    assert await pool.nearest(NAMES, fingerprint=OTHER) is None


async def test_it_expires(pool, redis):
    await pool.put(checkpoint(ttl_s=30))
    assert await pool.nearest(NAMES, fingerprint=FINGERPRINT) is not None
    async with Redis.from_url(redis.url) as direct:
        left_ms = [await direct.pttl(key) for key in await direct.keys()]
    assert max(left_ms) <= 30_000 and min(left_ms) > 0
    await pool.put(checkpoint(NAMES[5], ttl_s=0.05))
    await asyncio.sleep(0.2)
    assert await pool.nearest(NAMES[5:], fingerprint=FINGERPRINT) is None


async def test_what_redis_evicts_is_a_miss(pool, redis):
    await pool.put(checkpoint())
    async with Redis.from_url(redis.url) as direct:
        await direct.flushall()
    assert await pool.nearest(NAMES, fingerprint=FINGERPRINT) is None


@pytest.mark.parametrize("at", [0, 5, 9, 20, 60, 82, HEADER_BYTES, -1])
async def test_a_damaged_value_is_a_miss_and_is_dropped(pool, redis, at):
    await pool.put(checkpoint())
    async with Redis.from_url(redis.url) as direct:
        key = key_of(NAMES[0], FINGERPRINT)
        value = bytearray(await direct.get(key))
        value[at] ^= 0x40
        await direct.set(key, bytes(value))
        assert await pool.nearest(NAMES, fingerprint=FINGERPRINT) is None
        assert pool.num_corrupt == 1
        assert await direct.get(key) is None


async def test_a_value_under_another_ones_key_is_a_miss(pool, redis):
    await pool.put(checkpoint(NAMES[0]))
    await pool.put(checkpoint(NAMES[0], fingerprint=OTHER))
    async with Redis.from_url(redis.url) as direct:
        right = await direct.get(key_of(NAMES[0], FINGERPRINT))
        await direct.set(key_of(NAMES[1], FINGERPRINT), right)
        await direct.set(key_of(NAMES[2], OTHER), right)
    assert await pool.nearest(NAMES[1:2], fingerprint=FINGERPRINT) is None
    assert await pool.nearest(NAMES[2:3], fingerprint=OTHER) is None
    assert pool.num_corrupt == 2


async def test_the_byte_bound_holds(redis):
    async with Redis.from_url(redis.url) as direct:
        used = (await direct.info("memory"))["used_memory"]
        pool = RedisWindowPool(redis.url, bytes_max=used + (4 << 20))
        kept = [await pool.put(checkpoint(name, bytes(1 << 20))) for name in NAMES]
        await pool.close()
        assert any(kept) and not all(kept)
        assert len(await direct.keys("*")) == sum(kept)


async def test_a_dead_server_is_unavailable_once_and_then_left_alone(start_redis):
    redis = await asyncio.to_thread(start_redis)
    pool = RedisWindowPool(redis.url, bytes_max=1 << 30)
    await pool.put(checkpoint())
    redis.kill()
    with pytest.raises(Unavailable):
        await pool.nearest(NAMES, fingerprint=FINGERPRINT)
    assert await pool.nearest(NAMES, fingerprint=FINGERPRINT) is None
    assert not await pool.put(checkpoint())


async def test_a_server_that_comes_back_is_used_again(start_redis):
    redis = await asyncio.to_thread(start_redis)
    pool = RedisWindowPool(redis.url, bytes_max=1 << 30, down_s=0.1)
    redis.kill()
    with pytest.raises(Unavailable):
        await pool.put(checkpoint())
    await asyncio.to_thread(redis.start)
    await asyncio.sleep(0.2)
    assert await pool.put(checkpoint())
    assert (await pool.nearest(NAMES, fingerprint=FINGERPRINT)).index == 0
    await pool.close()


async def test_it_works_on_a_cluster(start_cluster):
    server = await asyncio.to_thread(start_cluster)
    pool = RedisWindowPool(server.url, bytes_max=1 << 30)
    for name in NAMES[2:]:
        assert await pool.put(checkpoint(name, name))
    found = await pool.nearest(NAMES, fingerprint=FINGERPRINT)
    assert (found.index, found.payload) == (2, NAMES[2])
    await pool.close()


def test_a_value_names_what_it_is():
    value = pack(checkpoint())
    assert unpack(value, name=NAMES[0], fingerprint=FINGERPRINT) == checkpoint().payload
    for name, fingerprint in ((NAMES[1], FINGERPRINT), (NAMES[0], OTHER)):
        with pytest.raises(BlockCorrupt):
            unpack(value, name=name, fingerprint=fingerprint)
    for cut in (0, HEADER_BYTES - 1, len(value) - 1):
        with pytest.raises(BlockCorrupt):
            unpack(value[:cut], name=NAMES[0], fingerprint=FINGERPRINT)


@pytest.mark.parametrize("address", ["", "redis", "localhost:6379", "http://x", "tape"])
def test_an_invalid_address_is_refused(address):
    with pytest.raises(ConfigError):
        check_address(address)


def test_disk_means_no_pool(store):
    assert open_window_pool("disk", store, bytes_max=1) is None


RNG = np.random.default_rng(5)
TURN = RNG.integers(0, 256, 770)
NEXT = np.concatenate((TURN, RNG.integers(0, 256, 40)))


async def answer(engine, prompt):
    computed = await run_prompt(engine, prompt)
    engine.blocks.release(computed.sequence.block_table)
    return computed


async def test_a_turn_resumes_from_the_pool_and_its_loss_changes_no_answer(
    make_engine, make_prompt, store, start_redis
):
    """The pool is lost in mid-run: it works for the first turn, and is down at the third."""
    redis = await asyncio.to_thread(start_redis)

    def pooled():
        engine = make_engine("auto(ends=pool)")
        engine.window_pool = RedisWindowPool(redis.url, bytes_max=1 << 30)
        return engine

    first = pooled()
    await answer(first, make_prompt(first, TURN))
    assert not [kind for kind, _ in store.puts if kind is RecordKind.CHECKPOINT]
    second = pooled()
    hit = await answer(second, make_prompt(second, NEXT))
    assert (hit.report.plan, hit.report.hit_tokens) == ("checkpoint", 768)
    redis.kill()
    third = pooled()
    lost = await answer(third, make_prompt(third, NEXT))
    assert lost.report.plan == "replay" and third.counters.errors > 0
    # Checkpoints that the dead pool did not take are on disk.
    assert [kind for kind, _ in store.puts if kind is RecordKind.CHECKPOINT]
    store.records.clear()
    cold = make_engine("zero")
    want = await answer(cold, make_prompt(cold, NEXT))
    assert np.array_equal(hit.logits, want.logits) and np.array_equal(lost.logits, want.logits)
    for engine in (first, second, third):
        await engine.window_pool.close()


def test_a_record_of_another_size_packs_its_own_length():
    small = dataclasses.replace(checkpoint(), payload=b"x")
    assert unpack(pack(small), name=NAMES[0], fingerprint=FINGERPRINT) == b"x"

"""A purge of the window pool in a real Redis removes one owner's checkpoints and no others."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest
from redis.asyncio import Redis

from antefix.errors import Unavailable
from antefix.record import OWNER_BYTES
from antefix.window_pool import RedisWindowPool, redis_pool
from antefix.window_pool.redis_pool import key_of
from tests.window_pool.test_redis_pool import FINGERPRINT, NAMES, OTHER, checkpoint

TENANT, STRANGER = (letter * 16 + bytes(8) for letter in (b"a", b"b"))
USER = b"a" * 16 + b"u" * 8


@pytest.fixture
async def pool(redis):
    made = RedisWindowPool(redis.url, bytes_max=1 << 30)
    yield made
    await made.close()


async def fill(pool: RedisWindowPool) -> None:
    """Put two checkpoints of the tenant under two fingerprints, two of its user, and two of another tenant."""
    owners = (TENANT, TENANT, USER, USER, STRANGER, STRANGER)
    for number, (name, owner) in enumerate(zip(NAMES, owners, strict=False)):
        record = checkpoint(name, fingerprint=OTHER if number == 1 else FINGERPRINT)
        assert await pool.put(dataclasses.replace(record, tenant=owner))


async def names_left(redis) -> set[int]:
    async with Redis.from_url(redis.url) as direct:
        return {
            number
            for number, name in enumerate(NAMES)
            for fingerprint in (FINGERPRINT, OTHER)
            if await direct.exists(key_of(name, fingerprint))
        }


@pytest.mark.parametrize(
    "owner, num_gone, left", [(TENANT, 4, {4, 5}), (USER, 2, {0, 1, 4, 5}), (STRANGER, 2, {0, 1, 2, 3})]
)
async def test_an_owners_checkpoints_are_purged_and_no_others(pool, redis, monkeypatch, owner, num_gone, left):
    # Enough keys for several rounds of the cursor.
    monkeypatch.setattr(redis_pool, "_PURGED_AT_ONCE", 2)
    assert len(owner) == OWNER_BYTES
    await fill(pool)
    assert await pool.purge(owner) == num_gone
    assert await names_left(redis) == left
    assert await pool.purge(owner) == 0


async def test_other_keys_of_the_same_server_stay(pool, redis):
    await fill(pool)
    async with Redis.from_url(redis.url) as direct:
        await direct.set("antefix:lease:store-a", TENANT)
        await pool.purge(TENANT)
        assert await direct.get("antefix:lease:store-a") == TENANT


async def test_a_damaged_value_goes_with_any_owners(pool, redis):
    await fill(pool)
    async with Redis.from_url(redis.url) as direct:
        await direct.setrange(key_of(NAMES[4], FINGERPRINT), 40, b"xx")
    assert await pool.purge(TENANT) == 5
    assert await names_left(redis) == {5}


async def test_a_server_that_does_not_answer_is_an_error_and_no_success(redis):
    pool = RedisWindowPool("redis://127.0.0.1:1/0", bytes_max=1 << 30)
    with pytest.raises(Unavailable):
        await pool.purge(TENANT)
    await pool.close()


@pytest.mark.services
async def test_a_cluster_is_purged_on_all_its_nodes(start_cluster):
    """Keys of one owner lie on several nodes."""
    server = await asyncio.to_thread(start_cluster)
    pool = RedisWindowPool(server.url, bytes_max=1 << 30)
    names = [bytes([number]) * 32 for number in range(40)]
    for name in names:
        assert await pool.put(dataclasses.replace(checkpoint(name), tenant=TENANT))
    assert await pool.put(dataclasses.replace(checkpoint(b"x" * 32), tenant=STRANGER))
    assert await pool.purge(TENANT) == 40
    assert await pool.nearest(names, fingerprint=FINGERPRINT) is None
    assert await pool.nearest([b"x" * 32], fingerprint=FINGERPRINT) is not None
    await pool.close()

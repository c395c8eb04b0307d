"""A window pool in Redis, which several hosts share: one server, or a Redis Cluster.

Each checkpoint is one key, and no command names two keys, so any key may live on any node of a cluster:
    antefix:window:<fingerprint, 16 hex digits>:<block hash, 64 hex digits>     TTL: the mark's
Redis may evict keys at any time (`maxmemory-policy volatile-lru` suits it); that is a miss. A server that does
not answer is not asked for a while, so that a dead pool does not delay every request.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Any, TypeVar

from antefix.errors import BlockCorrupt, Unavailable
from antefix.record import Record
from antefix.redis_access import RedisAccess, redis_failures
from antefix.store_files.seal import SealBroken, Seals
from antefix.window_pool.pool_api import NAMES_MAX, Found
from antefix.window_pool.pool_format import HEADER_BYTES, is_owned, pack, unpack

T = TypeVar("T")
# A checkpoint of 4.6 MB at 10 Gbit/s takes 4 ms; a pool slower than this is slower than a replay on most machines.
TIMEOUT_S = 1.0
# How long a server that failed is not asked again.
DOWN_S = 2.0
# How often the server's memory use is read. Between two reads, this worker's own writes are added.
_LOOK_S = 1.0
_TTL_DEFAULT_S = 600.0
_PREFIX = "antefix:window:"
# Keys that a purge looks at in one go.
_PURGED_AT_ONCE = 500


class RedisWindowPool:
    """One worker's connection. Used from one event loop."""

    def __init__(
        self,
        where: RedisAccess | str,
        *,
        bytes_max: int,
        seals: Seals | None = None,
        timeout_s: float = TIMEOUT_S,
        down_s: float = DOWN_S,
    ) -> None:
        """seals: if given, only sealed checkpoints are accepted.

        Raises:  ConfigError: the URL cannot be used. Nothing connects yet.
        """
        self.bytes_max = bytes_max
        self.num_corrupt = self.num_forged = 0
        self._seals = seals
        self._timeout_s = timeout_s
        self._down_s = down_s
        self._down_until_s = 0.0
        self._used_bytes = 0
        self._looked_s = float("-inf")
        access = RedisAccess(url=where) if isinstance(where, str) else where
        self._redis: Any = access.connect(timeout_s=timeout_s)

    async def put(self, record: Record) -> bool:
        nbytes = memoryview(record.payload).nbytes + HEADER_BYTES
        if self._is_down() or not await self._has_room(nbytes):
            return False
        ttl_ms = max(1, round(1000 * (_TTL_DEFAULT_S if record.ttl_s is None else record.ttl_s)))
        await self._ask(self._redis.set(key_of(record.hash, record.fingerprint), pack(record), px=ttl_ms))
        self._used_bytes += nbytes
        return True

    async def nearest(self, names: Sequence[bytes], *, fingerprint: bytes, tenant: bytes = b"") -> Found | None:
        if not names or self._is_down():
            return None
        keys = [key_of(name, fingerprint) for name in names[:NAMES_MAX]]
        pipeline = self._redis.pipeline(transaction=False)
        for key in keys:
            pipeline.exists(key)
        held = await self._ask(pipeline.execute())
        for index, key in enumerate(keys):
            if not held[index]:
                continue
            payload = await self._get(names[index], key, fingerprint, tenant)
            if payload is not None:
                return Found(index=index, payload=payload)
        return None

    async def _get(self, name: bytes, key: str, fingerprint: bytes, tenant: bytes) -> bytes | None:
        """One checkpoint's payload. None: the checkpoint is gone, damaged or forged; if it is damaged or forged, it is
        counted and deleted.
        """
        value = await self._ask(self._redis.get(key))
        if value is None:
            return None
        try:
            return unpack(value, name=name, fingerprint=fingerprint, tenant=tenant, seals=self._seals)
        except BlockCorrupt as err:
            self.num_corrupt += 1
            self.num_forged += isinstance(err, SealBroken)
            await self._ask(self._redis.delete(key))
            return None

    async def purge(self, owner: bytes) -> int:
        """Drop an owner's checkpoints; without a user, all of a tenant's. Returns how many went.

        Raises:  Unavailable: the server failed; some are still there.
        """
        num_gone = 0
        keys = self._redis.scan_iter(match=f"{_PREFIX}*", count=_PURGED_AT_ONCE)
        while some := await self._ask(_next_of(keys, _PURGED_AT_ONCE)):
            pipeline = self._redis.pipeline(transaction=False)
            for key in some:
                pipeline.getrange(key, 0, HEADER_BYTES - 1)
            heads = await self._ask(pipeline.execute())
            for key, head in zip(some, heads, strict=True):
                # An empty value means that the key was deleted in the meantime.
                if head and is_owned(head, owner):
                    num_gone += await self._ask(self._redis.unlink(key))
        return num_gone

    async def check(self) -> None:
        """Raises:  Unavailable: the server does not answer."""
        await self._ask(self._redis.ping())

    async def close(self) -> None:
        await self._redis.aclose()

    async def _has_room(self, nbytes: int) -> bool:
        """Whether the server's memory stays within `bytes_max`, by its use a second ago plus what was written since."""
        now_s = time.monotonic()
        if now_s - self._looked_s > _LOOK_S:
            self._used_bytes = await self._memory_bytes()
            self._looked_s = now_s
        return self._used_bytes + nbytes <= self.bytes_max

    async def _memory_bytes(self) -> int:
        try:
            return await self._told_bytes()
        except (KeyError, ValueError, TypeError, AttributeError) as err:
            raise Unavailable("the Redis server of the window pool does not say how much memory it uses") from err

    async def _told_bytes(self) -> int:
        from redis.asyncio import RedisCluster

        if isinstance(self._redis, RedisCluster):
            nodes = await self._ask(self._redis.info("memory", target_nodes=RedisCluster.PRIMARIES))
            infos = nodes.values() if all(isinstance(info, dict) for info in nodes.values()) else [nodes]
            return sum(int(info["used_memory"]) for info in infos)
        return int((await self._ask(self._redis.info("memory")))["used_memory"])

    def _is_down(self) -> bool:
        return time.monotonic() < self._down_until_s

    async def _ask(self, call: Awaitable[T]) -> T:
        """Raises:  Unavailable: the server failed or took too long; it is not asked for a while."""
        try:
            # The client's own timeouts are per socket operation: a trickling server would pass them for minutes.
            async with asyncio.timeout(4 * self._timeout_s):
                return await call
        except redis_failures() as err:
            self._down_until_s = time.monotonic() + self._down_s
            raise Unavailable(f"the window pool does not answer: {str(err) or type(err).__name__}") from err


def key_of(name: bytes, fingerprint: bytes) -> str:
    """The Redis key of the checkpoint after block `name`; the fingerprint in the key lets an operator delete one
    model's keys.
    """
    return f"{_PREFIX}{fingerprint[:8].hex()}:{name.hex()}"


async def _next_of(keys: AsyncIterator[bytes], num_max: int) -> list[bytes]:
    found: list[bytes] = []
    while len(found) < num_max and (key := await anext(keys, None)) is not None:
        found.append(key)
    return found

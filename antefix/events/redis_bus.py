"""Workers' memory events through Redis Streams: each worker tells once, however many routers there are.

    antefix:memory:{<shard>}     a stream; a worker's shard follows from its address, and its entries are in order
        a  address of the worker      e  epoch      n  number of the event      k  kind: 1 stored, 2 evicted, 0 alive
        b  8 bytes of each block hash, one after the other

No command names two keys, and each key has its hash tag, so shards may lie anywhere in a cluster. Streams are trimmed:
who falls behind sees a gap in the numbers and takes a snapshot from the worker itself, as does whoever is new. A worker
says now and then that it is alive, with its last number: so the loss of its last events is noticed as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, Final, TypeVar

from redis.asyncio import Redis, RedisCluster
from redis.exceptions import RedisClusterException, RedisError

from antefix.errors import ConfigError
from antefix.events.log import KEY_BYTES, MemoryBatch, MemoryEvent, MemoryEventKind, MemoryLog

log = logging.getLogger("antefix.events")

T = TypeVar("T")

NUM_SHARDS: Final = 8
# Entries a shard keeps, about: at most 8 KiB each, seconds to minutes of a shard's workers.
STREAM_LENGTH_MAX: Final = 4_096
_ENTRIES_MAX: Final = 256
_ALIVE_S: Final = 2.0
_BLOCK_MS: Final = 1_000
_TIMEOUT_S: Final = 3.0
_RETRY_S: Final = 0.5
_ALIVE: Final = 0
_FAILURES: Final = (RedisError, RedisClusterException, OSError, TimeoutError)


def shard_of(address: str) -> int:
    """The same in every process."""
    return hashlib.blake2b(address.encode(), digest_size=1).digest()[0] % NUM_SHARDS


def stream_of(shard: int) -> str:
    return f"antefix:memory:{{{shard}}}"


def check_url(url: str) -> None:
    """Raises:  ConfigError: not a URL of Redis."""
    if url and not url.startswith(("redis://", "rediss://", "redis+cluster://")):
        raise ConfigError(f"events_redis must be a redis:// or redis+cluster:// URL, is {url!r}")


class MemoryPublisher:
    """`async with`: tells Redis what the log says for as long as the worker lives; without a URL it does nothing.

    The worker never waits for it. What it could not tell while Redis was away it tells afterwards, if the log still
    has it; if not, the numbers have a gap.
    """

    def __init__(self, url: str, memory: MemoryLog, address: str) -> None:
        """Raises:  ConfigError: the URL cannot be read. Nothing connects yet."""
        self._memory = memory
        self._address = address
        self._stream = stream_of(shard_of(address))
        self._redis = connect(url) if url else None
        self._told = 0
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> MemoryPublisher:
        if self._redis is not None:
            self._task = asyncio.create_task(self._tell(self._redis))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None and self._redis is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            await self._redis.aclose()

    async def _tell(self, redis: Any) -> None:
        changed, answers = asyncio.Event(), True
        unlisten = self._memory.listen(changed.set)
        try:
            while True:
                changed.clear()
                try:
                    while await self._tell_some(redis):
                        pass
                    answers = True
                except _FAILURES as err:
                    if answers:
                        log.warning("Redis does not take memory events: %s: %s", type(err).__name__, err)
                    answers = False
                    await asyncio.sleep(_RETRY_S)
                    continue
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), _ALIVE_S)
        finally:
            unlisten()

    async def _tell_some(self, redis: Any) -> bool:
        """Tell what is new, or that we are alive; whether there may be more."""
        memory = self._memory
        events = memory.since(memory.epoch, self._told)
        if events is None:
            # The ring has gone over us. Routers see the gap, and ask.
            self._told, events = memory.number, []
        part = events[:_ENTRIES_MAX]
        pipeline = redis.pipeline(transaction=False)
        for event in part:
            self._add(pipeline, event.number, int(event.kind), event.keys)
        if not part:
            self._add(pipeline, self._told, _ALIVE, b"")
        await asyncio.wait_for(pipeline.execute(), _TIMEOUT_S)
        if part:
            self._told = part[-1].number
        return len(events) > len(part)

    def _add(self, pipeline: Any, number: int, kind: int, keys: bytes) -> None:
        fields = {"a": self._address, "e": self._memory.epoch, "n": number, "k": kind, "b": keys}
        pipeline.xadd(self._stream, fields, maxlen=STREAM_LENGTH_MAX, approximate=True)


class MemoryReader:
    """Reads all shards from now on and hands each batch on, in order within a worker. lost: called when Redis is away.

    After a break it goes on at the last entry it had. A server that came back empty is read from its beginning: what
    is told twice is known by its number.
    """

    def __init__(self, url: str, take: Callable[[str, MemoryBatch], None], lost: Callable[[], None]) -> None:
        """Raises:  ConfigError: the URL cannot be read. Nothing connects yet."""
        self._redis = connect(url)
        self._take = take
        self._lost = lost
        self._tasks: list[asyncio.Task[None]] = []
        self._last: dict[int, str] = {}
        self.num_failures = 0

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._follow(shard)) for shard in range(NUM_SHARDS)]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._redis.aclose()

    async def _follow(self, shard: int) -> None:
        in_step = False
        while True:
            try:
                if not in_step:
                    await self._find_place(shard)
                    in_step = True
                await self._read(shard)
            except _FAILURES as err:
                if in_step and shard == 0:
                    log.warning("Redis gives no memory events: %s: %s", type(err).__name__, err)
                in_step = False
                self.num_failures += 1
                self._lost()
                await asyncio.sleep(_RETRY_S)

    async def _find_place(self, shard: int) -> None:
        """Where to go on: at the stream's end at first, later where it broke, unless the stream is another one now."""
        newest = await self._ask(self._redis.xrevrange(stream_of(shard), count=1))
        end = newest[0][0].decode() if newest else "0-0"
        last = self._last.setdefault(shard, end)
        if _order(end) < _order(last):
            self._last[shard] = "0-0"

    async def _read(self, shard: int) -> None:
        stream = stream_of(shard)
        call = self._redis.xread({stream: self._last[shard]}, count=_ENTRIES_MAX, block=_BLOCK_MS)
        found = await self._ask(call)
        for _, entries in found.items() if isinstance(found, dict) else found or ():
            for entry, fields in _flat(entries):
                self._last[shard] = entry.decode()
                if (batch := _batch(fields)) is not None:
                    self._take(fields[b"a"].decode(errors="replace"), batch)

    async def _ask(self, call: Awaitable[T]) -> T:
        return await asyncio.wait_for(call, _BLOCK_MS / 1000 + _TIMEOUT_S)


def connect(url: str) -> Any:
    """Raises:  ConfigError: the URL cannot be read."""
    options: dict[str, Any] = {"socket_timeout": _BLOCK_MS / 1000 + _TIMEOUT_S, "socket_connect_timeout": _TIMEOUT_S}
    try:
        if url.startswith("redis+cluster://"):
            return RedisCluster.from_url("redis://" + url.removeprefix("redis+cluster://"), **options)
        return Redis.from_url(url, **options)
    except ValueError as err:
        raise ConfigError(f"events_redis {url!r} is not a Redis URL: {err}") from err


def _batch(fields: dict[bytes, bytes]) -> MemoryBatch | None:
    """None: not an entry of ours; a router must not fall over what somebody else wrote there."""
    try:
        epoch, number, kind, keys = fields[b"e"], int(fields[b"n"]), int(fields[b"k"]), fields[b"b"]
        if kind == _ALIVE:
            return MemoryBatch(epoch=epoch, number=number)
        event = MemoryEvent(number=number, kind=MemoryEventKind(kind), keys=keys)
    except (KeyError, ValueError):
        return None
    if len(keys) % KEY_BYTES:
        return None
    return MemoryBatch(epoch=epoch, number=number, events=(event,))


def _flat(entries: Sequence[Any]) -> Sequence[Any]:
    """Entries of one stream: with RESP3 the client wraps them in one more list."""
    return entries[0] if entries and isinstance(entries[0], list) else entries


def _order(entry: str) -> tuple[int, int]:
    milliseconds, _, sequence = entry.partition("-")
    return int(milliseconds), int(sequence)

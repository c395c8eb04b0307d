"""Numbered events through Redis Streams: a source writes each event once, for any number of readers.

    antefix:memory:{<shard>}     a worker's shard follows from its address, so its entries are in order
    antefix:store:{<name>}       a stream a store; the name is what routers call it, their store_address
        a  the source: address or name      e  epoch      n  number of the event      k  kind, 0 alive
        b  8 bytes of each hash, one after the other      f  a store's: fingerprint
        s  stamp: when it was sent, in ns    g  generation of the key    m  MAC over all of them and the stream
        v  the same with the source's epoch, of which `e` is the public name

No command names two keys, and each key has its hash tag, so streams may lie anywhere in a cluster. Streams are trimmed:
a reader that falls behind sees a gap in the numbers and takes a snapshot from the source itself, as a new reader does.
A source sends a heartbeat with its last number at intervals, so readers also notice the loss of its last events.

Anyone with access to Redis could write entries, so entries that this deployment did not sign are dropped and counted
(`event_seal`).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, TypeVar

from antefix.end_tasks import end_tasks
from antefix.events.block_events import KEY_BYTES, BlockEvent, EventKind
from antefix.events.event_seal import DropReason, EventCheck, EventKeys, Stamps
from antefix.events.numbered_log import ALIVE_S, Batch, Cursor, NumberedLog
from antefix.keep_running import keep_running
from antefix.redis_access import RedisAccess, redis_failures

log = logging.getLogger("antefix.events")

T = TypeVar("T")

# An entry has at most 8 KiB of keys, so a shard's stream takes 32 MiB at most.
MEMORY_STREAMS: Final = tuple(f"antefix:memory:{{{shard}}}" for shard in range(8))
# About how many entries a stream keeps: seconds to minutes of its sources' events.
STREAM_LENGTH_MAX: Final = 4_096
_ALIVE: Final = 0
_ENTRIES_MAX: Final = 256
_BLOCK_MS: Final = 1_000
_TIMEOUT_S: Final = 3.0
_RETRY_S: Final = 0.5


def connect(where: RedisAccess | str) -> Any:
    """Raises:  ConfigError: the URL cannot be used."""
    access = RedisAccess(url=where) if isinstance(where, str) else where
    return access.connect(timeout_s=_BLOCK_MS / 1000 + _TIMEOUT_S, connect_timeout_s=_TIMEOUT_S)


def memory_stream(address: str) -> str:
    """The stream of a worker's events, by its address. Every process computes the same stream name for an address."""
    return MEMORY_STREAMS[hashlib.blake2b(address.encode(), digest_size=1).digest()[0] % len(MEMORY_STREAMS)]


def store_stream(name: str) -> str:
    return f"antefix:store:{{{name}}}"


class StreamPublisher:
    """Within `async with`, writes the events of a source's log to Redis. Without the URL of a Redis server, the writer
    does nothing.

    The source of events never waits for Redis. Events that could not be written while Redis was unreachable are written
    afterwards, if the log still has them; otherwise readers see a gap in the numbers.
    """

    def __init__(
        self,
        where: RedisAccess | str,
        source: NumberedLog[BlockEvent],
        stream: str,
        name: str,
        *,
        keys: EventKeys,
    ) -> None:
        """where: the Redis server; if empty, nothing is written. name: the source's name for readers.

        Raises:  ConfigError: the URL cannot be used. This does not connect yet.
        """
        self._source = source
        self._stream = stream
        self._name = name
        self._keys = keys
        self._stamps = Stamps()
        self._redis = connect(where) if where else None
        self._told = Cursor(epoch=source.cursor.epoch)
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> StreamPublisher:
        if self._redis is not None:
            self._task = keep_running(functools.partial(self._tell, self._redis), "the writer of events to Redis")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None and self._redis is not None:
            await end_tasks([self._task])
            await self._redis.aclose()

    async def _tell(self, redis: Any) -> None:
        answers = True
        with self._source.news() as changed:
            while True:
                changed.clear()
                try:
                    while await self._tell_some(redis):
                        pass
                    answers = True
                except redis_failures() as err:
                    if answers:
                        log.warning("Redis does not accept events: %s: %s", type(err).__name__, err)
                    answers = False
                    await asyncio.sleep(_RETRY_S)
                    continue
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(ALIVE_S):
                        await changed.wait()

    async def _tell_some(self, redis: Any) -> bool:
        """Write new events, or a heartbeat. Returns whether more events remain to be written."""
        # Skip events that the ring has already dropped. Readers see the gap and take a snapshot.
        batch = self._source.since(self._told) or Batch(cursor=self._source.cursor)
        pipeline = redis.pipeline(transaction=False)
        first = batch.cursor.number - len(batch.events) + 1
        for number, event in enumerate(batch.events, first):
            self._add(pipeline, number, _pack(event))
        if not batch.events:
            self._add(pipeline, batch.cursor.number, {"k": _ALIVE})
        async with asyncio.timeout(_TIMEOUT_S):
            await pipeline.execute()
        self._told = batch.cursor
        return bool(batch.events) and batch.cursor != self._source.cursor

    def _add(self, pipeline: Any, number: int, fields: dict[str, Any]) -> None:
        entry = {**fields, "a": self._name, "n": number, "s": self._stamps.next()}
        signed: Any = self._keys.sign(self._stream, entry, epoch=self._told.epoch)
        pipeline.xadd(self._stream, signed, maxlen=STREAM_LENGTH_MAX, approximate=True)


class StreamReader:
    """Reads streams from now on and passes each entry on with its source's name, in order within a stream.

    After a break, the reader continues after the last entry that it read. If a Redis server comes back empty, its
    streams are read from the beginning. Readers recognise repeated events by their numbers.
    """

    def __init__(
        self,
        where: RedisAccess | str,
        streams: Sequence[str],
        take: Callable[[str, Batch[BlockEvent]], object],
        lost: Callable[[str], None],
        *,
        keys: EventKeys,
    ) -> None:
        """lost: called with a stream when it cannot be read.

        Raises:  ConfigError: the URL cannot be used. Nothing connects yet.
        """
        self._redis = connect(where)
        self._check = EventCheck(keys)
        self._streams = streams
        self._take = take
        self._lost = lost
        self._tasks: list[asyncio.Task[None]] = []
        self._last: dict[str, str] = {}

    @property
    def dropped(self) -> Mapping[DropReason, int]:
        """How many entries of Redis streams were dropped, by reason."""
        return self._check.dropped

    def start(self) -> None:
        self._tasks = [
            keep_running(
                functools.partial(self._follow, stream),
                "the reader of events from Redis",
                failed=functools.partial(self._missed, stream),
            )
            for stream in self._streams
        ]

    async def close(self) -> None:
        await end_tasks(self._tasks)
        await self._redis.aclose()

    def _missed(self, stream: str, _err: Exception) -> None:
        self._lost(stream)

    async def _follow(self, stream: str) -> None:
        in_step = False
        while True:
            try:
                if not in_step:
                    await self._find_place(stream)
                    in_step = True
                await self._read(stream)
            except redis_failures() as err:
                if in_step and stream == self._streams[0]:
                    log.warning("events cannot be read from Redis: %s: %s", type(err).__name__, err)
                in_step = False
                self._lost(stream)
                await asyncio.sleep(_RETRY_S)

    async def _find_place(self, stream: str) -> None:
        """Find where to continue: first at the stream's end, later after the last entry read, unless the stream was
        replaced by a new one.
        """
        newest = await self._ask(self._redis.xrevrange(stream, count=1))
        end = newest[0][0].decode() if newest else "0-0"
        last = self._last.setdefault(stream, end)
        if _order(end) < _order(last):
            self._last[stream] = "0-0"

    async def _read(self, stream: str) -> None:
        call = self._redis.xread({stream: self._last[stream]}, count=_ENTRIES_MAX, block=_BLOCK_MS)
        found = await self._ask(call)
        for _, entries in found.items() if isinstance(found, dict) else found or ():
            for entry, fields in _flat(entries):
                self._last[stream] = entry.decode()
                self._hand_on(stream, fields)

    def _hand_on(self, stream: str, fields: dict[bytes, bytes]) -> None:
        """Pass an entry on. Ignores entries in an unknown form, so that foreign entries cannot make the reader fail."""
        try:
            if not self._check.lets_in(stream, fields):
                return
            name = fields[b"a"].decode(errors="replace")
            cursor = Cursor(epoch=fields[b"e"], number=int(fields[b"n"]))
            check = functools.partial(self._check.is_of, stream=stream, fields=fields)
            batch = Batch(cursor=cursor, events=_unpack(fields), is_of=check)
        except (KeyError, ValueError):
            self._check.drop(DropReason.MALFORMED)
            return
        self._take(name, batch)

    async def _ask(self, call: Awaitable[T]) -> T:
        async with asyncio.timeout(_BLOCK_MS / 1000 + _TIMEOUT_S):
            return await call


def _pack(event: BlockEvent) -> dict[str, Any]:
    fields = {"k": int(event.kind), "b": event.keys().tobytes()}
    return {**fields, "f": event.fingerprint} if event.fingerprint else fields


def _unpack(fields: dict[bytes, bytes]) -> tuple[BlockEvent, ...]:
    """The events of an entry of a Redis stream; an entry without events is a heartbeat. Raises: KeyError, ValueError:
    the entry has an unknown form.
    """
    if int(fields[b"k"]) == _ALIVE:
        return ()
    kind = EventKind(int(fields[b"k"]))
    event = BlockEvent(kind=kind, hashes=fields[b"b"], hash_bytes=KEY_BYTES, fingerprint=fields.get(b"f", b""))
    if kind is EventKind.UNKNOWN or not event.is_whole:
        raise ValueError("not an event")
    return (event,)


def _flat(entries: Sequence[Any]) -> Sequence[Any]:
    """Entries of one stream: with RESP3 the client wraps them in one more list."""
    return entries[0] if entries and isinstance(entries[0], list) else entries


def _order(entry: str) -> tuple[int, int]:
    milliseconds, _, sequence = entry.partition("-")
    return int(milliseconds), int(sequence)

"""Numbered events through Redis Streams: who has a log tells each event once, however many read.

    antefix:memory:{<shard>}     a worker's shard follows from its address, so its entries are in order
    antefix:store:{<name>}       a stream a store; the name is what routers call it, their store_address
        a  the source: address or name      e  epoch      n  number of the event      k  kind, 0 alive
        b  8 bytes of each hash, one after the other      f  a store's: fingerprint
        s  stamp: when it was sent, in ns    g  generation of the key    m  MAC over all of them and the stream
        v  the same with the source's epoch, of which `e` is the public name

No command names two keys, and each key has its hash tag, so streams may lie anywhere in a cluster. Streams are trimmed:
who falls behind sees a gap in the numbers and takes a snapshot from the source itself, as a new one does. A source
says now and then that it is alive, with its last number: so the loss of its last events is noticed as well.

Anyone who can write to Redis could say anything, so what is not signed by this deployment is dropped and counted
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

from redis.exceptions import RedisClusterException, RedisError

from antefix.end_tasks import end_tasks
from antefix.events.block_events import KEY_BYTES, BlockEvent, EventKind
from antefix.events.event_seal import DropReason, EventCheck, EventKeys, Stamps
from antefix.events.numbered_log import ALIVE_S, Batch, Cursor, NumberedLog
from antefix.redis_access import RedisAccess

log = logging.getLogger("antefix.events")

T = TypeVar("T")

# An entry is at most 8 KiB of keys: a shard's stream takes 32 MiB at most.
MEMORY_STREAMS: Final = tuple(f"antefix:memory:{{{shard}}}" for shard in range(8))
# Entries a stream keeps, about: seconds to minutes of its sources.
STREAM_LENGTH_MAX: Final = 4_096
_ALIVE: Final = 0
_ENTRIES_MAX: Final = 256
_BLOCK_MS: Final = 1_000
_TIMEOUT_S: Final = 3.0
_RETRY_S: Final = 0.5
_FAILURES: Final = (RedisError, RedisClusterException, OSError, TimeoutError)


def connect(where: RedisAccess | str) -> Any:
    """Raises:  ConfigError: the URL cannot be used."""
    access = RedisAccess(url=where) if isinstance(where, str) else where
    return access.connect(timeout_s=_BLOCK_MS / 1000 + _TIMEOUT_S, connect_timeout_s=_TIMEOUT_S)


def memory_stream(address: str) -> str:
    """The same in every process."""
    return MEMORY_STREAMS[hashlib.blake2b(address.encode(), digest_size=1).digest()[0] % len(MEMORY_STREAMS)]


def store_stream(name: str) -> str:
    return f"antefix:store:{{{name}}}"


class StreamPublisher:
    """`async with`: tells Redis what a source's log says for as long as it lives; without a URL it does nothing.

    The source never waits for it. What it could not tell while Redis was away it tells afterwards, if the log still
    has it; if not, the numbers have a gap.
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
        """where: empty: nothing is told.  name: what readers call the source.

        Raises:  ConfigError: the URL cannot be used. Nothing connects yet.
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
            self._task = asyncio.create_task(self._tell(self._redis))
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
                except _FAILURES as err:
                    if answers:
                        log.warning("Redis does not take events: %s: %s", type(err).__name__, err)
                    answers = False
                    await asyncio.sleep(_RETRY_S)
                    continue
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(ALIVE_S):
                        await changed.wait()

    async def _tell_some(self, redis: Any) -> bool:
        """Tell what is new, or that the source is alive; whether there is more."""
        # Without what the ring has gone over: readers see the gap, and ask.
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
    """Reads some streams from now on and hands each entry on with its source's name, in order within a stream.

    After a break it continues at the last entry it had. A server that came back empty is read from its beginning: what
    is told twice is known by its number.
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
        """Entries that were not believed, by reason."""
        return self._check.dropped

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._follow(stream)) for stream in self._streams]

    async def close(self) -> None:
        await end_tasks(self._tasks)
        await self._redis.aclose()

    async def _follow(self, stream: str) -> None:
        in_step = False
        while True:
            try:
                if not in_step:
                    await self._find_place(stream)
                    in_step = True
                await self._read(stream)
            except _FAILURES as err:
                if in_step and stream == self._streams[0]:
                    log.warning("Redis gives no events: %s: %s", type(err).__name__, err)
                in_step = False
                self._lost(stream)
                await asyncio.sleep(_RETRY_S)

    async def _find_place(self, stream: str) -> None:
        """Where to continue: at the stream's end at first, later where it broke, unless the stream is another one
        now."""
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
        """Whatever is no entry of ours is left out: a reader must not fall over what somebody else wrote there."""
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
    """Empty: a sign of life.  Raises:  KeyError, ValueError: nothing that we know, so it counts as no event."""
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

"""Numbered events through Redis Streams: who has a log tells each event once, however many read.

Knows nothing of what the events say. No command names two keys, and each key has its hash tag, so streams may lie
anywhere in a cluster. Streams are trimmed: who falls behind sees a gap in the numbers and takes a snapshot from the
source itself, as does whoever is new. A source says now and then that it is alive, with its last number: so the loss of
its last events is noticed as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, Final, Generic, Protocol, TypeVar

from redis.asyncio import Redis, RedisCluster
from redis.exceptions import RedisClusterException, RedisError

from antefix.errors import ConfigError

log = logging.getLogger("antefix.events")

T = TypeVar("T")
E = TypeVar("E")
E_co = TypeVar("E_co", covariant=True)
Fields = dict[str, str | int | bytes]

# Entries a stream keeps, about: seconds to minutes of its sources.
STREAM_LENGTH_MAX: Final = 4_096
ALIVE: Final = 0
# How often a source that has no news says that it is alive.
ALIVE_S: Final = 2.0
_ENTRIES_MAX: Final = 256
_BLOCK_MS: Final = 1_000
_TIMEOUT_S: Final = 3.0
_RETRY_S: Final = 0.5
_FAILURES: Final = (RedisError, RedisClusterException, OSError, TimeoutError)


class NumberedLog(Protocol[E_co]):
    """A ring of events with numbers that follow each other. epoch: its life.  number: of the last event."""

    @property
    def epoch(self) -> bytes: ...
    @property
    def number(self) -> int: ...
    def since(self, epoch: bytes, number: int) -> Sequence[E_co] | None:
        """Events after `number`; None when they are not in the ring any more."""

    def listen(self, wake: Callable[[], None]) -> Callable[[], None]:
        """Have `wake` called when there is something new. Returns its undoing."""


def connect(url: str) -> Any:
    """Raises:  ConfigError: the URL cannot be read."""
    options: dict[str, Any] = {"socket_timeout": _BLOCK_MS / 1000 + _TIMEOUT_S, "socket_connect_timeout": _TIMEOUT_S}
    try:
        if url.startswith("redis+cluster://"):
            return RedisCluster.from_url("redis://" + url.removeprefix("redis+cluster://"), **options)
        return Redis.from_url(url, **options)
    except ValueError as err:
        raise ConfigError(f"events_redis {url!r} is not a Redis URL: {err}") from err


class StreamPublisher(Generic[E]):
    """`async with`: tells Redis what the log says for as long as its source lives; without a URL it does nothing.

    The source never waits for it. What it could not tell while Redis was away it tells afterwards, if the log still
    has it; if not, the numbers have a gap. fields_of: an event's; of None, those of a sign of life.
    """

    def __init__(self, url: str, source: NumberedLog[E], stream: str, fields_of: Callable[[E | None], Fields]) -> None:
        """Raises:  ConfigError: the URL cannot be read. Nothing connects yet."""
        self._source = source
        self._stream = stream
        self._fields_of = fields_of
        self._redis = connect(url) if url else None
        self._told = 0
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> StreamPublisher[E]:
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
        unlisten = self._source.listen(changed.set)
        try:
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
                    await asyncio.wait_for(changed.wait(), ALIVE_S)
        finally:
            unlisten()

    async def _tell_some(self, redis: Any) -> bool:
        """Tell what is new, or that we are alive; whether there may be more."""
        source = self._source
        events = source.since(source.epoch, self._told)
        if events is None:
            # The ring has gone over us. Readers see the gap, and ask.
            self._told, events = source.number, ()
        part = events[:_ENTRIES_MAX]
        pipeline = redis.pipeline(transaction=False)
        for number, event in enumerate(part, self._told + 1):
            self._add(pipeline, number, self._fields_of(event))
        if not part:
            self._add(pipeline, self._told, self._fields_of(None))
        await asyncio.wait_for(pipeline.execute(), _TIMEOUT_S)
        self._told += len(part)
        return len(events) > len(part)

    def _add(self, pipeline: Any, number: int, fields: Fields) -> None:
        entry = {**fields, "e": self._source.epoch, "n": number}
        pipeline.xadd(self._stream, entry, maxlen=STREAM_LENGTH_MAX, approximate=True)


class StreamReader:
    """Reads some streams from now on and hands each entry on, in order within a stream. lost: Redis is away.

    After a break it goes on at the last entry it had. A server that came back empty is read from its beginning: what
    is told twice is known by its number.
    """

    def __init__(
        self,
        url: str,
        streams: Sequence[str],
        take: Callable[[dict[bytes, bytes]], None],
        lost: Callable[[], None],
    ) -> None:
        """Raises:  ConfigError: the URL cannot be read. Nothing connects yet."""
        self._redis = connect(url)
        self._streams = streams
        self._take_fields = take
        self._lost = lost
        self._tasks: list[asyncio.Task[None]] = []
        self._last: dict[str, str] = {}
        self.num_failures = 0

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._follow(stream)) for stream in self._streams]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
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
                self.num_failures += 1
                self._lost()
                await asyncio.sleep(_RETRY_S)

    async def _find_place(self, stream: str) -> None:
        """Where to go on: at the stream's end at first, later where it broke, unless the stream is another one now."""
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
                self._take_fields(fields)

    async def _ask(self, call: Awaitable[T]) -> T:
        return await asyncio.wait_for(call, _BLOCK_MS / 1000 + _TIMEOUT_S)


def _flat(entries: Sequence[Any]) -> Sequence[Any]:
    """Entries of one stream: with RESP3 the client wraps them in one more list."""
    return entries[0] if entries and isinstance(entries[0], list) else entries


def _order(entry: str) -> tuple[int, int]:
    milliseconds, _, sequence = entry.partition("-")
    return int(milliseconds), int(sequence)

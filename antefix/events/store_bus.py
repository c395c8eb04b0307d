"""A store's events through Redis Streams: the store tells once, however many routers follow it.

    antefix:store:{<name>}       a stream a store; the name is what routers call it, their store_address
        e  epoch      n  number of the event      k  kind as in kvstore.proto, 0 alive      f  fingerprint
        b  8 bytes of each hash, one after the other

How streams are told and read, and what happens when Redis is away, is `redis_stream`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Protocol

from antefix.events.memory_log import KEY_BYTES
from antefix.events.redis_stream import ALIVE, Fields, NumberedLog, StreamPublisher, StreamReader
from antefix.store.store_watch import Cursor, StoreEvent, StoreEventKind, WatchBatch


class Told(Protocol):
    """What a store's log says of one change."""

    @property
    def kind(self) -> int: ...
    @property
    def hashes(self) -> Sequence[bytes]: ...
    @property
    def fingerprint(self) -> bytes: ...


def stream_of(name: str) -> str:
    return f"antefix:store:{{{name}}}"


class StorePublisher(StreamPublisher[Told]):
    """`async with`: tells Redis what a store's log says. The log may wake its listeners in any thread."""

    def __init__(self, url: str, events: NumberedLog[Told], name: str) -> None:
        """Raises:  ConfigError: the URL cannot be read. Nothing connects yet."""
        super().__init__(url, _Threaded(events), stream_of(name), _fields_of)


class StoreReader(StreamReader):
    """Reads one store's stream and hands each batch on. lost: called when Redis is away."""

    def __init__(self, url: str, name: str, take: Callable[[WatchBatch], None], lost: Callable[[], None]) -> None:
        """Raises:  ConfigError: the URL cannot be read. Nothing connects yet."""
        super().__init__(url, [stream_of(name)], self._hand_on, lost)
        self._take = take

    def _hand_on(self, fields: dict[bytes, bytes]) -> None:
        if (batch := _batch(fields)) is not None:
            self._take(batch)


class _Threaded:
    """A log whose listeners are woken in this event loop."""

    def __init__(self, events: NumberedLog[Told]) -> None:
        self._events = events

    @property
    def epoch(self) -> bytes:
        return self._events.epoch

    @property
    def number(self) -> int:
        return self._events.number

    def since(self, epoch: bytes, number: int) -> Sequence[Told] | None:
        return self._events.since(epoch, number)

    def listen(self, wake: Callable[[], None]) -> Callable[[], None]:
        loop = asyncio.get_running_loop()

        def wake_in_loop() -> None:
            # A loop that has closed has nobody to wake.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(wake)

        return self._events.listen(wake_in_loop)


def _fields_of(event: Told | None) -> Fields:
    if event is None:
        return {"k": ALIVE, "f": b"", "b": b""}
    keys = b"".join([name[:KEY_BYTES] for name in event.hashes])
    return {"k": int(event.kind), "f": event.fingerprint, "b": keys}


def _batch(fields: dict[bytes, bytes]) -> WatchBatch | None:
    """None: not an entry of ours. The hashes of its event are their first 8 bytes."""
    try:
        cursor = Cursor(epoch=fields[b"e"], number=int(fields[b"n"]))
        kind, fingerprint, keys = int(fields[b"k"]), fields[b"f"], fields[b"b"]
        if kind == ALIVE:
            return WatchBatch(cursor=cursor, snapshot_begins=False, events=[])
        if len(keys) % KEY_BYTES:
            return None
        hashes = [keys[first : first + KEY_BYTES] for first in range(0, len(keys), KEY_BYTES)]
        event = StoreEvent(kind=StoreEventKind(kind), hashes=hashes, fingerprint=fingerprint)
    except (KeyError, ValueError):
        return None
    return WatchBatch(cursor=cursor, snapshot_begins=False, events=[event])

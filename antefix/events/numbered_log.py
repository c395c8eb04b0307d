"""Numbered events: what changed at a source, for those who keep an index of it elsewhere. Never knows what they say.

Numbers count up within an epoch; an epoch is one life of the source. A watcher that knows the epoch and a number still
in the ring continues there; any other takes a snapshot first, which stands for a number, so that nothing is missed or
told twice. Telling appends to a bounded ring and never waits for anybody.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Generic, Protocol, TypeVar

# One batch, which is one message on a stream: at most so many events, of blocks whose hashes are 1 MiB.
BATCH_EVENTS_MAX: Final = 256
BATCH_BLOCKS_MAX: Final = 32_768
# One event, so that one that does not fit a message cannot come to be.
EVENT_BLOCKS_MAX: Final = 1_024
SNAPSHOT_BLOCKS: Final = 8_192
# How often a source that has no news says that it is alive, where nothing else would show it.
ALIVE_S: Final = 2.0


class Event(Protocol):
    """All that a log must know of what it numbers."""

    @property
    def num_blocks(self) -> int: ...


E = TypeVar("E", bound=Event)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """Where a watcher stands: after event `number` of `epoch`. The empty one asks for a snapshot."""

    epoch: bytes = b""
    number: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch(Generic[E]):
    """Events that follow each other; the last one's number is the cursor's. Without events: the source stands there.

    snapshot: a piece of what the source has instead, of use only as a whole. All pieces stand for one number.
    is_of: through Redis, where the cursor has the epoch's public name: whether the process of an epoch said this.
    """

    cursor: Cursor
    events: tuple[E, ...] = ()
    snapshot: bool = False
    snapshot_begins: bool = False
    snapshot_ends: bool = False
    is_of: Callable[[bytes], bool] | None = field(default=None, compare=False)


class NumberedLog(Generic[E]):
    """The ring of a source's events. Thread-safe. num_blocks_max: how many are kept for watchers that fall behind."""

    def __init__(self, *, num_blocks_max: int) -> None:
        self._num_blocks_max = num_blocks_max
        self._epoch = secrets.token_bytes(16)
        self._lock = threading.Lock()
        self._number = 0
        self._num_blocks = 0
        self._ring: deque[E] = deque()
        self._listeners: set[Callable[[], None]] = set()

    @property
    def cursor(self) -> Cursor:
        """Of the last event."""
        return Cursor(epoch=self._epoch, number=self._number)

    def restart(self) -> None:
        """Begin another epoch: what was told does not lead to what is there now, so watchers take a snapshot."""
        with self._lock:
            self._epoch = secrets.token_bytes(16)
            self._number = self._num_blocks = 0
            self._ring.clear()
        self._wake()

    def append(self, events: Iterable[E]) -> None:
        """Number these events and wake who waits for them."""
        self._add(events)
        self._wake()

    def since(self, cursor: Cursor) -> Batch[E] | None:
        """The next events after `cursor`, no more than fit one message; None: the watcher must take a snapshot."""
        with self._lock:
            behind = self._number - cursor.number
            if cursor.epoch != self._epoch or not 0 <= behind <= len(self._ring):
                return None
            first = len(self._ring) - behind
            events: list[E] = []
            num_blocks = 0
            for index in range(first, min(len(self._ring), first + BATCH_EVENTS_MAX)):
                num_blocks += self._ring[index].num_blocks
                if events and num_blocks > BATCH_BLOCKS_MAX:
                    break
                events.append(self._ring[index])
        return Batch(cursor=Cursor(epoch=self._epoch, number=cursor.number + len(events)), events=tuple(events))

    @contextlib.contextmanager
    def news(self) -> Iterator[asyncio.Event]:
        """An event of the running loop that is set when there is something new, in whatever thread that came to be."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            # A loop that has closed has nobody to wake.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(changed.set)

        with self._lock:
            self._listeners.add(wake)
        try:
            yield changed
        finally:
            with self._lock:
                self._listeners.discard(wake)

    def _add(self, events: Iterable[E]) -> None:
        with self._lock:
            for event in events:
                self._number += 1
                self._ring.append(event)
                self._num_blocks += event.num_blocks
            while self._num_blocks > self._num_blocks_max and len(self._ring) > 1:
                self._num_blocks -= self._ring.popleft().num_blocks

    def _wake(self) -> None:
        with self._lock:
            listeners = tuple(self._listeners)
        for wake in listeners:
            wake()


def snapshot_batches(cursor: Cursor, pieces: Iterable[Sequence[E]]) -> Iterator[Batch[E]]:
    """A snapshot that stands for `cursor`, of events that say what is there. Takes `pieces` one by one."""
    coming = iter(pieces)
    piece, begins = next(coming, ()), True
    while True:
        following = next(coming, None)
        yield Batch(
            cursor=cursor,
            events=tuple(piece),
            snapshot=True,
            snapshot_begins=begins,
            snapshot_ends=following is None,
        )
        if following is None:
            return
        piece, begins = following, False


async def watch_log(
    log: NumberedLog[E], cursor: Cursor, snapshot: Callable[[], AsyncGenerator[Batch[E], None]]
) -> AsyncGenerator[Batch[E], None]:
    """What a service tells one watcher, for as long as that listens: events from `cursor` on, a snapshot before them
    where the cursor is of another epoch or too old. The first answer comes at once, so that one who missed nothing
    knows it.
    """
    with log.news() as changed:
        answered = False
        while True:
            changed.clear()
            batch = log.since(cursor)
            if batch is None:
                async with contextlib.aclosing(snapshot()) as pieces:
                    async for piece in pieces:
                        cursor = piece.cursor
                        yield piece
            elif batch.events or not answered:
                cursor = batch.cursor
                yield batch
            else:
                await changed.wait()
            answered = True

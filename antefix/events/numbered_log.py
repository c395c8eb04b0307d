"""Numbered events about changes at a source, for other processes that index it. Never looks into the events.

Numbers count up within an epoch, which is one run of the source's process. A watcher that knows the epoch and a number
that is still in the ring continues there. Any other watcher first takes a snapshot that is tied to an event number, so
that the watcher misses no event and gets none twice. The source appends to a bounded ring and never waits for watchers.
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

# The most events in one batch, which is one message of a stream; and the most blocks, whose hashes take 1 MiB.
BATCH_EVENTS_MAX: Final = 256
BATCH_BLOCKS_MAX: Final = 32_768
# The most blocks in one event, so that every event fits into a message.
EVENT_BLOCKS_MAX: Final = 1_024
SNAPSHOT_BLOCKS: Final = 8_192
# How often a source without news sends a heartbeat, where nothing else shows that it is alive.
ALIVE_S: Final = 2.0


class Event(Protocol):
    """What a log must know about an event."""

    @property
    def num_blocks(self) -> int: ...


E = TypeVar("E", bound=Event)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """A watcher's position in the log: after event `number` of `epoch`. The empty cursor asks for a snapshot."""

    epoch: bytes = b""
    number: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch(Generic[E]):
    """Consecutive events of a log; the cursor has the number of the last event. A batch without events says that its
    number is the source's last number.

    snapshot: whether the batch is a piece of a snapshot instead. A snapshot is valid only when all its parts have
    arrived; all parts have the same number. is_of: for batches through Redis, whose cursor has the epoch's public name:
    says whether the process with a given epoch signed the batch.
    """

    cursor: Cursor
    events: tuple[E, ...] = ()
    snapshot: bool = False
    snapshot_begins: bool = False
    snapshot_ends: bool = False
    is_of: Callable[[bytes], bool] | None = field(default=None, compare=False)


class NumberedLog(Generic[E]):
    """A bounded ring of a source's latest events. Thread-safe.

    num_blocks_max: how many blocks' events are kept for watchers that fall behind.
    """

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
        """The cursor after the last event in the log."""
        return Cursor(epoch=self._epoch, number=self._number)

    def restart(self) -> None:
        """Begin a new epoch, so that watchers take a snapshot: the earlier events do not lead to the present state."""
        with self._lock:
            self._epoch = secrets.token_bytes(16)
            self._number = self._num_blocks = 0
            self._ring.clear()
        self._wake()

    def append(self, events: Iterable[E]) -> None:
        """Number these events and notify the watchers."""
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
        """An asyncio event of the running loop that is set when any thread appends to the log."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            # A closed loop has no watcher to wake.
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
    """The batches of a snapshot that belongs to `cursor`. The snapshot's events describe the present state.
    Reads `pieces` lazily.
    """
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
    """The batches that a service sends to one watcher, until the watcher leaves: events from `cursor` on, preceded by a
    snapshot if the cursor is of another epoch or too old. The first batch is sent at once, so that a watcher learns
    even when it has missed nothing.
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

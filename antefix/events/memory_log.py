"""What came into a worker's memory and what went, numbered, for routers that keep an index of it.

Numbers count up within an epoch; an epoch is one life of the memory. A watcher that knows the epoch and a number still
in the ring goes on there; any other takes a snapshot first. Telling appends to a bounded ring and waits for nobody.
Used from one event loop.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

# A block is told of by this much of its hash: a wrong guess in 2^64 costs a placement that was not the best.
KEY_BYTES: Final = 8
# Keys kept for watchers that fall behind: half a MiB of them, some seconds of a busy worker.
NUM_KEYS_MAX: Final = 65_536
# One event, and one piece of a snapshot.
EVENT_KEYS_MAX: Final = 1_024
SNAPSHOT_KEYS: Final = 8_192


class MemoryEventKind(IntEnum):
    """As in memory.proto."""

    STORED = 1
    EVICTED = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEvent:
    """Blocks that came or went, in order. keys: KEY_BYTES of each hash, one after the other."""

    number: int
    kind: MemoryEventKind
    keys: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBatch:
    """Events that follow each other, as a watcher gets them.

    number: of the last one.  snapshot: a piece of what is there instead; begins and ends with the pieces that say so.
    """

    epoch: bytes
    number: int
    events: tuple[MemoryEvent, ...] = ()
    snapshot: bool = False
    snapshot_begins: bool = False
    snapshot_ends: bool = False


class MemoryLog:
    """The ring, and the way to a snapshot. names: the hashes that are in memory now."""

    def __init__(self, names: Callable[[], Iterable[bytes]], *, num_keys_max: int = NUM_KEYS_MAX) -> None:
        self.epoch = secrets.token_bytes(16)
        self._names = names
        self._num_keys_max = num_keys_max
        self._number = 0
        self._ring: deque[MemoryEvent] = deque()
        self._num_keys = 0
        # Blocks come one by one; those of one kind that nobody has been told of yet become one event.
        self._open_kind = MemoryEventKind.STORED
        self._open = bytearray()
        self._listeners: set[Callable[[], None]] = set()

    @property
    def number(self) -> int:
        """Of the last event."""
        return self._number + bool(self._open)

    def stored(self, name: bytes) -> None:
        self._tell(MemoryEventKind.STORED, name)

    def evicted(self, name: bytes) -> None:
        self._tell(MemoryEventKind.EVICTED, name)

    def since(self, epoch: bytes, number: int) -> list[MemoryEvent] | None:
        """Events after `number`; None when the watcher must take a snapshot."""
        self._close()
        oldest = self._ring[0].number if self._ring else self._number + 1
        if epoch != self.epoch or number > self._number or number < oldest - 1:
            return None
        first = number - oldest + 1
        return [self._ring[index] for index in range(first, len(self._ring))]

    def snapshot(self) -> Iterator[MemoryBatch]:
        """What is in memory as of this call, in pieces, the last of which says so."""
        self._close()
        names, number = list(self._names()), self._number
        return self._pieces(names, number)

    def listen(self, wake: Callable[[], None]) -> Callable[[], None]:
        """Have `wake` called when there is something new; it must not block. Returns its undoing."""
        self._listeners.add(wake)
        return lambda: self._listeners.discard(wake)

    def _pieces(self, names: list[bytes], number: int) -> Iterator[MemoryBatch]:
        last = max(0, len(names) - 1) // SNAPSHOT_KEYS
        for piece in range(last + 1):
            part = names[piece * SNAPSHOT_KEYS : (piece + 1) * SNAPSHOT_KEYS]
            keys = b"".join([name[:KEY_BYTES] for name in part])
            yield MemoryBatch(
                epoch=self.epoch,
                number=number,
                events=(MemoryEvent(number=number, kind=MemoryEventKind.STORED, keys=keys),) if keys else (),
                snapshot=True,
                snapshot_begins=piece == 0,
                snapshot_ends=piece == last,
            )

    def _tell(self, kind: MemoryEventKind, name: bytes) -> None:
        if self._open and (kind is not self._open_kind or len(self._open) >= EVENT_KEYS_MAX * KEY_BYTES):
            self._close()
        is_new = not self._open
        self._open_kind = kind
        self._open += name[:KEY_BYTES]
        if is_new:
            for wake in tuple(self._listeners):
                wake()

    def _close(self) -> None:
        """Number what is open: from now on it may be told, and does not change."""
        if not self._open:
            return
        self._number += 1
        self._ring.append(MemoryEvent(number=self._number, kind=self._open_kind, keys=bytes(self._open)))
        self._num_keys += len(self._open) // KEY_BYTES
        self._open = bytearray()
        while self._num_keys > self._num_keys_max and len(self._ring) > 1:
            self._num_keys -= len(self._ring.popleft().keys) // KEY_BYTES

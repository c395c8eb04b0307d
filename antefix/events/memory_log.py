"""The log of blocks that a worker's memory gained or lost, for routers that index it. Used from one event loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

from antefix.events.block_events import KEY_BYTES, BlockEvent, EventKind
from antefix.events.numbered_log import EVENT_BLOCKS_MAX, SNAPSHOT_BLOCKS, Batch, Cursor, NumberedLog, snapshot_batches

# Half a MiB of keys: the changes of a busy worker in some seconds.
NUM_BLOCKS_MAX: Final = 65_536


class MemoryLog(NumberedLog[BlockEvent]):
    """A log of single blocks stored and evicted.  names: the hashes of the blocks in memory now."""

    def __init__(self, names: Callable[[], Iterable[bytes]], *, num_blocks_max: int = NUM_BLOCKS_MAX) -> None:
        super().__init__(num_blocks_max=num_blocks_max)
        self._names = names
        # Consecutive changes of one kind that have not been sent yet become one event.
        self._open_kind = EventKind.STORED
        self._open = bytearray()

    @property
    def cursor(self) -> Cursor:
        self._close()
        return super().cursor

    def stored(self, name: bytes) -> None:
        self._tell(EventKind.STORED, name)

    def stored_all(self, names: Sequence[bytes]) -> None:
        """`stored` for many blocks at once."""
        for first in range(0, len(names), EVENT_BLOCKS_MAX):
            self._close()
            self._open_kind = EventKind.STORED
            self._open += b"".join([name[:KEY_BYTES] for name in names[first : first + EVENT_BLOCKS_MAX]])
        if names:
            self._wake()

    def evicted(self, name: bytes) -> None:
        self._tell(EventKind.EVICTED, name)

    def since(self, cursor: Cursor) -> Batch[BlockEvent] | None:
        self._close()
        return super().since(cursor)

    def snapshot(self) -> Iterator[Batch[BlockEvent]]:
        """A snapshot of the blocks that are in memory at this call."""
        names = list(self._names())
        parts = (names[first : first + SNAPSHOT_BLOCKS] for first in range(0, len(names), SNAPSHOT_BLOCKS))
        return snapshot_batches(self.cursor, ([_stored(part)] for part in parts))

    def _tell(self, kind: EventKind, name: bytes) -> None:
        if self._open and (kind is not self._open_kind or len(self._open) >= EVENT_BLOCKS_MAX * KEY_BYTES):
            self._close()
        is_new = not self._open
        self._open_kind = kind
        self._open += name[:KEY_BYTES]
        if is_new:
            self._wake()

    def _close(self) -> None:
        """Give the event that is still being collected its number. From then on the event may be sent, and does not
        change any more.
        """
        if self._open:
            event = BlockEvent(kind=self._open_kind, hashes=bytes(self._open))
            self._open = bytearray()
            self._add([event])


def _stored(names: list[bytes]) -> BlockEvent:
    return BlockEvent(kind=EventKind.STORED, hashes=b"".join([name[:KEY_BYTES] for name in names]))

"""What the store holds, followed by its numbered events, so that a request need not ask.

It is the store's own word, a moment late: a block that it dropped since is found missing by the worker, at the cost of
computing it. While the feed is not in step (no snapshot yet, stream broken and no event since, more blocks than it
may hold), it says nothing, and the store is asked.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence

from antefix.errors import AntefixError
from antefix.store.watch import Cursor, StoreEvent, StoreEventKind, WatchBatch
from router.directory import Key, keys_of

log = logging.getLogger("antefix.router")

# At some 70 bytes each.
NUM_BLOCKS_MAX = 1 << 23
_RETRY_S = 0.5

Watch = Callable[[Cursor | None], AsyncIterator[WatchBatch]]


class StoreFeed:
    """The blocks of one fingerprint that the store holds."""

    def __init__(self, watch: Watch, *, fingerprint: bytes, num_blocks_max: int = NUM_BLOCKS_MAX) -> None:
        self._watch = watch
        self._fingerprint = fingerprint
        self._num_blocks_max = num_blocks_max
        self._blocks: set[Key] = set()
        self._cursor: Cursor | None = None
        self._in_step = False
        self._task: asyncio.Task[None] | None = None
        self.num_snapshots = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def num_leading(self, keys: Sequence[Key]) -> int | None:
        """How many of the chain's first blocks the store holds; None: ask it. Bisection: the store is prefix-closed."""
        if not self._in_step:
            return None
        low, high = 0, len(keys)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if keys[middle - 1] in self._blocks else (low, middle - 1)
        return low

    def start(self) -> None:
        """Follow from now on. Needs a running event loop."""
        self._task = asyncio.create_task(self._follow())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def apply(self, batch: WatchBatch) -> bool:
        """Take a batch in; False: it does not follow what is known, and a snapshot is needed."""
        cursor, known = batch.cursor, self._cursor
        if batch.snapshot_begins:
            self._blocks, self._cursor, self._in_step = set(), None, False
            self.num_snapshots += 1
        # Each event has a number: so many of them lie between two cursors of one epoch.
        elif (
            cursor is not None
            and known is not None
            and (cursor.epoch != known.epoch or cursor.number != known.number + len(batch.events))
        ):
            self._in_step = False
            return False
        for event in batch.events:
            self._apply(event)
        if cursor is not None:
            self._cursor, self._in_step = cursor, len(self._blocks) <= self._num_blocks_max
        return len(self._blocks) <= self._num_blocks_max

    def _apply(self, event: StoreEvent) -> None:
        if event.fingerprint != self._fingerprint:
            return
        if event.kind is StoreEventKind.STORED:
            self._blocks.update(keys_of(event.hashes))
        elif event.kind is StoreEventKind.EVICTED:
            self._blocks.difference_update(keys_of(event.hashes))

    async def _follow(self) -> None:
        while True:
            try:
                async for batch in self._watch(self._cursor):
                    if not self.apply(batch):
                        log.warning("the store's events have a gap or are too many; starting over")
                        self._cursor = None
                        self._blocks.clear()
                        break
            except AntefixError as err:
                log.info("the store's events stopped: %s", err)
            self._in_step = False
            await asyncio.sleep(_RETRY_S)

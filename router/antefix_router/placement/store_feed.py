"""What the store holds, followed by its numbered events, so that a request need not ask.

It is the store's own word, a moment late: a block that it dropped since is found missing by the worker, at the cost of
computing it. While the feed is not in step (no snapshot yet, stream broken and no event since, nothing heard for too
long, more blocks than it may hold), it says nothing, and the store is asked.

Two ways in: a direct stream from the store; or Redis Streams, which all routers read, with snapshots straight from the
store.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence

from antefix.errors import AntefixError
from antefix.events.redis_stream import ALIVE_S
from antefix.events.store_bus import StoreReader
from antefix.store.store_watch import Cursor, StoreEvent, StoreEventKind, WatchBatch
from antefix_router.placement.directory import Key, keys_of

log = logging.getLogger("antefix.router")

# At some 70 bytes each.
NUM_BLOCKS_MAX = 1 << 23
_RETRY_S = 0.5
# Batches that come while a snapshot is taken; more of them make a gap, and another snapshot.
_WAITING_MAX = 1_024
# Through Redis a store that says nothing for so long may be cut off from it, and is asked.
_SILENT_S = 3 * ALIVE_S
# A store's former lives, whose last words may still be in the stream.
_FORMER_MAX = 16

Watch = Callable[[Cursor | None], AsyncGenerator[WatchBatch, None]]


class StoreFeed:
    """The blocks of one fingerprint that the store holds. name: what the store's stream in Redis is called."""

    def __init__(
        self,
        watch: Watch,
        *,
        fingerprint: bytes,
        num_blocks_max: int = NUM_BLOCKS_MAX,
        redis_url: str = "",
        name: str = "",
    ) -> None:
        """Raises:  ConfigError: the URL cannot be read. Nothing connects yet."""
        self._watch = watch
        self._reader = StoreReader(redis_url, name, self._take, self._lose) if redis_url else None
        self._waiting: deque[WatchBatch] | None = None
        self._wanted = asyncio.Event()
        self._epoch = b""
        self._former: deque[bytes] = deque(maxlen=_FORMER_MAX)
        self._heard_s = 0.0
        self._fingerprint = fingerprint
        self._num_blocks_max = num_blocks_max
        self._blocks: set[Key] = set()
        self._cursor: Cursor | None = None
        self._in_step = False
        self._task: asyncio.Task[None] | None = None
        self.num_snapshots = 0
        self.num_gaps = 0

    def rename(self, fingerprint: bytes) -> None:
        """Follow another fingerprint's blocks; what is known of the former is forgotten."""
        self._fingerprint = fingerprint
        self._blocks, self._cursor, self._in_step = set(), None, False
        if self._task is not None and self._reader is None:
            self._task.cancel()
            self._task = asyncio.create_task(self._follow())
        self._wanted.set()

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def in_step(self) -> bool:
        """Whether it knows what the store last said."""
        return self._in_step and (self._reader is None or time.monotonic() - self._heard_s < _SILENT_S)

    def num_leading(self, keys: Sequence[Key]) -> int | None:
        """How many of the chain's first blocks the store holds; None: ask it. Bisection: the store is prefix-closed."""
        if not self.in_step:
            return None
        low, high = 0, len(keys)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if keys[middle - 1] in self._blocks else (low, middle - 1)
        return low

    def start(self) -> None:
        """Follow from now on. Needs a running event loop."""
        if self._reader is None:
            self._task = asyncio.create_task(self._follow())
            return
        self._reader.start()
        self._wanted.set()
        self._task = asyncio.create_task(self._resync())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._reader is not None:
            await self._reader.close()

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

    async def _resync(self) -> None:
        """Redis' way: a snapshot when one is wanted; what came meanwhile is applied on top."""
        while True:
            await self._wanted.wait()
            waiting = self._waiting = deque(maxlen=_WAITING_MAX)
            if not await self._snapshot():
                await asyncio.sleep(_RETRY_S)
                continue
            # No await from here to the end, so that nothing comes in between.
            self._waiting = None
            self._wanted.clear()
            for batch in waiting:
                self._take(batch)
            if self._wanted.is_set():
                await asyncio.sleep(_RETRY_S)

    async def _snapshot(self) -> bool:
        """Take one from the store itself, and leave its stream; whether it was whole."""
        try:
            async with contextlib.aclosing(self._watch(None)) as batches:
                async for batch in batches:
                    if not self.apply(batch):
                        log.warning("the store has more blocks than may be followed")
                        return False
                    if batch.cursor is not None:
                        self._heard_s = time.monotonic()
                        if self._epoch not in (b"", batch.cursor.epoch):
                            self._former.append(self._epoch)
                        self._epoch = batch.cursor.epoch
                        return True
        except AntefixError as err:
            log.info("the store gives no snapshot: %s", err)
        self._in_step = False
        return False

    def _take(self, batch: WatchBatch) -> None:
        """What Redis gave: the next event, one that is known already, or that the store is alive."""
        cursor, known = batch.cursor, self._cursor
        if cursor is None or cursor.epoch in self._former:
            return
        if self._waiting is not None:
            self._waiting.append(batch)
            return
        # What is not in step is not made good by an old sign of life that Redis gives once more.
        if known is None or self._wanted.is_set():
            return
        if cursor.epoch == known.epoch and cursor.number < known.number:
            return
        self._heard_s = time.monotonic()
        if cursor == known:
            self._in_step = True
        elif not self.apply(batch):
            self.num_gaps += 1
            self._wanted.set()

    def _lose(self) -> None:
        self._in_step = False

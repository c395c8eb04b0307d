"""Follows one source's numbered events: a snapshot, then every change. The follower notices events that it missed, and
recovers from the loss.

There are two transports. With a direct stream, all events come over the stream, which continues at its cursor after a
break. With Redis, all readers share one stream of changes and heartbeats, and get only snapshots from the source
itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Generic

from antefix.errors import AntefixError
from antefix.events.event_seal import public_epoch
from antefix.events.numbered_log import ALIVE_S, Batch, Cursor, E

log = logging.getLogger("antefix.events")

Watch = Callable[[Cursor | None], AsyncGenerator[Batch[E], None]]

_RETRY_S: Final = 0.5
# After a snapshot that did not fit into the index, wait this long before the next one.
_FULL_RETRY_S: Final = 60.0
# If a piece of a snapshot takes longer than this, the snapshot is requested again.
_PIECE_TIMEOUT_S: Final = 30.0
# How many batches are kept while a snapshot is taken. More of them leave a gap, which needs another snapshot.
_WAITING_MAX: Final = 1_024
# A source without an entry in Redis for this long may be cut off from Redis.
_SILENT_S: Final = 3 * ALIVE_S
# How many names of earlier epochs are remembered (two per epoch). Their last entries may still be in the stream.
_FORMER_MAX: Final = 32


@dataclass(slots=True)
class FollowCounters:
    """Counters of one or several followers.  num_gaps: how many event numbers were missing."""

    num_snapshots: int = 0
    num_events: int = 0
    num_gaps: int = 0


class Follower(ABC, Generic[E]):
    """Keeps an index of what a source has. The subclass implements the index. Used from one event loop."""

    def __init__(self, *, through_redis: bool = False, counters: FollowCounters | None = None) -> None:
        self.counters = counters or FollowCounters()
        self._through_redis = through_redis
        self._cursor: Cursor | None = None
        self._epoch = self._public_epoch = b""
        self._former: deque[bytes] = deque(maxlen=_FORMER_MAX)
        self._is_current = False
        self._is_full = False
        self._heard_s = 0.0
        # With Redis: whether a snapshot is needed, and the batches that arrived while it is taken.
        self._wanted = asyncio.Event()
        self._waiting: deque[Batch[E]] | None = None

    @abstractmethod
    def forget_all(self) -> None:
        """Clear the index, because a snapshot of the source begins."""

    @abstractmethod
    def learn(self, events: Sequence[E]) -> bool:
        """Apply events to the index. False: the events do not fit into the index."""

    def is_intact(self) -> bool:
        """Whether nothing else has removed entries from the index."""
        return True

    def confirm(self) -> None:
        """Record that the index has all events that the source has sent."""

    def doubt(self) -> None:
        """Record that changes of the source may have been missed."""

    @property
    def in_step(self) -> bool:
        """Whether the index has all of the source's events, and the transport to the source works."""
        return self._is_current and self.is_intact() and not self._is_silent()

    async def run(self, watch: Watch[E]) -> None:
        """Follow the source until this task is cancelled. watch: opens the source's own stream.

        After an unexpected exception the index counts as unknown, and the next run begins with a snapshot.
        """
        try:
            await (self._resync(watch) if self._through_redis else self._follow(watch))
        except Exception:
            self._lose()
            raise

    def apply(self, batch: Batch[E]) -> bool:
        """Apply the next batch of a stream. Returns False if the batch does not follow the last one, so that a snapshot
        is needed.
        """
        if batch.snapshot_begins:
            self._lose()
            self._is_full = False
            self.forget_all()
        elif not batch.snapshot and not self._follows(batch):
            return self._lose()
        if not self.is_intact():
            return self._lose()
        if not self.learn(batch.events):
            self._is_full = True
            log.warning("a source of cache events has more blocks than may be followed; its events are not used")
            return self._lose()
        if batch.snapshot_ends:
            self.counters.num_snapshots += 1
        if batch.snapshot_ends or not batch.snapshot:
            self.counters.num_events += 0 if batch.snapshot else len(batch.events)
            self._stand_at(batch.cursor)
        return True

    def take(self, batch: Batch[E]) -> None:
        """Apply a batch from Redis: the next event, an event that is known already, or a heartbeat of the source.

        Only entries signed with the epoch that the source itself sent with its snapshot are applied. An entry with
        another epoch makes this follower ask the source, but changes nothing else.
        """
        if batch.cursor.epoch in self._former:
            return
        if self._waiting is not None:
            self._waiting.append(batch)
            return
        # While a snapshot is wanted, a heartbeat that Redis replays must not mark a stale feed as current.
        if self._cursor is None or self._wanted.is_set():
            return
        if batch.is_of is not None and batch.cursor.epoch == self._public_epoch:
            if not batch.is_of(self._epoch):
                return
            batch = replace(batch, cursor=Cursor(epoch=self._epoch, number=batch.cursor.number))
        if batch.cursor.epoch == self._cursor.epoch and batch.cursor.number <= self._cursor.number:
            if batch.cursor != self._cursor:
                return
            batch = Batch(cursor=self._cursor)
        if not self.apply(batch):
            self._wanted.set()

    def lose(self) -> None:
        """Record that Redis cannot be reached."""
        self._is_current = False
        self.doubt()

    def _follows(self, batch: Batch[E]) -> bool:
        # Events are numbered, so the difference of two cursors of an epoch is the number of events between them.
        known = self._cursor
        if known is None or batch.cursor.epoch != known.epoch:
            return False
        if batch.cursor.number != known.number + len(batch.events):
            self.counters.num_gaps += 1
            return False
        return True

    def _stand_at(self, cursor: Cursor) -> None:
        if cursor.epoch != self._epoch:
            if self._epoch:
                self._former += (self._epoch, self._public_epoch)
            self._epoch, self._public_epoch = cursor.epoch, public_epoch(cursor.epoch)
        self._cursor, self._is_current, self._heard_s = cursor, True, time.monotonic()
        self.confirm()

    def _lose(self) -> bool:
        self._cursor = None
        self.lose()
        return False

    def _is_silent(self) -> bool:
        return self._through_redis and time.monotonic() - self._heard_s >= _SILENT_S

    async def _follow(self, watch: Watch[E]) -> None:
        """Follow one direct stream: a snapshot first, then events. After a break, the stream resumes at its cursor."""
        while True:
            try:
                async with contextlib.aclosing(watch(self._cursor if self.is_intact() else None)) as batches:
                    async for batch in batches:
                        if not self.apply(batch):
                            break
            except AntefixError as err:
                log.debug("a stream of events stopped: %s", err)
            self.lose()
            await self._pause()

    async def _resync(self, watch: Watch[E]) -> None:
        """With Redis: take a snapshot when one is needed, then apply the batches that arrived during it."""
        self._wanted.set()
        while True:
            await self._until_wanted()
            waiting = self._waiting = deque(maxlen=_WAITING_MAX)
            if not await self._take_snapshot(watch):
                await self._pause()
                continue
            # No await from here to the end, so that no other batch is applied in between.
            self._waiting = None
            self._wanted.clear()
            for batch in waiting:
                self.take(batch)
            if self._wanted.is_set():
                await self._pause()

    async def _until_wanted(self) -> None:
        while not self._wanted.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_SILENT_S):
                    await self._wanted.wait()
            if self._is_current and self._is_silent():
                self.lose()

    async def _take_snapshot(self, watch: Watch[E]) -> bool:
        """Take a snapshot from the source, then close its stream. Returns whether the source sent the whole
        snapshot.
        """
        clock = asyncio.get_running_loop().time
        try:
            async with asyncio.timeout(_PIECE_TIMEOUT_S) as limit, contextlib.aclosing(watch(None)) as batches:
                async for batch in batches:
                    if not self.apply(batch):
                        return False
                    if batch.snapshot_ends:
                        return True
                    limit.reschedule(clock() + _PIECE_TIMEOUT_S)
        except (AntefixError, TimeoutError) as err:
            log.debug("a source of events did not send a snapshot: %s", err)
        self.lose()
        return False

    async def _pause(self) -> None:
        await asyncio.sleep(_FULL_RETRY_S if self._is_full else _RETRY_S)

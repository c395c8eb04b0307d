"""Following one source's numbered events: a snapshot, then every change; what was missed is noticed and made good.

Two ways in. A direct stream tells everything and continues at its cursor after a break. Through Redis come the changes
and signs of life, which all readers share, and only snapshots come from the source itself.
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
# A snapshot of what the index cannot hold is worth no other one soon.
_FULL_RETRY_S: Final = 60.0
# A source that takes longer for a piece of its snapshot is asked again.
_PIECE_TIMEOUT_S: Final = 30.0
# Batches that come while a snapshot is taken; more of them make a gap, and another snapshot.
_WAITING_MAX: Final = 1_024
# Through Redis a source of which nothing was heard for so long may be cut off from it.
_SILENT_S: Final = 3 * ALIVE_S
# Names of a source's former lives, two each, whose last words may still be in the stream.
_FORMER_MAX: Final = 32


@dataclass(slots=True)
class FollowCounters:
    """Of one follower or of several. num_gaps: numbers that were missing."""

    num_snapshots: int = 0
    num_events: int = 0
    num_gaps: int = 0


class Follower(ABC, Generic[E]):
    """Keeps an index of what a source has; a subclass is the index. Used from one event loop."""

    def __init__(self, *, through_redis: bool = False, counters: FollowCounters | None = None) -> None:
        self.counters = counters or FollowCounters()
        self._through_redis = through_redis
        self._cursor: Cursor | None = None
        self._epoch = self._public_epoch = b""
        self._former: deque[bytes] = deque(maxlen=_FORMER_MAX)
        self._is_current = False
        self._is_full = False
        self._heard_s = 0.0
        # Redis' way: a snapshot is needed; what came while it is taken.
        self._wanted = asyncio.Event()
        self._waiting: deque[Batch[E]] | None = None

    @abstractmethod
    def forget_all(self) -> None:
        """A snapshot begins: whatever was known of the source counts no more."""

    @abstractmethod
    def learn(self, events: Sequence[E]) -> bool:
        """False: that is more than the index holds."""

    def is_intact(self) -> bool:
        """Whether nobody else took anything out of the index."""
        return True

    def confirm(self) -> None:
        """The index has what the source said last."""

    def doubt(self) -> None:
        """The source may have changed without our hearing of it."""

    @property
    def in_step(self) -> bool:
        """Whether the index has what the source said last, and would have heard of more."""
        return self._is_current and self.is_intact() and not self._is_silent()

    async def run(self, watch: Watch[E]) -> None:
        """Follow until cancelled. watch: the source's own stream."""
        await (self._resync(watch) if self._through_redis else self._follow(watch))

    def apply(self, batch: Batch[E]) -> bool:
        """Take the next batch of a stream in; False: it does not follow what is known, and a snapshot is needed."""
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
            log.warning("a source of events has more blocks than may be followed")
            return self._lose()
        if batch.snapshot_ends:
            self.counters.num_snapshots += 1
        if batch.snapshot_ends or not batch.snapshot:
            self.counters.num_events += 0 if batch.snapshot else len(batch.events)
            self._stand_at(batch.cursor)
        return True

    def take(self, batch: Batch[E]) -> None:
        """What Redis gave: the next event, one that is known already, or that the source is alive.

        Only what the source has signed with the epoch that it told us itself counts as its word. Another epoch is a
        reason to ask the source, and no more.
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
        """Redis is away."""
        self._is_current = False
        self.doubt()

    def _follows(self, batch: Batch[E]) -> bool:
        # Each event has a number: so many of them lie between two cursors of one epoch.
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
        """The direct way: one stream, a snapshot first, that resumes where it broke."""
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
        """Redis' way: a snapshot when one is wanted; what came meanwhile is applied on top."""
        self._wanted.set()
        while True:
            await self._until_wanted()
            waiting = self._waiting = deque(maxlen=_WAITING_MAX)
            if not await self._take_snapshot(watch):
                await self._pause()
                continue
            # No await from here to the end, so that nothing comes in between.
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
        """Take one from the source itself, and leave its stream; whether it was whole."""
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
            log.debug("a source of events gives no snapshot: %s", err)
        self.lose()
        return False

    async def _pause(self) -> None:
        await asyncio.sleep(_FULL_RETRY_S if self._is_full else _RETRY_S)

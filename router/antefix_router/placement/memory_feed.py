"""What workers say that they hold in memory, brought into the directory: numbered events, and snapshots where they gap.

Two ways in: a direct stream from each worker, or Redis Streams, which all routers read, with snapshots straight from
the worker. Either way a worker is in step while its numbers follow each other. One that is not is what the router
guesses from its own placements, until the next snapshot: that costs placements, never an answer.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass

import grpc
import numpy as np

from antefix import rpc
from antefix.errors import AntefixError
from antefix.events import MemoryBatch, MemoryEventKind
from antefix.events.memory_watch import MemoryCursor, watch_memory
from antefix.events.redis_bus import MemoryReader
from antefix_router.placement.directory import Directory, Key

log = logging.getLogger("antefix.router")

_RETRY_S = 1.0
# Batches that come while a snapshot is fetched; more of them make a gap, and another snapshot.
_WAITING_MAX = 1_024

Watch = Callable[[grpc.aio.Channel, MemoryCursor | None, bool], AsyncIterator[MemoryBatch]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """Where we stand with a worker. serial: of its place in the directory: another one means that it was forgotten."""

    epoch: bytes
    number: int
    serial: int


class MemoryFeed:
    """Keeps the directory as the workers' events say. `follow` again whenever workers come or go."""

    def __init__(self, directory: Directory, *, redis_url: str = "", watch: Watch | None = None) -> None:
        """Raises:  ConfigError: the URL cannot be read. Nothing connects yet."""
        # One channel a worker for as long as it is followed: making one a try would cost memory while one is away.
        self._directory = directory
        self._watch = watch or _watch_worker
        self._reader = MemoryReader(redis_url, self._take, self._doubt_all) if redis_url else None
        self._known: dict[str, _Known] = {}
        self._waiting: dict[str, deque[MemoryBatch]] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._wanted: dict[str, asyncio.Event] = {}
        self.num_snapshots = 0
        self.num_events = 0
        self.num_gaps = 0

    def in_step(self, address: str) -> bool:
        """Whether the directory has what this worker last said."""
        known = self._known.get(address)
        return known is not None and known.serial == self._directory.serial(address)

    def start(self) -> None:
        """From now on read Redis, where it is used. Needs a running event loop."""
        if self._reader is not None:
            self._reader.start()

    def follow(self, addresses: Iterable[str]) -> None:
        """Follow these workers and no others."""
        addresses = set(addresses)
        for address in set(self._tasks) - addresses:
            self._tasks.pop(address).cancel()
            self._lose(address)
            self._waiting.pop(address, None)
            self._wanted.pop(address, None)
        for address in addresses - set(self._tasks):
            self._wanted[address] = asyncio.Event()
            self._wanted[address].set()
            # Through Redis only snapshots come from the worker itself.
            run = self._resync if self._reader is not None else self._follow
            self._tasks[address] = asyncio.create_task(run(address))

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        self.follow(())
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._reader is not None:
            await self._reader.close()

    def apply(self, address: str, batch: MemoryBatch) -> bool:
        """Take a batch in; False: it does not follow what is known, and a snapshot is needed."""
        if batch.snapshot:
            self._apply_snapshot(address, batch)
            return True
        known = self._known.get(address)
        if known is None or batch.epoch != known.epoch or known.serial != self._directory.serial(address):
            return False
        if batch.number <= known.number:
            # Told twice: Redis was read again from further back. Or it is alive, and has no news.
            self._directory.know(address)
            return True
        if batch.number - len(batch.events) != known.number:
            self.num_gaps += 1
            self._lose(address)
            return False
        for event in batch.events:
            keys = _keys(event.keys)
            if event.kind is MemoryEventKind.STORED:
                self._directory.placed(address, keys)
            else:
                self._directory.evicted(address, keys)
        self.num_events += len(batch.events)
        self._directory.know(address)
        self._known[address] = _Known(epoch=batch.epoch, number=batch.number, serial=known.serial)
        return True

    def _apply_snapshot(self, address: str, batch: MemoryBatch) -> None:
        """A piece of what the worker has; it counts from its last piece on."""
        if batch.snapshot_begins:
            self._known.pop(address, None)
            self._directory.forget(address)
        for event in batch.events:
            self._directory.placed(address, _keys(event.keys))
        if batch.snapshot_ends:
            self.num_snapshots += 1
            serial = self._directory.know(address)
            self._known[address] = _Known(epoch=batch.epoch, number=batch.number, serial=serial)

    def _lose(self, address: str) -> None:
        self._known.pop(address, None)
        self._directory.doubt(address)

    async def _follow(self, address: str) -> None:
        """The direct way: one stream, a snapshot first, that goes on where it broke."""
        async with rpc.channel(address) as channel:
            while True:
                known = self._known.get(address) if self.in_step(address) else None
                cursor = MemoryCursor(epoch=known.epoch, number=known.number) if known else None
                try:
                    async for batch in self._watch(channel, cursor, False):
                        if not self.apply(address, batch):
                            self._lose(address)
                            break
                    else:
                        await asyncio.sleep(_RETRY_S)
                except AntefixError as err:
                    log.debug("worker %s tells nothing of its memory: %s", address, err)
                    self._directory.doubt(address)
                    await asyncio.sleep(_RETRY_S)

    async def _resync(self, address: str) -> None:
        """Redis' way: snapshots when they are wanted; what came meanwhile is applied on top."""
        async with rpc.channel(address) as channel:
            while True:
                await self._wanted[address].wait()
                waiting = self._waiting[address] = deque(maxlen=_WAITING_MAX)
                try:
                    async for batch in self._watch(channel, None, True):
                        self.apply(address, batch)
                except AntefixError as err:
                    log.debug("worker %s gives no snapshot of its memory: %s", address, err)
                    await asyncio.sleep(_RETRY_S)
                    continue
                # No await from here to the end, so that nothing comes in between.
                del self._waiting[address]
                self._wanted[address].clear()
                if not all(self.apply(address, batch) for batch in waiting):
                    self._wanted[address].set()
                    await asyncio.sleep(_RETRY_S)

    def _doubt_all(self) -> None:
        for address in self._known:
            self._directory.doubt(address)

    def _take(self, address: str, batch: MemoryBatch) -> None:
        """An event that Redis gave. Those of workers that are not ours, or unknown yet, are nobody's."""
        wanted = self._wanted.get(address)
        if wanted is None:
            return
        if (waiting := self._waiting.get(address)) is not None:
            waiting.append(batch)
        elif not self.apply(address, batch):
            wanted.set()


def _watch_worker(
    channel: grpc.aio.Channel, cursor: MemoryCursor | None, snapshot_only: bool
) -> AsyncIterator[MemoryBatch]:
    return watch_memory(channel, cursor, snapshot_only=snapshot_only)


def _keys(raw: bytes) -> list[Key]:
    keys: list[Key] = np.frombuffer(raw, "<u8").tolist()
    return keys

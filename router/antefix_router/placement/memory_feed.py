"""Applies the workers' events about their memory to the directory: one follower for each worker.

While a worker's events are not up to date, the router guesses its contents from its own placements until the next
snapshot. Wrong guesses cost worse placements, never a wrong answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from functools import partial

import grpc

from antefix import rpc
from antefix.end_tasks import end_tasks
from antefix.events.block_events import BlockEvent, EventKind
from antefix.events.event_seal import DropReason, EventKeys
from antefix.events.event_wire import watch_memory
from antefix.events.follower import FollowCounters, Follower
from antefix.events.numbered_log import Batch, Cursor
from antefix.events.redis_stream import MEMORY_STREAMS, StreamReader, memory_stream
from antefix.keep_running import keep_running
from antefix.redis_access import RedisAccess
from antefix.security.identity import Role
from antefix_router.placement.directory import Directory

WatchMemory = Callable[[grpc.aio.Channel, Cursor | None], AsyncGenerator[Batch[BlockEvent], None]]


class MemoryFollower(Follower[BlockEvent]):
    """Follows the events of one worker."""

    def __init__(
        self,
        directory: Directory,
        address: str,
        *,
        through_redis: bool = False,
        counters: FollowCounters | None = None,
    ) -> None:
        super().__init__(through_redis=through_redis, counters=counters)
        self._directory = directory
        self._address = address
        self._serial = 0

    def forget_all(self) -> None:
        self._directory.forget(self._address)
        # A new entry in the directory. Its number shows later whether the entry is still the same.
        self._directory.placed(self._address, ())
        self._serial = self._directory.serial(self._address)

    def learn(self, events: Sequence[BlockEvent]) -> bool:
        for event in events:
            keys = event.keys().tolist()
            if event.kind is EventKind.STORED:
                self._directory.placed(self._address, keys)
            elif event.kind is EventKind.EVICTED:
                self._directory.evicted(self._address, keys)
        return True

    def is_intact(self) -> bool:
        return self._serial == self._directory.serial(self._address)

    def confirm(self) -> None:
        self._directory.know(self._address)

    def doubt(self) -> None:
        self._directory.doubt(self._address)


class MemoryFeed:
    """Keeps the directory up to date with the workers' events. `follow` must be called whenever workers come or go."""

    def __init__(
        self,
        directory: Directory,
        *,
        redis_url: RedisAccess | str = "",
        keys: EventKeys | None = None,
        watch: WatchMemory = watch_memory,
        callee: Callable[[str], tuple[Role | None, str]] = lambda _: (None, ""),
    ) -> None:
        """keys: the keys that sign events in Redis. callee: the role and name of the process that is expected at an
        address; no other process is believed.

        Raises:  ConfigError: the URL cannot be used. This does not connect yet.
        """
        self._callee = callee
        self._directory = directory
        self._watch = watch
        self._reader: StreamReader | None = None
        if redis_url:
            assert keys is not None, "events through Redis are believed only where they are signed"
            self._reader = StreamReader(redis_url, MEMORY_STREAMS, self._take, self._lose, keys=keys)
        self._followers: dict[str, MemoryFollower] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        # Workers that left.
        self._ending: set[asyncio.Task[None]] = set()
        self.counters = FollowCounters()

    def in_step(self, address: str) -> bool:
        """Whether the directory is up to date with this worker's events."""
        follower = self._followers.get(address)
        return follower is not None and follower.in_step

    @property
    def dropped(self) -> Mapping[DropReason, int]:
        """Entries in Redis that were rejected, by reason."""
        return self._reader.dropped if self._reader is not None else {}

    def start(self) -> None:
        """Begin to read events from Redis, if Redis is used. Needs a running event loop."""
        if self._reader is not None:
            self._reader.start()

    def follow(self, addresses: Iterable[str]) -> None:
        """Follow the events of these workers, and of no others."""
        addresses = set(addresses)
        for address in set(self._tasks) - addresses:
            self._end(self._tasks.pop(address))
            self._followers.pop(address).lose()
        for address in addresses - set(self._tasks):
            follower = self._followers[address] = MemoryFollower(
                self._directory, address, through_redis=self._reader is not None, counters=self.counters
            )
            self._tasks[address] = keep_running(partial(self._run, follower, address), "the events", of=address)

    async def close(self) -> None:
        self.follow(())
        await end_tasks(self._ending)
        if self._reader is not None:
            await self._reader.close()

    def _end(self, task: asyncio.Task[None]) -> None:
        task.cancel()
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _run(self, follower: MemoryFollower, address: str) -> None:
        # One channel while the worker is followed. A channel per attempt would cost memory while the worker is down.
        role, name = self._callee(address)
        async with rpc.channel(address, of=role, name=name) as channel:
            await follower.run(partial(self._watch, channel))

    def _take(self, address: str, batch: Batch[BlockEvent]) -> None:
        """Take a batch from Redis. Events of workers that are not known here are ignored."""
        if (follower := self._followers.get(address)) is not None:
            follower.take(batch)

    def _lose(self, stream: str) -> None:
        for address, follower in self._followers.items():
            if memory_stream(address) == stream:
                follower.lose()

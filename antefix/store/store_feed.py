"""Knows what a store holds by following its numbered events, so that a request need not ask the store.

The feed is a moment behind the store: if the store has just dropped a block, the worker finds the block missing and
computes it. As long as the feed has no complete knowledge (no snapshot yet, a broken stream, no event for too long), it
gives no answer and the store is asked. The feed omits names that do not fit into its memory. After names were omitted,
the feed still knows that the names it has are stored; for prompts with further blocks, the store is asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial

from antefix.end_tasks import end_tasks
from antefix.events.block_events import BlockEvent, EventKind, Key, keys_of
from antefix.events.event_seal import DropReason, EventKeys
from antefix.events.follower import Follower, Watch
from antefix.events.redis_stream import StreamReader, store_stream
from antefix.keep_running import keep_running
from antefix.record import Held
from antefix.redis_access import RedisAccess
from antefix.store.feed_room import FeedRoom


class StoreFeed(Follower[BlockEvent]):
    """Blocks and checkpoints of one fingerprint that the store holds.

    num_left_out: how many names were omitted for lack of room since the last snapshot.
    """

    def __init__(
        self,
        watch: Watch[BlockEvent],
        *,
        fingerprint: bytes,
        room: FeedRoom | None = None,
        redis_url: RedisAccess | str = "",
        name: str = "",
        keys: EventKeys | None = None,
    ) -> None:
        """room: the limit shared with other feeds; None: this feed has a limit of its own. name: the name of the
        store's stream in Redis. keys: verify the signatures of events that come through Redis.

        Raises:  ConfigError: the URL cannot be used. This does not connect yet.
        """
        super().__init__(through_redis=bool(redis_url))
        self._watch = watch
        self._fingerprint = fingerprint
        self._room = room or FeedRoom()
        self.num_left_out = 0
        self._blocks: set[Key] = set()
        self._checkpoints: set[Key] = set()
        self._reader: StreamReader | None = None
        if redis_url:
            assert keys is not None, "events through Redis are believed only where they are signed"
            self._reader = StreamReader(
                redis_url, [store_stream(name)], lambda _, batch: self.take(batch), lambda _: self.lose(), keys=keys
            )
        self._task: asyncio.Task[None] | None = None
        # Tasks that followed earlier fingerprints and are ending.
        self._ending: list[asyncio.Task[None]] = []

    @property
    def dropped(self) -> Mapping[DropReason, int]:
        """How many event entries in Redis were dropped, by reason."""
        return self._reader.dropped if self._reader is not None else {}

    def rename(self, fingerprint: bytes) -> None:
        """Follow another fingerprint's blocks, and forget the names of the previous fingerprint."""
        self._fingerprint = fingerprint
        self.forget_all()
        self._lose()
        if self._task is not None:
            # This also ends a snapshot in progress, part of which was filtered by the previous fingerprint.
            self._task.cancel()
            self._ending.append(self._task)
            self._task = keep_running(partial(self.run, self._watch), "the feed of a store's events")

    def __len__(self) -> int:
        """How many names of records the feed holds."""
        return len(self._blocks) + len(self._checkpoints)

    def num_leading(self, keys: Sequence[Key]) -> int | None:
        """How many of the chain's first blocks the store holds; None if the feed does not know, so that the store must
        be asked.
        """
        if not self.in_step:
            return None
        blocks = self._blocks
        num_leading = next((index for index, key in enumerate(keys) if key not in blocks), len(keys))
        return num_leading if num_leading == len(keys) or not self.num_left_out else None

    def held(self, hashes: Sequence[bytes], *, fingerprint: bytes) -> Held | None:
        """Which blocks the store has of a chain or of part of one; None if the feed does not know, so that the store
        must be asked.
        """
        if fingerprint != self._fingerprint or not self.in_step:
            return None
        keys = keys_of(hashes)
        flags = [key in self._blocks for key in keys]
        if self.num_left_out and not all(flags):
            return None
        checkpoints = (number for number, key in enumerate(keys, start=1) if key in self._checkpoints)
        return Held.of_flags(flags, checkpoints)

    def trim(self) -> None:
        """Drop names until the feed holds no more than its share of the room. The feed drops arbitrary names, because
        it does not know which ones are worth more.
        """
        for names in (self._checkpoints, self._blocks):
            while names and len(self) > self._room.share:
                names.pop()
                self.num_left_out += 1

    def start(self) -> None:
        """Start to follow the store's events. Needs a running event loop."""
        self._room.join(self)
        if self._reader is not None:
            self._reader.start()
        self._task = keep_running(partial(self.run, self._watch), "the feed of a store's events")

    async def close(self) -> None:
        self._room.leave(self)
        if self._task is not None:
            await end_tasks([*self._ending, self._task])
        if self._reader is not None:
            await self._reader.close()

    def forget_all(self) -> None:
        self._blocks, self._checkpoints = set(), set()
        self.num_left_out = 0

    def learn(self, events: Sequence[BlockEvent]) -> bool:
        for event in events:
            if event.fingerprint != self._fingerprint:
                continue
            if event.kind is EventKind.STORED:
                self._take(self._blocks, event.keys().tolist())
            elif event.kind is EventKind.EVICTED:
                self._blocks.difference_update(event.keys().tolist())
            elif event.kind is EventKind.CHECKPOINTED:
                self._take(self._checkpoints, event.keys().tolist())
            elif event.kind is EventKind.CHECKPOINT_EVICTED:
                self._checkpoints.difference_update(event.keys().tolist())
        return True

    def _take(self, names: set[Key], more: Sequence[Key]) -> None:
        num_free = self._room.share - len(self)
        if len(more) <= num_free:
            names.update(more)
            return
        new = [key for key in more if key not in names]
        names.update(new[:num_free])
        self.num_left_out += max(0, len(new) - num_free)

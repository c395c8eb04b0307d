"""Pins the blocks before a client's cache breakpoints in the store, for the time that the client asked for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from antefix.block import Chain
from antefix.errors import AntefixError
from antefix.generation_request import Breakpoint
from antefix.record import RecordKind
from antefix.store.api import Store
from antefix.store.many_stores import ManyStores

log = logging.getLogger("antefix.router")


class BreakpointPins:
    """Sets pins in the background. If a pin fails, a later request may miss, but no answer is lost."""

    def __init__(self, store: Store, fingerprint: Callable[[], bytes]) -> None:
        """fingerprint: returns the fingerprint that all chains have at present."""
        self._store = store
        self._fingerprint = fingerprint
        self._tasks: set[asyncio.Task[None]] = set()

    def pin(self, chain: Chain, breakpoints: Sequence[Breakpoint], *, owner: bytes) -> None:
        """Pin the last whole block before each breakpoint, and its checkpoint. As long as a block is pinned, all blocks
        before it are kept too.

        owner: the owner of the records in the store.
        """
        for num_tokens, ttl_s in breakpoints:
            num_blocks = num_tokens // chain.block_size
            if num_blocks:
                task = asyncio.create_task(self._pin(chain.hashes[:num_blocks], ttl_s, owner))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Wait until the pins in progress are set."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _pin(self, prefix: Sequence[bytes], ttl_s: float, owner: bytes) -> None:
        store, names = self._store, [(kind, prefix[-1]) for kind in (RecordKind.BLOCK, RecordKind.CHECKPOINT)]
        try:
            if isinstance(store, ManyStores):
                # A pin keeps the preceding blocks only if they are in the same store.
                await store.pin_prefix(prefix, fingerprint=self._fingerprint(), duration_s=ttl_s, owner=owner)
            else:
                await store.pin(names, duration_s=ttl_s, owner=owner)
        except AntefixError as err:
            log.warning("the blocks up to a cache breakpoint could not be pinned: %s", err)

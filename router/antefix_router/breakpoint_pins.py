"""What lies before clients' cache breakpoints: its records are pinned in the store for their time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from antefix.block import Chain
from antefix.errors import AntefixError
from antefix.generation_request import Breakpoint
from antefix.record import RecordKind
from antefix.store.api import Store

log = logging.getLogger("antefix.router")


class BreakpointPins:
    """Pins beside the requests: a pin that fails costs a later hit, never an answer."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._tasks: set[asyncio.Task[None]] = set()

    def pin(self, chain: Chain, breakpoints: Sequence[Breakpoint], *, owner: bytes) -> None:
        """Pin the last whole block before each breakpoint, which keeps all before it, and its checkpoint.

        owner: whose records they are.
        """
        for num_tokens, ttl_s in breakpoints:
            num_blocks = num_tokens // chain.block_size
            if num_blocks:
                task = asyncio.create_task(self._pin(chain.hashes[num_blocks - 1], ttl_s, owner))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Wait for the pins that are under way."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _pin(self, block_hash: bytes, ttl_s: float, owner: bytes) -> None:
        names = [(kind, block_hash) for kind in (RecordKind.BLOCK, RecordKind.CHECKPOINT)]
        try:
            await self._store.pin(names, duration_s=ttl_s, owner=owner)
        except AntefixError as err:
            log.warning("a cache breakpoint could not be pinned: %s", err)

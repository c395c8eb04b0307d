"""Loads what a prompt will need while it waits for its turn, so that then it is in memory.

It reads what the planner would read now, into blocks that are idle afterwards: whoever needs room takes them again. It
computes nothing, and what it fails to load is loaded, or computed, when the turn has come.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final

from antefix.errors import AntefixError
from antefix.restore_report import RestoreReport
from antefix.window import PlanKind
from antefix_prefill.restore import Prefetched, Prompt, load_blocks, weigh
from antefix_prefill.worker.engine import Engine

# A shorter wait is over before anything could be loaded.
AFTER_S: Final = 0.05
# Prompts that are loaded for at a time; the disk and the network serve those at work first.
_NUM_AT_ONCE: Final = 2
# Of the pool's blocks that could be had, what is taken at most: those at work must find room.
_POOL_SHARE: Final = 0.5


@dataclass(slots=True)
class PrefetchCounters:
    """In prompts and blocks. num_skipped: for which there was no room, or nothing worth loading."""

    num_prefetched: int = 0
    num_blocks_prefetched: int = 0
    num_skipped: int = 0


class Prefetcher:
    """One per worker."""

    def __init__(self, engine: Engine, *, after_s: float = AFTER_S) -> None:
        self.counters = PrefetchCounters()
        self._engine = engine
        self._after_s = after_s
        self._places = asyncio.Semaphore(_NUM_AT_ONCE)
        self._is_loading: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def while_waiting(self, prompt: Prompt) -> AsyncIterator[None]:
        """Around the wait for a turn. What is being loaded when that ends is waited for: it is needed at once."""
        task = asyncio.create_task(self._prefetch(prompt))
        try:
            yield
        except BaseException:
            task.cancel()
            raise
        finally:
            if task not in self._is_loading:
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([task])

    async def _prefetch(self, prompt: Prompt) -> None:
        await asyncio.sleep(self._after_s)
        async with self._places:
            task = asyncio.current_task()
            assert task is not None
            try:
                await self._load(prompt, task)
            except AntefixError as err:
                self._engine.counters.note(err)
            finally:
                self._is_loading.discard(task)

    async def _load(self, prompt: Prompt, task: asyncio.Task[None]) -> None:
        engine, report = self._engine, RestoreReport()
        plan, older = await weigh(engine, prompt, report)
        first = engine.blocks.num_leading(prompt.chain.hashes)
        num_wanted = plan.resume_block - first
        room = int(engine.blocks.num_available * _POOL_SHARE)
        if plan.kind is PlanKind.COLD or num_wanted <= 0 or num_wanted > room:
            self.counters.num_skipped += 1
            return
        self._is_loading.add(task)
        table = await load_blocks(engine, prompt, plan.resume_block, report, older)
        engine.blocks.release(table)
        prompt.prefetched = Prefetched(first=first, stop=len(table), report=report)
        self.counters.num_prefetched += 1
        self.counters.num_blocks_prefetched += len(table) - first

"""Loads the stored blocks that a prompt will need into memory while the prompt waits for its turn.

Prefetching reads what the planner would read now: blocks and the checkpoint. Loaded blocks are idle, so running prompts
may take their memory; the checkpoint is kept with the prompt. If there is no room for the whole prefix, its beginning
is loaded. It computes nothing. Blocks that could not be loaded in time are loaded or computed when the prompt's turn
comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Final

from antefix.errors import AntefixError
from antefix.restore_report import RestoreReport
from antefix.store.patience import Watch
from antefix.window import Plan, PlanKind
from antefix_prefill.load_blocks import load_blocks
from antefix_prefill.older_names import OlderNames
from antefix_prefill.restore import Prefetched, Prompt, read_checkpoint, weigh
from antefix_prefill.worker.engine import Engine

# Prompts that wait less than this are not loaded for: their wait is over before anything could be loaded.
AFTER_S: Final = 0.05
# How many prompts are loaded for at once; disk and network serve running prompts first.
_NUM_AT_ONCE: Final = 2
# At most this share of the pool's available blocks is used, because running prompts need room.
_POOL_SHARE: Final = 0.5
# At most this many bytes of checkpoints are kept for all waiting prompts together.
_CHECKPOINT_BYTES_MAX: Final = 256 << 20
# A prompt that waited this long should find its prefix in memory; counters say how much of it was there.
LONG_S: Final = 1.0


@dataclass(slots=True)
class PrefetchCounters:
    """Counts prompts and blocks. num_skipped: prompts for which there was no room, or nothing worth loading.

    num_blocks_wanted: blocks to load for prompts that waited LONG_S or more.  num_blocks_found: how many of these were
    in memory when the prompt's turn came.
    """

    num_prefetched: int = 0
    num_blocks_prefetched: int = 0
    num_checkpoints_prefetched: int = 0
    num_skipped: int = 0
    num_blocks_wanted: int = 0
    num_blocks_found: int = 0


class Prefetcher:
    """Prefetches for the waiting prompts of one worker."""

    def __init__(self, engine: Engine, *, after_s: float = AFTER_S) -> None:
        self.counters = PrefetchCounters()
        self._engine = engine
        self._after_s = after_s
        self._places = asyncio.Semaphore(_NUM_AT_ONCE)
        self._is_loading: set[asyncio.Task[None]] = set()
        # For each waiting prompt, the block up to which it is to be loaded.
        self._wanted: dict[int, int] = {}
        self._checkpoint_bytes = 0

    @contextlib.asynccontextmanager
    async def while_waiting(self, prompt: Prompt) -> AsyncIterator[None]:
        """A context around a prompt's wait for its turn. At the end of the wait, a running load is waited for, because
        its result is needed at once, unless the store is late.
        """
        watch, started = Watch(self._engine.patience), time.monotonic()
        task = asyncio.create_task(self._prefetch(prompt, watch))
        try:
            yield
        except BaseException:
            task.cancel()
            raise
        finally:
            if task not in self._is_loading:
                task.cancel()
            waited_s = time.monotonic() - started
            is_over = False
            try:
                is_over = await watch.ended_in_time(task)
            finally:
                if not is_over:
                    self._engine.patience.leave(task)
                self._end(prompt, waited_s)

    def _end(self, prompt: Prompt, waited_s: float) -> None:
        num_wanted = self._wanted.pop(id(prompt), 0)
        if prompt.prefetched is not None:
            self._checkpoint_bytes -= sum(map(len, prompt.prefetched.checkpoints.values()))
        if num_wanted and waited_s >= LONG_S:
            self.counters.num_blocks_wanted += num_wanted
            self.counters.num_blocks_found += min(num_wanted, self._engine.blocks.num_leading(prompt.chain.hashes))

    async def _prefetch(self, prompt: Prompt, watch: Watch) -> None:
        await asyncio.sleep(self._after_s)
        task = asyncio.current_task()
        assert task is not None
        try:
            # 1. What the planner would read now. It is noted for every prompt at once, so that it counts as wanted even
            #    if nothing is loaded before the prompt's turn.
            report = RestoreReport()
            plan, older = await weigh(self._engine, prompt, report, watch)
            if plan.kind is PlanKind.COLD:
                self.counters.num_skipped += 1
                return
            self._wanted[id(prompt)] = plan.resume_block
            async with self._places:
                await self._load(prompt, task, plan, older, report, watch)
        except AntefixError as err:
            self._engine.counters.note(err)
        finally:
            self._is_loading.discard(task)

    async def _load(
        self,
        prompt: Prompt,
        task: asyncio.Task[None],
        plan: Plan,
        older: OlderNames | None,
        report: RestoreReport,
        watch: Watch,
    ) -> None:
        engine = self._engine
        first = engine.blocks.num_leading(prompt.chain.hashes)
        # 2. Load its blocks, as many as there is room for.
        num_loaded = min(plan.resume_block - first, int(engine.blocks.num_available * _POOL_SHARE))
        if num_loaded <= 0 and plan.kind is not PlanKind.CHECKPOINT:
            self.counters.num_skipped += 1
            return
        self._is_loading.add(task)
        prefetched = Prefetched(first=first, stop=first, report=report)
        if num_loaded > 0:
            rest_s = engine.rates.prefill_s(plan.prefill_tokens, context=prompt.num_tokens - plan.prefill_tokens)
            table = await load_blocks(
                engine, prompt, first + num_loaded, report, older, watch=watch, predicted_s=plan.predicted_s - rest_s
            )
            engine.blocks.release(table)
            prefetched = replace(prefetched, stop=len(table))
            self.counters.num_blocks_prefetched += len(table) - first
        # 3. Load its checkpoint, which is kept with the prompt.
        if plan.kind is PlanKind.CHECKPOINT and older is None and self._has_room():
            await self._load_checkpoint(prompt, plan.resume_block, prefetched, watch)
        prompt.prefetched = prefetched
        self.counters.num_prefetched += 1

    async def _load_checkpoint(self, prompt: Prompt, block: int, prefetched: Prefetched, watch: Watch) -> None:
        data = await read_checkpoint(self._engine, prompt, block, prefetched.report, watch)
        if data is not None:
            prefetched.checkpoints[block] = data
            self._checkpoint_bytes += len(data)
            self.counters.num_checkpoints_prefetched += 1

    def _has_room(self) -> bool:
        return self._checkpoint_bytes + self._engine.sizes.checkpoint_bytes <= _CHECKPOINT_BYTES_MAX

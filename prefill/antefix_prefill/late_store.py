"""Computes a prompt next to its restore while the store is late, so that a store that hangs costs a prompt no more than
computing it.

    the store is late (antefix.store.patience)   the prompt is computed from what is in memory, chunk by chunk, and the
                                                 restore continues
    the restore ends, and is further             its sequence takes the place of the computed one
    the computation is further, or has ended     the restore is dropped when it ends

Bits are the same either way: a restored sequence continues as after any other hit, and nothing of the computed sequence
goes into it. Blocks that are computed meanwhile are neither published nor stored before it is decided which sequence is
used: so no hit is counted for what this prompt computed itself. The restore has rows of its own, and frees them when it
ends.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Final

from antefix.errors import AntefixError
from antefix.restore_report import RestoreReport
from antefix.store.patience import Watch
from antefix.window import PlanKind
from antefix_prefill.load_blocks import DISK_TIER, load_blocks
from antefix_prefill.publish_block import publish_block
from antefix_prefill.record_writer import RecordWriter
from antefix_prefill.restore import Prompt, Restored, Rival, restore, restore_from_memory
from antefix_prefill.worker.compute_thread import uninterrupted
from antefix_prefill.worker.engine import Engine

log = logging.getLogger("antefix_prefill.late_store")

# How a late restore ended, as counters name it.
RESTORED: Final = "restored"
COMPUTED: Final = "computed"


class LateRestore:
    """A restore whose store is late. is_open: it is not decided yet whether its result is used."""

    def __init__(
        self, engine: Engine, prompt: Prompt, restoring: asyncio.Task[Restored], rival: Rival, writer: RecordWriter
    ) -> None:
        self.is_open = True
        self._engine = engine
        self._prompt = prompt
        self._restoring = restoring
        self._rival = rival
        self._writer = writer
        self._position = 0
        self._unpublished: list[tuple[int, int]] = []
        rival.left_s = self._left_s
        writer.hold()

    async def further(self, position: int, report: RestoreReport) -> Restored | None:
        """The restored sequence, if the restore has ended and is further than `position`, up to which the prompt is
        computed. Must be called between two chunks.  report: of the computed sequence.
        """
        self._position = position
        if self._rival.waits:
            await self.ended()
        if not self._restoring.done():
            return None
        try:
            restored = self._restoring.result()
        except AntefixError as err:
            self._engine.counters.note(err)
            self._compute_on(0)
            return None
        if restored.sequence.position > position:
            self._end(RESTORED)
            return restored
        self._engine.blocks.release(restored.sequence.block_table)
        report.store_errors += restored.report.store_errors
        if restored.plan.kind is PlanKind.COLD and not report.hit_tokens:
            # The late answer says why nothing could be restored.
            report.miss_reason = restored.report.miss_reason
        self._compute_on(restored.num_stored_blocks)
        return None

    async def ended(self) -> None:
        """Wait until the restore has ended."""
        await asyncio.wait([self._restoring])

    def publish(self, index: int, block_id: int) -> None:
        """Publish a computed block, now or when the computed sequence is the one that is used."""
        self._unpublished.append((index, block_id))
        if not self.is_open:
            self._publish_all()

    def finish(self) -> None:
        """The prompt is computed to its end. The restore is dropped when it ends."""
        if self.is_open:
            self._position = self._prompt.num_tokens
            _drop(self._engine, self._restoring)
            self._compute_on(0)

    def cancel(self) -> None:
        """The request is over."""
        if self.is_open:
            self.is_open = False
            self._restoring.cancel()
            _drop(self._engine, self._restoring)

    def _compute_on(self, num_stored_blocks: int) -> None:
        self._end(COMPUTED)
        self._publish_all()
        self._writer.let_go(num_stored_blocks * self._engine.block_size)

    def _end(self, outcome: str) -> None:
        self.is_open = False
        self._engine.counters.note_late(outcome)
        log.warning(
            "the store was late; meanwhile %d of the prompt's %d tokens were computed, and then the %s ones were used",
            self._position,
            self._prompt.num_tokens,
            outcome,
        )

    def _publish_all(self) -> None:
        for index, block_id in self._unpublished:
            publish_block(self._engine, self._prompt, index, block_id)
        self._unpublished.clear()

    def _left_s(self) -> float:
        left = self._prompt.num_tokens - self._position
        return self._engine.rates.prefill_s(left, context=self._position)


async def restore_in_time(engine: Engine, prompt: Prompt, writer: RecordWriter) -> tuple[Restored, LateRestore | None]:
    """The prompt's restored prefix. If the store is late: what could be restored without it, and the restore that goes
    on.  writer: of the prompt's records. It writes nothing as long as the restore continues.
    """
    rival = Rival(engine.patience)
    restoring = asyncio.create_task(restore(engine, prompt, rival))
    try:
        is_in_time = await rival.watch.ended_in_time(restoring)
    except asyncio.CancelledError:
        _drop(engine, restoring)
        await _cancel(restoring, rival.watch)
        raise
    if is_in_time:
        return restoring.result(), None
    late = LateRestore(engine, prompt, restoring, rival, writer)
    try:
        return await restore_from_memory(engine, prompt, rival), late
    except BaseException:
        late.cancel()
        raise


async def _cancel(work: asyncio.Task[Any], watch: Watch) -> None:
    """Cancel work, and wait for its end unless the store is late."""
    work.cancel()
    if not watch.late.is_set():
        await uninterrupted(watch.ended_in_time(work))


def _drop(engine: Engine, restoring: asyncio.Task[Restored]) -> None:
    """Free the result's blocks, now or when it comes."""

    def ended(task: asyncio.Task[Restored]) -> None:
        if not task.cancelled() and task.exception() is None:
            engine.blocks.release(task.result().sequence.block_table)

    if restoring.done():
        ended(restoring)
    else:
        restoring.add_done_callback(ended)
        engine.patience.keep(restoring)


async def load_in_time(engine: Engine, prompt: Prompt, num_blocks: int, report: RestoreReport) -> list[int]:
    """As `load_blocks`. If the store is late, the result is empty; blocks that come later are left in memory.

    Raises:  Overloaded: the pool has no room.
    """
    watch = Watch(engine.patience)
    missing = num_blocks - engine.blocks.num_leading(prompt.chain.hashes[:num_blocks])
    predicted_s = engine.rates.load_s(DISK_TIER, missing * engine.layout.block_bytes)
    loading = asyncio.create_task(load_blocks(engine, prompt, num_blocks, report, watch=watch, predicted_s=predicted_s))

    def release(task: asyncio.Task[list[int]]) -> None:
        if not task.cancelled() and task.exception() is None:
            engine.blocks.release(task.result())

    try:
        if await watch.ended_in_time(loading):
            return loading.result()
    except asyncio.CancelledError:
        loading.add_done_callback(release)
        engine.patience.keep(loading)
        await _cancel(loading, watch)
        raise
    engine.counters.note_late(COMPUTED)
    loading.add_done_callback(release)
    engine.patience.keep(loading)
    return []


async def flush_in_time(engine: Engine, writer: RecordWriter, block_table: list[int]) -> None:
    """Wait until the writer's records are durable. If the store is late, they are written later, and the blocks that
    they are read from are kept until then.
    """
    if await writer.flush_in_time():
        return
    engine.blocks.share(block_table)
    kept = list(block_table)
    writer.when_over(lambda: engine.blocks.release(kept))

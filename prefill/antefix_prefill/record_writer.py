"""Writes a request's records to the store and the window pool while the request continues to compute.

The cache may cost speed, but never an answer: a failed write is counted and not raised. A failed write ends this
request's writing to the store, because the following records would lack their parent. An answer does not wait for a
store that is late (`antefix.store.patience`): the rest of its records is written after it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable

from antefix.errors import AntefixError, InvalidRequest
from antefix.record import Record, RecordKind, Refusal, RefusalReason
from antefix.security.grants import held, hold
from antefix.store.api import Store
from antefix.store.patience import WRITE_BYTES_PER_S, Patience, Watch
from antefix.window import Tier
from antefix.window_pool import WindowPool
from antefix_prefill.worker.compute_thread import uninterrupted
from antefix_prefill.worker.store_counters import StoreCounters

log = logging.getLogger("antefix.writer")

# Most bytes of one put: many blocks share a commit, and yet writing overlaps with computing.
BATCH_BYTES_MAX = 16 << 20
# The computation waits when this many bytes are not yet written; their rows stay in the pool until they are.
PENDING_BYTES_MAX = 128 << 20
# How a late write is counted.
WRITTEN_LATER = "written_later"


class RecordWriter:
    """Writes the records of one request. Payloads must stay unchanged until `flush` returns.

    patience: for how long an answer waits for writes.  writes: False for a worker that must not store KV under the
    names that it uses: all records are then dropped.
    """

    def __init__(
        self,
        store: Store,
        counters: StoreCounters,
        pool: WindowPool | None = None,
        *,
        writes: bool = True,
        patience: Patience | None = None,
    ) -> None:
        self._writes = writes
        self._patience = patience or Patience()
        self._watch = Watch(self._patience)
        self._is_held = False
        self._store = store
        self._counters = counters
        self._pool = pool
        self._queue: deque[tuple[Record, Tier]] = deque()
        self._pending_bytes = 0
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._broken = False
        # A record was left out because the store was late, so later ones would lack their parent.
        self._is_cut = False
        self._closing = False
        self._task: asyncio.Task[None] | None = None
        self._is_kept = False
        # The grant of this writer's request: the one loop of a decode worker puts records of all requests.
        self._grant = held()
        self.num_blocks_written = 0
        self.num_checkpoints_written = 0
        self.bytes_written = 0
        # Why something was not stored. Only the first reason is kept: later records only lack their parent.
        self.error = ""

    async def put(self, record: Record, *, tier: Tier = Tier.DISK) -> None:
        """Queue one record. The call waits only if too many records are pending, and the store is not late. If the
        window pool refuses the checkpoint, it goes to disk.
        """
        if not self._writes or ((self._broken or self._is_cut) and tier is Tier.DISK):
            return
        if not await self._has_room():
            self._is_cut = True
            self.error = self.error or "the store is late, and too many records wait for it"
            return
        self._queue.append((record, tier if self._pool is not None else Tier.DISK))
        self._pending_bytes += len(record.payload)
        if self._is_held:
            return
        if self._pending_bytes >= PENDING_BYTES_MAX:
            self._room.clear()
        self._begin()

    def _begin(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._write_all())
        self._wake.set()

    async def _has_room(self) -> bool:
        """Wait for room. False: the store is late, so there may be none for long."""
        if self._room.is_set():
            return True
        room = asyncio.ensure_future(self._room.wait())
        try:
            return await self._watch.ended_in_time(room)
        finally:
            room.cancel()

    def hold(self) -> None:
        """Keep records in the queue until `let_go` or `drop`. No other record may have been put before."""
        self._is_held = True

    def let_go(self, num_stored_tokens: int) -> None:
        """Write the records that were held, except blocks of the first `num_stored_tokens` tokens, which are stored."""
        self._is_held = False
        kept = [
            (record, tier)
            for record, tier in self._queue
            if record.kind is not RecordKind.BLOCK or record.position > num_stored_tokens
        ]
        self._queue = deque(kept)
        self._pending_bytes = sum(len(record.payload) for record, _ in kept)
        if self._pending_bytes >= PENDING_BYTES_MAX:
            self._room.clear()
        if kept:
            self._begin()

    def drop(self) -> None:
        """Forget the records that were held."""
        self._is_held = False
        self._queue.clear()
        self._pending_bytes = 0

    async def flush(self) -> None:
        """Wait until every queued record is durable or has failed. Ends the writer of records; the ending completes
        even if it is cancelled.
        """
        self._closing = True
        self._wake.set()
        if self._task is not None:
            await uninterrupted(self._task)

    async def flush_in_time(self) -> bool:
        """As `flush`, but if the store is late, the rest is written later. Returns whether all was written; if not,
        payloads must stay unchanged until `when_over` calls back.
        """
        self._closing = True
        self._wake.set()
        if self._task is None:
            return True
        if await self._watch.ended_in_time(self._task):
            self._task.result()
            return True
        self.error = self.error or "the store was late; records were written after the answer, if it took them"
        if not self._is_kept:  # a decode output asks twice
            self._is_kept = True
            self._counters.note_late(WRITTEN_LATER)
            self._patience.keep(self._task)
        return False

    def when_over(self, do: Callable[[], object]) -> None:
        """Call `do` when no payload is read any more."""
        assert self._task is not None
        self._task.add_done_callback(lambda _: do())

    async def _write_all(self) -> None:
        hold(self._grant)
        try:
            await self._run()
        finally:
            # However the writer ended, a producer that waits for room must not wait for ever.
            self._broken = True
            self._room.set()

    async def _run(self) -> None:
        while True:
            if not self._queue:
                if self._closing:
                    return
                self._wake.clear()
                await self._wake.wait()
                continue
            batch, tier = self._next_batch()
            if tier is Tier.DISK or not await self._pool_put(batch[0]):
                await self._write(batch)
            nbytes = sum(len(record.payload) for record in batch)
            self._pending_bytes -= nbytes
            if self._pending_bytes < PENDING_BYTES_MAX:
                self._room.set()

    def _next_batch(self) -> tuple[list[Record], Tier]:
        """The next records for one tier: one record for the window pool, up to BATCH_BYTES_MAX for the store."""
        record, tier = self._queue.popleft()
        batch, nbytes = [record], len(record.payload)
        while tier is Tier.DISK and self._queue and self._queue[0][1] is Tier.DISK:
            nbytes += len(self._queue[0][0].payload)
            if nbytes > BATCH_BYTES_MAX:
                break
            batch.append(self._queue.popleft()[0])
        return batch, tier

    async def _pool_put(self, record: Record) -> bool:
        assert self._pool is not None
        try:
            kept = await self._pool.put(record)
        except AntefixError as err:
            self._counters.note(err)
            return False
        self._counters.pool_refused += not kept
        self.num_checkpoints_written += kept
        return kept

    async def _write(self, batch: list[Record]) -> None:
        if self._broken:
            return
        predicted_s = sum(len(record.payload) for record in batch) / WRITE_BYTES_PER_S
        try:
            with self._watch.waiting(self._patience.writes, predicted_s):
                result = await self._store.put(batch)
        except AntefixError as err:
            self._broken = True
            _note_failure(self._counters, err, len(batch))
            self.error = self.error or f"{type(err).__name__}: {err}"
            log.warning("the store refused a write, so no more records of this request are written: %s", err)
            return
        self._counters.note_refusals(result.refused.values())
        self._broken = bool(result.refused)
        self.error = self.error or next((refusal.text for refusal in result.refused.values()), "")
        taken = [record for record in batch if record.hash not in result.refused]
        num_blocks = sum(record.kind is RecordKind.BLOCK for record in taken)
        self.bytes_written += sum(len(record.payload) for record in taken)
        # Records that another worker has stored meanwhile are not billed as written here. The store says only how many
        # it had, not which; they are taken for blocks, because blocks are what two workers compute at the same time.
        self.num_blocks_written += max(0, num_blocks - result.num_existing)
        self.num_checkpoints_written += len(taken) - num_blocks


async def put_quietly(store: Store, record: Record, counters: StoreCounters, patience: Patience) -> bool:
    """Put one record now. If the store could not take the record, or is late, this is counted and the result is
    False.
    """
    predicted_s = len(record.payload) / WRITE_BYTES_PER_S
    try:
        result = await patience.within(patience.writes, predicted_s, store.put([record]))
    except AntefixError as err:
        _note_failure(counters, err, 1)
        return False
    counters.note_refusals(result.refused.values())
    return not result.refused


def _note_failure(counters: StoreCounters, err: AntefixError, num_records: int) -> None:
    counters.note(err)
    if isinstance(err, InvalidRequest):
        # The store would refuse the record again.
        counters.note_refusals([Refusal(RefusalReason.INVALID, str(err))] * num_records)

"""Writes one batch of records: makes room, appends, syncs, commits. The engine's lock covers it.

The index transaction is prepared while the disk syncs, and committed when the records are durable. Only after this
commit is a record stored. If any step fails, neither records nor index entries are left.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import lmdb

from antefix.errors import StoreFull
from antefix.record import Record, RecordName, Refusal, RefusalReason
from antefix.store_files.index import Index
from antefix.store_files.record_header import RecordHeader, owner_row
from antefix.telemetry.exposition import SHORT_SECONDS, histogram
from antefix_kvstore.admission import Admission, refuse, without_orphans
from antefix_kvstore.compaction import note_end
from antefix_kvstore.disk_reserve import is_full
from antefix_kvstore.drafting import Drafter
from antefix_kvstore.eviction import EvictionPolicy
from antefix_kvstore.index_forest import drop_false_roots, insert_entry
from antefix_kvstore.index_writer import IndexTxn
from antefix_kvstore.segments import Draft, Segments
from antefix_kvstore.space import Space
from antefix_kvstore.storage_counters import StorageCounters
from antefix_kvstore.tenant_quota import Quotas
from antefix_kvstore.touches import Touches

log = logging.getLogger("antefix_kvstore")


class BatchWriter:
    def __init__(
        self,
        index: Index,
        segments: Segments,
        space: Space,
        *,
        drafter: Drafter,
        quotas: Quotas,
        policy: EvictionPolicy,
        touches: Touches,
        counters: StorageCounters,
        clock_ms: Callable[[], int],
        durable: bool,
    ) -> None:
        self._index = index
        self._segments = segments
        self._space = space
        self._drafter = drafter
        self._quotas = quotas
        self._policy = policy
        self._touches = touches
        self._counters = counters
        self._clock_ms = clock_ms
        self._durable = durable
        self.sync_s = histogram(
            "antefix_store_sync_seconds", "Syncs of a segment before a put is answered.", buckets=SHORT_SECONDS
        )
        self.sync_thread = ThreadPoolExecutor(1, thread_name_prefix="antefix-sync")

    def close(self) -> None:
        self.sync_thread.shutdown()

    def put(self, batch: Sequence[Record], admission: Admission) -> None:
        """Store records with one sync for all of them; if there is no space, all of them are refused."""
        batch = without_orphans(batch, admission)
        try:
            drafts = self._drafter.drafts(batch, admission.first)
            if refused := self._quotas.over(self._space, self._index, drafts, admission.anchors):
                for owner, reason in refused.items():
                    refuse([record for record in batch if _owner_of(record) == owner], admission, reason)
                batch = [record for record in batch if _owner_of(record) not in refused]
                drafts = [draft for draft in drafts if draft.header.owner not in refused]
            self._make_room(sum(draft.header.extent_bytes for draft in drafts), admission.anchors)
            self._append_and_commit(batch, drafts, admission)
        except (StoreFull, lmdb.Error, OSError) as err:
            if not isinstance(err, StoreFull) and not is_full(err, self._index.directory):
                raise
            why = str(err)
            if not isinstance(err, StoreFull):
                # The system's own words may have paths, so they are for the log only.
                what = "index" if isinstance(err, lmdb.MapFullError) else "file system"
                log.warning("records are refused, because the %s is full: %s", what, err)
                why = f"its {what} has no space left"
            refuse(batch, admission, Refusal(RefusalReason.FULL, f"the store is full: {why}"))

    def _make_room(self, nbytes: int, keep: Collection[RecordName]) -> None:
        try:
            self._space.make_room(nbytes, keep)
        except (lmdb.Error, OSError) as err:
            # Evicting records needs disk space too; the reserve exists for that.
            if not (is_full(err, self._index.directory) and self._space.reserve.release()):
                raise
            self._space.make_room(nbytes, keep)

    def _append_and_commit(self, batch: Sequence[Record], drafts: Sequence[Draft], admission: Admission) -> None:
        if not drafts:
            return
        placed = self._segments.append(drafts, self._clock_ms())
        start = placed[0].offset
        try:
            with self._syncing() as synced, IndexTxn(self._index, before_commit=synced) as txn:
                for record, header in zip(batch, placed, strict=True):
                    self._insert(txn, record, header, admission)
                note_end(txn, self._segments)
                self._touches.apply(txn, self._policy)
        except BaseException:
            self._segments.rollback(start)
            raise
        admission.anchors.update((record.kind, record.hash) for record in batch)
        self._counters.puts += len(placed)
        self._counters.bytes_written += sum(header.extent_bytes for header in placed)
        self._counters.payload_bytes_written += sum(header.payload_bytes for header in placed)

    @contextlib.contextmanager
    def _syncing(self) -> Iterator[Callable[[], None]]:
        """Sync the segments to disk while the code inside this context runs. The context yields a function that waits
        for the sync; leaving the context waits for the sync too.
        """
        if not self._durable:
            self._segments.written()
            self._segments.sync_name()
            yield lambda: None
            return
        syncing = self.sync_thread.submit(self._sync)
        self._counters.syncs += 1
        try:
            yield syncing.result
        finally:
            wait([syncing])

    def _sync(self) -> None:
        with self.sync_s.time():
            self._segments.sync()

    def _insert(self, txn: IndexTxn, record: Record, header: RecordHeader, admission: Admission) -> None:
        insert_entry(txn, header, self._policy, used_ms=header.created_ms)
        state = txn.fingerprint(record.fingerprint)
        tokens = admission.block_tokens.get(record.fingerprint)
        assert state is not None
        if tokens is not None and (state.block_tokens == 0 or tokens < state.block_tokens):
            relearned = state.block_tokens != 0
            txn.set_fingerprint(record.fingerprint, tokens)
            if relearned:
                drop_false_roots(txn, self._space, state.id, tokens)


def _owner_of(record: Record) -> bytes:
    return owner_row(record.version, record.tenant)

"""A store within this process: what `antefix.store.api.Store` promises, without a service or gRPC."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from antefix.errors import InvalidRequest
from antefix.events.block_events import BlockEvent
from antefix.events.numbered_log import Batch, Cursor, watch_log
from antefix.layout import PayloadLayout
from antefix.record import (
    MEMORY_KINDS,
    STORED_KINDS,
    BlockFate,
    Held,
    LookupResult,
    PutResult,
    Record,
    RecordKind,
    RecordName,
)
from antefix.store.record_source import records_of
from antefix.store.store_stats import KindTotals, StoreTotals
from antefix.store_files import codec
from antefix.store_files.gone_blocks import fate_of
from antefix.store_files.record_header import owner_row
from antefix_kvstore.engine_stats import collect
from antefix_kvstore.group_commit import GroupCommitter
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.memory_records import TOO_LARGE, MemoryRecords
from antefix_kvstore.scrubber import Scrubber
from antefix_kvstore.storage_engine import StorageEngine

T = TypeVar("T")
_READ_THREADS: Final = 4


class EmbeddedStore:
    """A store directory, open for writing in this process. The store must be closed with `close`, or used in `async
    with`.

    The store neither makes nor checks seals: any process that can write the directory is trusted.

    Calls run in threads, which wait for the disk. All calls must be made from one event loop. `engine` is the same
    store for callers without an event loop. `BlockingStore(antefix_kvstore.open(...))` has the same calls without
    `await`.
    """

    def __init__(self, config: KvStoreConfig) -> None:
        """Raises:  ConfigError: not a store, another format version, or in use by another process."""
        self.engine: Final = StorageEngine(config)
        self._writer = GroupCommitter(self.engine)
        self._memory = MemoryRecords(bytes_max=config.handoff_bytes_max, ttl_s=config.handoff_ttl_s)
        self._scrubber = Scrubber(self.engine, max(config.scrub_bytes_per_s, 1))
        if config.scrub_bytes_per_s:
            self._scrubber.start()
        self._threads = ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="antefix-embedded")

    async def close(self) -> None:
        """Commit the writes that are queued, and close the files. Closing again does nothing."""
        if self.engine.is_open:
            await asyncio.get_running_loop().run_in_executor(None, self.close_here)

    def close_here(self) -> None:
        """Close in the calling thread. Closing also works while Python exits, when no thread may be started any
        more.
        """
        if not self.engine.is_open:
            return
        self._scrubber.stop()
        self._writer.stop()
        self._threads.shutdown()
        self.engine.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def lookup(self, chain: Sequence[bytes], *, fingerprint: bytes, tenant: bytes = b"") -> LookupResult:
        """The longest stored prefix of `chain`."""
        return await self._in_thread(lambda: self.lookup_here(chain, fingerprint=fingerprint))

    def lookup_here(self, chain: Sequence[bytes], *, fingerprint: bytes) -> LookupResult:
        """`lookup` in the calling thread."""
        return self.engine.lookup(chain, fingerprint=fingerprint)

    async def held(self, chain: Sequence[bytes], *, fingerprint: bytes, tenant: bytes = b"") -> Held:
        """All stored blocks and checkpoints of `chain`, also those after a block that is missing."""
        return await self._in_thread(lambda: self.engine.held(chain, fingerprint=fingerprint))

    async def fate(self, hash: bytes, *, fingerprint: bytes) -> BlockFate:
        """Why a block that was not found is missing (never seen, evicted, expired, ...)."""
        engine = self.engine
        return await self._in_thread(
            lambda: fate_of(
                engine.reader.directory, engine.index, hash, fingerprint=fingerprint, now_ms=engine.clock_ms()
            )
        )

    async def get_blocks(
        self, hashes: Sequence[bytes], into: Sequence[memoryview], *, fingerprint: bytes, tenant: bytes = b""
    ) -> int:
        """Fill `into[i]` with block `hashes[i]`, verified. Returns the number of leading blocks that passed all
        checks.
        """
        return await self._in_thread(lambda: self.get_blocks_here(hashes, into, fingerprint=fingerprint, tenant=tenant))

    def get_blocks_here(
        self, hashes: Sequence[bytes], into: Sequence[memoryview], *, fingerprint: bytes, tenant: bytes = b""
    ) -> int:
        """`get_blocks` in the calling thread."""
        outcome = self.engine.reader.read_blocks(hashes, into, fingerprint=fingerprint, tenant=tenant)
        self.engine.settle(RecordKind.BLOCK, hashes, outcome, num_missed=len(hashes) - outcome.num_good)
        return outcome.num_good

    async def get(self, kind: RecordKind, hash: bytes, *, fingerprint: bytes, tenant: bytes = b"") -> bytes | None:
        """One verified payload; None if it is not stored (any more) or was corrupt."""
        return await self._in_thread(lambda: self.get_here(kind, hash, fingerprint=fingerprint, tenant=tenant))

    def get_here(self, kind: RecordKind, hash: bytes, *, fingerprint: bytes, tenant: bytes = b"") -> bytes | None:
        """`get` in the calling thread."""
        if kind in MEMORY_KINDS:
            kept = self._memory.get(kind, hash, fingerprint)
            return None if kept is None else kept[0]
        payload, outcome = self.engine.reader.read(kind, hash, fingerprint=fingerprint, tenant=tenant)
        self.engine.settle(kind, [hash], outcome, num_missed=int(payload is None))
        return None if payload is None else bytes(payload)

    async def get_records(
        self, kind: RecordKind, hashes: Sequence[bytes], *, fingerprint: bytes, tenant: bytes = b""
    ) -> list[Record]:
        """The leading stored records of `hashes`, complete, to be stored elsewhere."""
        reader = self.engine.reader

        def read() -> list[Record]:
            located = reader.locate(kind, hashes, fingerprint=fingerprint, tenant=tenant)
            payloads = [bytearray(nbytes) for nbytes in located.sizes]
            outcome = reader.fill(located, lambda number, _: (memoryview(payloads[number]),))
            sealed = [want.sealed for want in located.wanted[: outcome.num_good]]
            return records_of(sealed, payloads[: outcome.num_good])

        return await self._in_thread(read)

    async def put(self, records: Sequence[Record]) -> PutResult:
        """Store records in order; they are durable when this returns, except handoffs, which are kept in memory.

        Raises:  InvalidRequest: a malformed record, or a payload that its registered layout does not fit; nothing has
            been stored.  Overloaded: too much is waiting for the disk.
        """
        lasting = [record for record in records if record.kind not in MEMORY_KINDS]
        stored = PutResult(num_stored=0, num_existing=0)
        if lasting:
            stored = await asyncio.wrap_future(self._writer.submit(lasting))
        num_kept, refused = 0, dict(stored.refused)
        for record in records:
            if record.kind in MEMORY_KINDS:
                if self._memory.put(record):
                    num_kept += 1
                else:
                    refused[record.hash] = TOO_LARGE
        return PutResult(num_stored=stored.num_stored + num_kept, num_existing=stored.num_existing, refused=refused)

    async def reject(self, kind: RecordKind, hashes: Sequence[bytes]) -> None:
        """Make records count as missing until they are put again: their checksums were right, but their content cannot
        be used.
        """
        if kind in STORED_KINDS:
            names = [(kind, block_hash) for block_hash in hashes]
            await self._in_thread(lambda: self.engine.note_use((), (), unusable=names))

    async def register(self, fingerprint: bytes, layout: PayloadLayout, *, statement: bytes = b"") -> None:
        """Register a fingerprint's payload layout. The fingerprint's payloads may then be compressed, and payloads of
        other sizes are refused.
        """
        plans = {
            RecordKind.BLOCK: codec.plan_of_block(layout),
            RecordKind.CHECKPOINT: codec.plan_of_checkpoint(layout),
        }
        # A payload without parts is one zero byte or absent: there is nothing to compress and no size to check.
        told = {kind: plan for kind, plan in plans.items() if plan.parts}
        await self._in_thread(lambda: self.engine.register(fingerprint, layout.block_size, told, statement=statement))

    async def pin(self, names: Sequence[RecordName], *, duration_s: float, owner: bytes) -> int:
        """Keep an owner's records from eviction for a time; 0 unpins them. Returns how many of the named records are
        stored.

        owner: the owner's digest, as in the records' `tenant` field.
        """
        row = owner_row(2, owner)
        return await self._in_thread(lambda: self.engine.pin(_stored(names), duration_s, owner=row))

    async def evict(self, names: Sequence[RecordName], *, owner: bytes) -> int:
        """Delete an owner's records and all records that depend on them, pinned or not. Returns how many were
        dropped.
        """
        row = owner_row(2, owner)
        return await self._in_thread(lambda: self.engine.evict(_stored(names), owner=row))

    async def purge(self, owner: bytes) -> int:
        """Delete all records of an owner; if the owner names no user, those of the whole tenant. Returns how many were
        dropped.
        """
        return self._memory.purge(owner) + await self._in_thread(lambda: self.engine.purge(owner_row(2, owner)))

    def watch(self, cursor: Cursor | None = None) -> AsyncGenerator[Batch[BlockEvent], None]:
        """Events of the store: first all that is stored now, then every change without gaps; with `cursor`, only the
        changes since the cursor.
        """
        return watch_log(self.engine.events, cursor or Cursor(), self._snapshot)

    async def _snapshot(self) -> AsyncGenerator[Batch[BlockEvent], None]:
        pieces = await self._in_thread(self.engine.snapshot)
        while (piece := await self._in_thread(lambda: next(pieces, None))) is not None:
            yield piece

    async def stats(self) -> StoreTotals:
        """What the store holds, and counters of what it has done since it was opened."""
        found = await self._in_thread(lambda: collect(self.engine))
        kinds = dict.fromkeys(RecordKind, KindTotals())
        for kind, count in found.kinds.items():
            kinds[kind] = KindTotals(
                num_records=count.records, stored_bytes=count.stored_bytes, payload_bytes=count.payload_bytes
            )
        for kind in MEMORY_KINDS:
            records, nbytes = self._memory.count(kind)
            kinds[kind] = KindTotals(num_records=records, stored_bytes=nbytes, payload_bytes=nbytes)
        known: dict[str, Any] = {**found.numbers, **found.texts}
        names = [field.name for field in dataclasses.fields(StoreTotals) if field.name != "kinds"]
        return StoreTotals(kinds=kinds, **{name: known[name] for name in names})

    async def _in_thread(self, call: Callable[[], T]) -> T:
        """Run a blocking call in a thread. After this has returned, raised or was cancelled, no thread writes to the
        caller's buffers.
        """
        work = asyncio.get_running_loop().run_in_executor(self._threads, call)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            await asyncio.wait([work])
            raise


def _stored(names: Sequence[RecordName]) -> list[RecordName]:
    """Raises:  InvalidRequest: a kind that is not kept on disk."""
    if any(kind not in STORED_KINDS for kind, _ in names):
        raise InvalidRequest("only blocks and checkpoints can be kept on disk")
    return list(names)

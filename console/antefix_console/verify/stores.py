"""Stores for verification: an empty one, a dictionary, and one that shows a prefix only."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

from antefix.events.block_events import BlockEvent
from antefix.events.numbered_log import Batch, Cursor
from antefix.layout import PayloadLayout
from antefix.miss_reason import MissReason
from antefix.record import BlockFate, Held, LookupResult, PutResult, Record, RecordKind, RecordName
from antefix.store.api import Store
from antefix.store.store_stats import StoreTotals


class EmptyStore:
    """Holds nothing and keeps nothing. A cold run uses it."""

    async def lookup(self, chain: Sequence[bytes], *, fingerprint: bytes, tenant: bytes = b"") -> LookupResult:
        return LookupResult(num_blocks=0)

    async def held(self, chain: Sequence[bytes], *, fingerprint: bytes, tenant: bytes = b"") -> Held:
        found = await self.lookup(chain, fingerprint=fingerprint, tenant=tenant)
        spans = ((0, found.num_blocks),) if found.num_blocks else ()
        return Held(spans=spans, checkpoints=found.checkpoints)

    async def fate(self, hash: bytes, *, fingerprint: bytes) -> BlockFate:
        return BlockFate(reason=MissReason.FIRST_SEEN)

    async def get_blocks(
        self, hashes: Sequence[bytes], into: Sequence[memoryview], *, fingerprint: bytes, tenant: bytes = b""
    ) -> int:
        return 0

    async def get(self, kind: RecordKind, hash: bytes, *, fingerprint: bytes, tenant: bytes = b"") -> bytes | None:
        return None

    async def put(self, records: Sequence[Record]) -> PutResult:
        return PutResult(num_stored=len(records), num_existing=0)

    async def reject(self, kind: RecordKind, hashes: Sequence[bytes]) -> None:
        """Does nothing. No check should reject a record; if a check does, this shows as a miss."""

    async def register(self, fingerprint: bytes, layout: PayloadLayout, *, statement: bytes = b"") -> None:
        pass

    async def pin(self, names: Sequence[RecordName], *, duration_s: float, owner: bytes) -> int:
        return 0

    async def evict(self, names: Sequence[RecordName], *, owner: bytes) -> int:
        return 0

    async def watch(self, cursor: Cursor | None = None) -> AsyncGenerator[Batch[BlockEvent], None]:
        yield Batch(cursor=Cursor(epoch=b"empty"), snapshot=True, snapshot_begins=True, snapshot_ends=True)

    async def stats(self) -> StoreTotals:
        return StoreTotals()

    async def close(self) -> None:
        pass


class MemoryStore(EmptyStore):
    """Keeps records by kind, fingerprint and hash, for runs without a store service."""

    def __init__(self) -> None:
        self.payloads: dict[tuple[RecordKind, bytes, bytes], bytes] = {}

    async def lookup(self, chain: Sequence[bytes], *, fingerprint: bytes, tenant: bytes = b"") -> LookupResult:
        num_blocks = 0
        while num_blocks < len(chain) and (RecordKind.BLOCK, fingerprint, chain[num_blocks]) in self.payloads:
            num_blocks += 1
        checkpoints = (
            number
            for number in range(1, num_blocks + 1)
            if (RecordKind.CHECKPOINT, fingerprint, chain[number - 1]) in self.payloads
        )
        return LookupResult(num_blocks=num_blocks, checkpoints=tuple(checkpoints))

    async def get_blocks(
        self, hashes: Sequence[bytes], into: Sequence[memoryview], *, fingerprint: bytes, tenant: bytes = b""
    ) -> int:
        for number, (name, row) in enumerate(zip(hashes, into, strict=True)):
            payload = self.payloads.get((RecordKind.BLOCK, fingerprint, name))
            if payload is None:
                return number
            row[:] = payload
        return len(hashes)

    async def get(self, kind: RecordKind, hash: bytes, *, fingerprint: bytes, tenant: bytes = b"") -> bytes | None:
        return self.payloads.get((kind, fingerprint, hash))

    async def put(self, records: Sequence[Record]) -> PutResult:
        num_existing = 0
        for record in records:
            name = (record.kind, record.fingerprint, record.hash)
            num_existing += name in self.payloads
            self.payloads.setdefault(name, bytes(record.payload))
        return PutResult(num_stored=len(records) - num_existing, num_existing=num_existing)


class PrefixView(EmptyStore):
    """A store that shows only the first `num_blocks` blocks of a chain, as after eviction, which starts from the end.

    Records which blocks were put, by the number of tokens up to their end.
    """

    def __init__(self, store: Store, num_blocks: int) -> None:
        self._store = store
        self._num_blocks = num_blocks
        self.put_positions: list[int] = []

    async def lookup(self, chain: Sequence[bytes], *, fingerprint: bytes, tenant: bytes = b"") -> LookupResult:
        found = await self._store.lookup(chain, fingerprint=fingerprint, tenant=tenant)
        num_blocks = min(found.num_blocks, self._num_blocks)
        checkpoints = tuple(block for block in found.checkpoints if block <= num_blocks)
        return LookupResult(num_blocks=num_blocks, checkpoints=checkpoints)

    async def get_blocks(
        self, hashes: Sequence[bytes], into: Sequence[memoryview], *, fingerprint: bytes, tenant: bytes = b""
    ) -> int:
        return await self._store.get_blocks(hashes, into, fingerprint=fingerprint, tenant=tenant)

    async def get(self, kind: RecordKind, hash: bytes, *, fingerprint: bytes, tenant: bytes = b"") -> bytes | None:
        return await self._store.get(kind, hash, fingerprint=fingerprint, tenant=tenant)

    async def put(self, records: Sequence[Record]) -> PutResult:
        """This store keeps nothing, so that the next case finds the same records as this one."""
        self.put_positions += [record.position for record in records if record.kind is RecordKind.BLOCK]
        return PutResult(num_stored=len(records), num_existing=0)

    async def register(self, fingerprint: bytes, layout: PayloadLayout, *, statement: bytes = b"") -> None:
        await self._store.register(fingerprint, layout, statement=statement)

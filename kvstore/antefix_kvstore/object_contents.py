"""An object store as source and target of copies: its contents as stretches of chains, and a place to write records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Final, Self

from antefix.block import digest_of
from antefix.blocking import LoopThread
from antefix.errors import BlockCorrupt
from antefix.objects.bucket import ObjectGone, open_bucket
from antefix.objects.catalog import Catalog, all_headers, all_of, read_headers
from antefix.objects.object_tier import ObjectTier
from antefix.objects.object_writer import SEGMENT_BYTES, ObjectSettings, ObjectWriter
from antefix.objects.rewrite import purge_owner
from antefix.objects.segment_object import TRAILER, SegmentRef, scan_records
from antefix.record import Held, PutResult, Record, RecordKind, RecordName, Refusal, RefusalReason
from antefix.store.store_stats import StoreTotals
from antefix.store_files import codec
from antefix.store_files.encryption import KeyRing
from antefix.store_files.record_format import IndexEntry
from antefix.store_files.record_header import RecordHeader
from antefix_kvstore.store_contents import LayoutOf, Stretch, StretchTables, stretches_of

_BATCH_RECORDS: Final = 256
# The object tier has no budget that a copy could fill; the janitor deletes what exceeds its quota.
_ROOM_BYTES: Final = 1 << 62


class ObjectContents:
    """An object store as the source of a copy. Its calls block; for tools."""

    def __init__(self, url: str, *, keys: KeyRing | None = None) -> None:
        """Raises:  ConfigError: the URL names no object store.  Unavailable: the object store does not answer."""
        self._loop = LoopThread()
        try:
            self._tier = self._loop.run(_opened(url, keys))
            self._headers = self._loop.run(all_headers(self._tier.catalog))
        except BaseException:
            self._loop.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.run(self._tier.close())
        self._loop.close()

    def layouts(self) -> list[LayoutOf]:
        """Layouts of all fingerprints for which the segments have statements."""
        said = self._loop.run(statements_of(self._tier.catalog, [ref for ref, _ in self._headers]))
        tokens = _block_tokens([header for _, headers in self._headers for header in headers])
        return [
            LayoutOf(fingerprint=digest, block_tokens=size, plans={}, statement=said.get(digest, b""))
            for digest, size in tokens.items()
        ]

    def stretches(self) -> list[Stretch]:
        """All stretches of blocks in the object store, the newest first."""
        tables = StretchTables()
        fingerprints: dict[bytes, int] = {}
        owners: dict[bytes, int] = {}
        for _, headers in self._headers:
            for header in headers:
                rows = tables.blocks if header.kind is RecordKind.BLOCK else tables.checkpoints
                rows[header.hash] = _entry_of(
                    header,
                    fingerprints.setdefault(header.fingerprint, len(fingerprints)),
                    owners.setdefault(header.owner, len(owners)),
                )
        tables.fingerprints = {number: digest for digest, number in fingerprints.items()}
        tables.owners = {number: row for row, number in owners.items()}
        return stretches_of(tables)

    def records(self, stretch: Stretch, wanted: Sequence[RecordName]) -> Iterator[list[Record]]:
        """The wanted records of a stretch of chain, verified, in batches. Records that cannot be read are left out."""
        for kind in (RecordKind.BLOCK, RecordKind.CHECKPOINT):
            names = [name for each, name in wanted if each is kind]
            while names:
                part = names[:_BATCH_RECORDS]
                found = self._loop.run(self._tier.get_records(kind, part, fingerprint=stretch.fingerprint))
                yield found
                # Continue after a record that cannot be read.
                names = names[len(found) + (len(found) < len(part)) :]


async def _opened(url: str, keys: KeyRing | None) -> ObjectTier:
    tier = ObjectTier(open_bucket(url), decrypt=keys.decrypt if keys else None)
    await tier.catalog.refresh()
    return tier


async def statements_of(catalog: Catalog, refs: Sequence[SegmentRef]) -> dict[bytes, bytes]:
    """The statements about fingerprints, by digest. The statements lie in a segment between its last record and its
    footer.
    """
    said: dict[bytes, bytes] = {}

    async def read(ref: SegmentRef) -> list[bytes]:
        try:
            headers = await read_headers(catalog.bucket, ref)
            if not headers or all(header.fingerprint in said for header in headers):
                return []
            start = headers[-1].offset + headers[-1].extent_bytes
            data = await catalog.bucket.read(ref.name, start, ref.nbytes - TRAILER.size)
        except (ObjectGone, BlockCorrupt):
            return []
        found = [
            bytes(stored) for header, stored in scan_records(data, ref, start) if header.kind is RecordKind.STATEMENT
        ]
        said.update((digest_of(text), text) for text in found)
        return found

    # One segment at a time: most segments repeat the statements of the first one.
    await all_of(read, refs, 1)
    return said


def _entry_of(header: RecordHeader, fingerprint_id: int, tenant_id: int) -> IndexEntry:
    """The index entry that a store would have for this record of the object store."""
    return IndexEntry(
        segment=header.segment,
        offset=header.offset,
        stored_bytes=header.stored_bytes,
        payload_bytes=header.payload_bytes,
        position=header.position,
        fingerprint_id=fingerprint_id,
        tenant_id=tenant_id,
        children=0,
        rank_ms=header.created_ms,
        expires_ms=header.expires_ms,
        pinned_ms=0,
        prefix_bytes=0,
        cost_ms=header.cost_us // 1000,
        ttl_s=0,
        codec=header.codec,
        flags=header.flags,
        parent=header.parent,
    )


def _block_tokens(headers: Sequence[RecordHeader]) -> dict[bytes, int]:
    """Tokens per block, by fingerprint. Positions are multiples of the block size, so the block size is the smallest
    distance of two positions, or the first position.
    """
    positions: dict[bytes, set[int]] = {}
    for header in headers:
        positions.setdefault(header.fingerprint, set()).add(header.position)
    return {
        digest: min(b - a for a, b in zip([0, *sorted(found)], sorted(found), strict=False))
        for digest, found in positions.items()
    }


class ObjectTarget:
    """An object store as the target of a copy. Records are gathered into segments, and the last segment is written when
    the target is closed.
    """

    def __init__(self, url: str, *, keys: KeyRing | None = None, ttl_s: float = 0.0) -> None:
        """ttl_s: the lifetime of the copies in seconds; 0: no limit. Raises: ConfigError: the URL is not that of an
        object store.
        """
        self._plans: dict[tuple[bytes, RecordKind], codec.PlanePlan] = {}
        self._statements: dict[bytes, bytes] = {}
        self._tier = ObjectTier(open_bucket(url), decrypt=keys.decrypt if keys else None)
        settings = ObjectSettings(
            ttl_s=dict.fromkeys(RecordKind, ttl_s),
            keys=keys,
            plans=lambda: self._plans,
            statements=lambda: self._statements,
        )
        self._writer = ObjectWriter(self._tier.catalog, settings)
        self._waiting: dict[RecordName, Record] = {}
        self._waiting_bytes = 0

    async def held(self, chain: Sequence[bytes], *, fingerprint: bytes, tenant: bytes = b"") -> Held:
        """Which blocks of `chain` the object store has, including records that wait here to be written."""
        there = await self._tier.held(chain, fingerprint=fingerprint, tenant=tenant)
        flags = [(RecordKind.BLOCK, name) in self._waiting for name in chain]
        for start, stop in there.spans:
            flags[start:stop] = [True] * (stop - start)
        waiting = {number + 1 for number, name in enumerate(chain) if (RecordKind.CHECKPOINT, name) in self._waiting}
        return Held.of_flags(flags, sorted({*there.checkpoints, *waiting}))

    async def put(self, records: Sequence[Record]) -> PutResult:
        refused = {
            record.hash: Refusal(RefusalReason.NO_KEY, f"no key for tenant {record.tenant.hex()}")
            for record in records
            if not self._writer.takes(record)
        }
        for record in records:
            if record.hash not in refused and (record.kind, record.hash) not in self._waiting:
                self._waiting[record.kind, record.hash] = record
                self._waiting_bytes += memoryview(record.payload).nbytes
        if self._waiting_bytes >= SEGMENT_BYTES:
            await self._flush()
        return PutResult(num_stored=len(records) - len(refused), num_existing=0, refused=refused)

    async def _flush(self) -> None:
        await self._writer.write(list(self._waiting.values()))
        self._waiting.clear()
        self._waiting_bytes = 0

    async def pin(self, names: Sequence[RecordName], *, duration_s: float, owner: bytes) -> int:
        """Pinning does nothing here, because the object store does not evict records by use."""
        return 0

    async def purge(self, owner: bytes) -> int:
        return await purge_owner(self._tier.catalog, owner)

    async def register_layout(self, layout: LayoutOf) -> None:
        self._plans.update({(layout.fingerprint, kind): plan for kind, plan in layout.plans.items()})
        if layout.statement:
            self._statements[layout.fingerprint] = layout.statement

    async def stats(self) -> StoreTotals:
        return StoreTotals(budget_bytes=_ROOM_BYTES, limit_bytes=_ROOM_BYTES)

    async def close(self) -> None:
        """Write the records that wait.  Raises:  Unavailable: the object store cannot be reached."""
        try:
            await self._flush()
        finally:
            await self._tier.close()

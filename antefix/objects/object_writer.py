"""Writes segments to an object store, and returns the places of their records. This module knows no policy of what
should be written.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Final

from antefix.objects.catalog import Catalog
from antefix.objects.segment_object import BuiltSegment, Plans, SegmentRef, build_segment
from antefix.record import Record, RecordKind
from antefix.secret import TENANT_BYTES
from antefix.store_files.encryption import KeyRing
from antefix.store_files.record_header import owner_row

SEGMENT_BYTES: Final = 32 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectSettings:
    """How records are written. ttl_s: by kind of record, the time to live since the record was written; 0: for ever.

    plans: how payloads are compressed. statements: by fingerprint.
    """

    segment_bytes: int = SEGMENT_BYTES
    ttl_s: Mapping[RecordKind, float] = field(default_factory=dict)
    keys: KeyRing | None = None
    plans: Callable[[], Plans] = dict
    statements: Callable[[], Mapping[bytes, bytes]] = dict


@dataclass(slots=True)
class ObjectWriteCounters:
    """bytes_written: of whole objects."""

    num_records: int = 0
    num_segments: int = 0
    bytes_written: int = 0


class ObjectWriter:
    """Groups records into segments, each with records of one tenant and one kind. Used from one event loop."""

    def __init__(self, catalog: Catalog, settings: ObjectSettings) -> None:
        self.catalog: Final = catalog
        self.settings: Final = settings
        self.counters: Final = ObjectWriteCounters()

    def takes(self, record: Record) -> bool:
        """Whether there is a key to encrypt the record with, if all records are encrypted."""
        keys = self.settings.keys
        return keys is None or owner_row(record.version, record.tenant) in keys

    async def write(self, records: Sequence[Record]) -> int:
        """Write all of these records, neighbours together, even if some of them are stored already. Returns the number
        of bytes written.

        Raises:  Unavailable: not all of them were written.
        """
        before = self.counters.bytes_written
        for batch in batches_of(records, self.settings.segment_bytes):
            await self._write_segment(batch)
        return self.counters.bytes_written - before

    async def _write_segment(self, records: Sequence[Record]) -> SegmentRef:
        built = await asyncio.to_thread(self._build, records)
        await self.catalog.bucket.put(built.ref.name, built.parts)
        await self.catalog.add([(built.ref, built.records)])
        self.counters.num_records += len(records)
        self.counters.num_segments += 1
        self.counters.bytes_written += built.ref.nbytes
        return built.ref

    def _build(self, records: Sequence[Record]) -> BuiltSegment:
        settings = self.settings
        said = settings.statements()
        fingerprints = dict.fromkeys(record.fingerprint for record in records)
        return build_segment(
            records,
            created_ms=self.catalog.clock_ms(),
            ttl_s=settings.ttl_s.get(records[0].kind, 0.0),
            plans=settings.plans(),
            keys=settings.keys,
            statements=[said[each] for each in fingerprints if said.get(each)],
        )


def batches_of(records: Sequence[Record], bytes_max: int) -> Iterator[list[Record]]:
    """Records as segments of one tenant and kind each, in the order in which they came, and not larger than the limit
    if possible.
    """
    order = sorted(records, key=_group)
    for _, group in groupby(order, key=_group):
        batch: list[Record] = []
        nbytes = 0
        for record in group:
            size = memoryview(record.payload).nbytes
            if batch and nbytes + size > bytes_max:
                yield batch
                batch, nbytes = [], 0
            batch.append(record)
            nbytes += size
        yield batch


def _group(record: Record) -> tuple[bytes, int]:
    return record.tenant[:TENANT_BYTES], record.kind

"""Reads whole records (header and payload) from a store or tier, in order to put them into another store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from antefix.record import Buffer, Record, RecordKind
from antefix.store_files.seal import record_of


@runtime_checkable
class RecordSource(Protocol):
    """A store or a storage tier from which whole records can be read. Every store is one; some tiers are not."""

    async def get_records(
        self, kind: RecordKind, hashes: Sequence[bytes], *, fingerprint: bytes, tenant: bytes = b""
    ) -> list[Record]:
        """The leading ones of these records that the store has, with their seals. Reading stops at the first record of
        version 1.
        """


def records_of(sealed: Sequence[bytes], payloads: Sequence[Buffer]) -> list[Record]:
    """Records from received parts.  sealed: the sealed part of each record's header."""
    records = []
    for part, payload in zip(sealed, payloads, strict=True):
        record = record_of(part, payload)
        if record is None:
            break
        records.append(record)
    return records

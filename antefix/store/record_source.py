"""Whole records of a store or tier, which unlike payloads can be stored elsewhere: for copies, drains and moves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from antefix.record import Buffer, Record, RecordKind
from antefix.store_files.seal import record_of


@runtime_checkable
class RecordSource(Protocol):
    """What gives whole records; all stores do."""

    async def get_records(
        self, kind: RecordKind, hashes: Sequence[bytes], *, fingerprint: bytes, tenant: bytes = b""
    ) -> list[Record]:
        """The leading ones of these that are there, with the seals that they have. Ends at a record of version 1."""


def records_of(sealed: Sequence[bytes], payloads: Sequence[Buffer]) -> list[Record]:
    """sealed: the parts of the headers, as they came."""
    records = []
    for part, payload in zip(sealed, payloads, strict=True):
        record = record_of(part, payload)
        if record is None:
            break
        records.append(record)
    return records

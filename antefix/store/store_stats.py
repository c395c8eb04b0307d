"""A store's totals and counters, as Python values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from antefix.record import RecordKind


@dataclass(frozen=True, slots=True, kw_only=True)
class KindTotals:
    """Totals of one record kind.

    stored_bytes: bytes on disk, compressed and with headers.  payload_bytes: bytes that reads return.
    """

    num_records: int = 0
    stored_bytes: int = 0
    payload_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreTotals:
    """A store's totals. Counters count since the store was last opened.

    kinds: the totals of each record kind.  used_bytes: segments and index together.
    limit_bytes: how many bytes of its budget the store may use now.  free_bytes: free bytes of its file system.
    free_bytes_min: how many of those it leaves free.  stopped: why it stores nothing now; empty: it stores.
    impossible_writes: how many records could never be stored, with the last reason.
    """

    kinds: dict[RecordKind, KindTotals] = field(default_factory=lambda: dict.fromkeys(RecordKind, KindTotals()))
    budget_bytes: int = 0
    used_bytes: int = 0
    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    evictions: int = 0
    corrupt: int = 0
    limit_bytes: int = 0
    free_bytes: int = 0
    free_bytes_min: int = 0
    stopped: str = ""
    impossible_writes: int = 0
    impossible_write: str = ""


def sum_of(parts: Sequence[StoreTotals]) -> StoreTotals:
    """The totals of several stores together. If a field is a text, the first text that is not empty is taken."""
    kinds = {
        kind: KindTotals(
            **{each.name: sum(getattr(part.kinds[kind], each.name) for part in parts) for each in fields(KindTotals)}
        )
        for kind in RecordKind
    }
    numbers: dict[str, Any] = {
        each.name: sum(getattr(part, each.name) for part in parts) for each in fields(StoreTotals) if each.type == "int"
    }
    texts: dict[str, Any] = {
        each.name: next((text for part in parts if (text := getattr(part, each.name))), "")
        for each in fields(StoreTotals)
        if each.type == "str"
    }
    return StoreTotals(kinds=kinds, **numbers, **texts)

"""A store's numbers, as values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from antefix.record import RecordKind


@dataclass(frozen=True, slots=True, kw_only=True)
class KindTotals:
    """stored_bytes: on disk, headers and compression included.  payload_bytes: what reads return."""

    num_records: int = 0
    stored_bytes: int = 0
    payload_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreTotals:
    """kinds: of each.  used_bytes: of the budget, segments and index together. Counters are since it was opened.

    limit_bytes: what it may use now, of the budget; free_bytes, free_bytes_min: of its file system, and what it leaves
    of that.  stopped: why nothing is stored now, or empty.  impossible_writes: could never be stored; the last reason.
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
    """Of several stores together; of texts the first that says something."""
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

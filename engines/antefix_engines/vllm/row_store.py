"""How vLLM's rows become records of ours: `v4_rows.V4Rows` and `whole_rows.WholeRows` do it, in the tier's threads."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from antefix_engines.vllm.prompt import Asked, Prompt, Row


@dataclass(slots=True)
class TierCounters:
    """Counters of the tier since it was opened; `antefix_engines.metrics.VLLM_TIER` shows them."""

    restored_blocks: int = 0
    restored_windows: int = 0
    stored_blocks: int = 0
    stored_windows: int = 0
    # Rows that a lookup had found, but that were missing or damaged when loaded; they were recomputed.
    lost_rows: int = 0
    dropped_rows: int = 0
    orphaned_rows: int = 0
    unfinished_windows: int = 0
    late_lookups: int = 0
    unequal_ranks: int = 0
    weak_hashes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def count(self, **more: int) -> None:
        """Add to counters, from any thread."""
        with self._lock:
            for name, number in more.items():
                setattr(self, name, getattr(self, name) + number)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """num_bytes: of payloads sent to the store.  keys: keys whose rows a lookup finds from now on.

    is_right: False if the store took fewer records than were offered.
    """

    num_bytes: int = 0
    keys: list[bytes] = field(default_factory=list)
    is_right: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """num_bytes: of payloads read.  keys: keys whose rows have the right bytes now; other rows are undefined."""

    num_bytes: int = 0
    keys: list[bytes] = field(default_factory=list)


class RowStore(Protocol):
    """Stores and loads rows for a tier. No call raises because of the store."""

    def may_have(self, asked: Asked) -> bool:
        """Returns False for keys that are never stored. This call must be fast, because vLLM's own thread makes it."""

    def remembers(self, group: int) -> bool:
        """Whether the implementation uses a group's earlier rows in `Prompt.rows`."""

    def find(self, prompt: Prompt, asked: Sequence[Asked]) -> set[bytes]:
        """The keys whose rows a load would get."""

    def put(self, prompt: Prompt, rows: Sequence[Row]) -> Stored:
        """Store rows, in any order."""

    def get(self, prompt: Prompt, rows: Sequence[Row]) -> Restored:
        """Fill rows."""

    def close(self) -> None:
        """End the threads and release vLLM's memory. No job may be running."""

"""How vLLM's rows become records of ours: `v4_rows.V4Rows` and `whole_rows.WholeRows` do it, in the tier's threads."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from antefix_engines.vllm.prompt import Asked, Prompt, Row


@dataclass(slots=True)
class TierCounters:
    """What the tier did since it was opened; `antefix_engines.metrics.VLLM_TIER` shows it."""

    restored_blocks: int = 0
    restored_windows: int = 0
    stored_blocks: int = 0
    stored_windows: int = 0
    # Asked for after a lookup had found it, and not there or damaged: recomputed.
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
    """num_bytes: of payloads that were sent to the store.  keys: whose rows a lookup finds from now on.

    is_right: false where the store took less than it was given.
    """

    num_bytes: int = 0
    keys: list[bytes] = field(default_factory=list)
    is_right: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """num_bytes: of payloads that were read.  keys: whose rows hold the right bytes now; all others hold anything."""

    num_bytes: int = 0
    keys: list[bytes] = field(default_factory=list)


class RowStore(Protocol):
    """All that a tier does with rows. No call raises because of the store."""

    def may_have(self, asked: Asked) -> bool:
        """False for keys that are never stored; quick, for it is called in vLLM's thread."""

    def remembers(self, group: int) -> bool:
        """Whether it looks for a group's earlier rows in `Prompt.rows`."""

    def find(self, prompt: Prompt, asked: Sequence[Asked]) -> set[bytes]:
        """Which of the keys a load would get."""

    def put(self, prompt: Prompt, rows: Sequence[Row]) -> Stored:
        """Store rows, in any order."""

    def get(self, prompt: Prompt, rows: Sequence[Row]) -> Restored:
        """Fill rows."""

    def close(self) -> None:
        """End its threads and let go of vLLM's memory; nothing is under way."""

"""Uses of records that have not been written to the index yet. The uses are kept in memory, so noting a use never waits
for a commit.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Final

from antefix.record import STORED_KINDS, RecordName
from antefix_kvstore.eviction import EvictionPolicy
from antefix_kvstore.index_writer import IndexTxn

# Uses wait here for the next transaction. Above this limit the oldest are dropped: they are worth less than the memory.
TOUCHED_MAX: Final = 65_536


class Touches:
    """Names of records, with the times of their last use. The object is thread-safe; its lock is never held during a
    write.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._used_ms: dict[RecordName, int] = {}

    def add(self, names: Iterable[RecordName], now_ms: int) -> None:
        with self._lock:
            for name in names:
                # Removed before it is added, so that the oldest use comes first.
                self._used_ms.pop(name, None)
                self._used_ms[name] = now_ms
            while len(self._used_ms) > TOUCHED_MAX:
                del self._used_ms[next(iter(self._used_ms))]

    def take(self) -> dict[RecordName, int]:
        """Remove and return all uses, which the caller then writes."""
        with self._lock:
            taken, self._used_ms = self._used_ms, {}
            return taken

    def apply(self, txn: IndexTxn, policy: EvictionPolicy) -> None:
        """Write the uses to the index. Records that are not stored, or not on disk, are left out."""
        for name, used_ms in self.take().items():
            entry = txn.get(name) if name[0] in STORED_KINDS else None
            if entry is None:
                continue
            rank = policy.rank_ms(used_ms=used_ms, cost_s=entry.cost_ms / 1000, nbytes=entry.extent_bytes)
            entry.rank_ms = max(entry.rank_ms, rank)
            if entry.expires_ms:
                entry.expires_ms = max(entry.expires_ms, used_ms + entry.ttl_s * 1000)

    def __len__(self) -> int:
        return len(self._used_ms)

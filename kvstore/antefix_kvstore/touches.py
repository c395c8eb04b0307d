"""What readers used since the index was last told: kept in memory, so that noting a use never waits for a commit."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Final

from antefix.record import RecordName

# Uses wait here for the next transaction; past this the oldest knowledge is worth less than the memory.
TOUCHED_MAX: Final = 65_536


class Touches:
    """Names and when they were last used. Thread-safe, and never holds its lock while anything is written."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._used_ms: dict[RecordName, int] = {}

    def add(self, names: Iterable[RecordName], now_ms: int) -> None:
        with self._lock:
            for name in names:
                # Taken out first, so that the oldest use comes first.
                self._used_ms.pop(name, None)
                self._used_ms[name] = now_ms
            while len(self._used_ms) > TOUCHED_MAX:
                del self._used_ms[next(iter(self._used_ms))]

    def take(self) -> dict[RecordName, int]:
        """All of them, to be written down by the caller."""
        with self._lock:
            taken, self._used_ms = self._used_ms, {}
            return taken

    def __len__(self) -> int:
        return len(self._used_ms)

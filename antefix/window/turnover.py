"""How fast a full store turns over: the time in which it writes as much as it holds."""

from __future__ import annotations

import math

# Minutes: shorter, and one long prompt looks like a storm; longer, and a storm is over before it is seen.
_MEMORY_S = 300.0
# Below this fill nothing is being evicted for room.
_FULL_SHARE = 0.8


class Turnover:
    """Fed with a store's counters now and then, by the caller that asks it for them anyway."""

    def __init__(self) -> None:
        self._last: tuple[float, int] | None = None
        self._bytes_per_s = 0.0
        self._seconds: float | None = None

    @property
    def seconds(self) -> float | None:
        """Roughly how long a record lives that nobody uses; None while the store has room."""
        return self._seconds

    def observe(self, now_s: float, *, bytes_written: int, used_bytes: int, budget_bytes: int | None) -> None:
        """bytes_written: since the store started; a smaller number than before is a restart and starts again."""
        if self._last is None or bytes_written < self._last[1] or now_s <= self._last[0]:
            self._last = (now_s, bytes_written) if self._last is None or bytes_written < self._last[1] else self._last
            return
        elapsed = now_s - self._last[0]
        rate = (bytes_written - self._last[1]) / elapsed
        keep = math.exp(-elapsed / _MEMORY_S)
        self._bytes_per_s = keep * self._bytes_per_s + (1 - keep) * rate
        self._last = (now_s, bytes_written)
        full = budget_bytes is not None and used_bytes >= _FULL_SHARE * budget_bytes
        self._seconds = budget_bytes / self._bytes_per_s if full and budget_bytes and self._bytes_per_s > 0 else None

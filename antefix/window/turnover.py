"""How fast a full store turns over: the time in which it writes as much as it holds."""

from __future__ import annotations

import math

# The averaging time. If it were shorter, one long prompt would look like a burst of writes; if longer, a burst would be
# over before it is noticed.
_MEMORY_S = 300.0
# Below this fill, the store evicts nothing to make room.
_FULL_SHARE = 0.8


class Turnover:
    """Computes the turnover from a store's counters, which its user passes in from time to time."""

    def __init__(self) -> None:
        self._last: tuple[float, int] | None = None
        self._bytes_per_s = 0.0
        self._seconds: float | None = None

    @property
    def seconds(self) -> float | None:
        """Roughly how long an unused record stays in the store, in seconds; None if the store still has room."""
        return self._seconds

    def observe(self, now_s: float, *, bytes_written: int, used_bytes: int, budget_bytes: int | None) -> None:
        """bytes_written: bytes written since the store started; a smaller number than before means that the store
        restarted, so counting starts again.
        """
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

"""What strategies must know of the store: bytes of checkpoints, and how fast it turns over; some seconds old."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextvars import Context

from antefix.errors import AntefixError
from antefix.record import RecordKind
from antefix.store.store_stats import StoreTotals
from antefix.window import BudgetState, Turnover

# The count decides whether another sparse checkpoint is worth its bytes: seconds old is soon enough.
REFRESH_S = 5.0


class CheckpointBudget:
    """Counts what this worker leaves, and takes the store's numbers when they are due. Used from one event loop.

    The store counts checkpoints of all namespaces together, so where several share it a budget errs to the safe side.
    """

    def __init__(
        self, count: Callable[[], Awaitable[StoreTotals]] | None = None, limit_bytes: int | None = None
    ) -> None:
        self.limit_bytes = limit_bytes
        self.turnover = Turnover()
        self._count = count
        self._used_bytes = 0
        self._asked_s = float("-inf")
        self._asking: asyncio.Task[None] | None = None

    @property
    def state(self) -> BudgetState:
        return BudgetState(used_bytes=self._used_bytes, limit_bytes=self.limit_bytes, turnover_s=self.turnover.seconds)

    def add(self, nbytes: int) -> None:
        self._used_bytes += nbytes

    def refresh_soon(self) -> None:
        """Ask the store in the background if the last answer is old; nobody waits for it."""
        if self._count is None or self._asking is not None or time.monotonic() - self._asked_s < REFRESH_S:
            return
        self._asked_s = time.monotonic()
        self._asking = asyncio.get_running_loop().create_task(self._ask(self._count), context=Context())

    async def _ask(self, count: Callable[[], Awaitable[StoreTotals]]) -> None:
        try:
            totals = await count()
            self._used_bytes = totals.kinds[RecordKind.CHECKPOINT].stored_bytes
            self.turnover.observe(
                time.monotonic(),
                bytes_written=totals.bytes_written,
                used_bytes=totals.used_bytes,
                budget_bytes=totals.budget_bytes,
            )
        except AntefixError:
            # An old number is a worse choice of checkpoints, nothing else; the store's failures are counted by its use.
            return
        finally:
            self._asking = None

    async def close(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.gather(self._asking, return_exceptions=True)

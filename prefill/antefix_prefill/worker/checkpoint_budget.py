"""The store's figures that window strategies need, some seconds old: the bytes of checkpoints, and how fast the store's
contents change.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextvars import Context

from antefix.errors import AntefixError
from antefix.record import RecordKind
from antefix.store.store_stats import StoreTotals
from antefix.window import BudgetState, Turnover

# How often the store is asked. The figure decides whether another sparse checkpoint is worth its bytes; it may be old.
REFRESH_S = 5.0


class CheckpointBudget:
    """Counts the checkpoints that this worker writes, and refreshes the store's figures. Used from one event loop.

    The store counts checkpoints of all namespaces together. So if several namespaces share the store, fewer checkpoints
    are written than the budget allows.
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
        """Ask the store in the background if its last answer is too old. Nobody waits for the answer."""
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
            # An old figure only leads to a worse choice of checkpoints. Failures are counted where the store is used.
            return
        finally:
            self._asking = None

    async def close(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.gather(self._asking, return_exceptions=True)

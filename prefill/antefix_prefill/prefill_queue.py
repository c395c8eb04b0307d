"""Admission to a prefill worker: a bounded queue in front of the one compute thread, and places for short rests."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

from antefix.errors import Overloaded
from antefix.telemetry import span
from antefix.telemetry.exposition import SECONDS, histogram


class PrefillQueue:
    """At most `num_running_max` prompts at work and `num_waiting_max` behind them.

    Two running ones overlap one's loads and writes with the other's computing; more only hold pool blocks. Prompts of
    which little is left to compute do not wait for these places: `num_short_max` of them are at work besides, since the
    compute thread takes their chunks first.
    """

    def __init__(self, num_running_max: int, num_waiting_max: int, num_short_max: int = 0) -> None:
        self._slots = asyncio.Semaphore(num_running_max)
        self._short_slots = asyncio.Semaphore(num_short_max)
        self._has_short_slots = num_short_max > 0
        self._num_waiting_max = num_waiting_max
        self.num_waiting = 0
        self.num_running = 0
        self.wait_s = histogram("antefix_prefill_wait_seconds", "How long prompts waited for a turn.", buckets=SECONDS)

    @contextlib.asynccontextmanager
    async def turn(self, retry_after_s: float, is_short: Callable[[], Awaitable[bool]]) -> AsyncIterator[None]:
        """Wait for a turn.  is_short: whether little is left to compute; asked only where the prompt would wait.

        Raises:  Overloaded: the queue is full; nothing was queued.
        """
        if self.num_waiting >= self._num_waiting_max:
            raise Overloaded(f"{self.num_waiting} prompts are waiting already", retry_after_s=retry_after_s)
        self.num_waiting += 1
        try:
            with self.wait_s.time(), span("queue", num_waiting=self.num_waiting):
                slots = self._slots
                if slots.locked() and self._has_short_slots and await is_short():
                    slots = self._short_slots
                await slots.acquire()
        finally:
            self.num_waiting -= 1
        self.num_running += 1
        try:
            yield
        finally:
            self.num_running -= 1
            slots.release()

"""Turns by tenant: a bounded queue in front of a few places, in which nobody's work holds up everybody else's.

Start-time fair queueing (Goyal, Vin and Cheng, 1996). Each tenant's work is counted on a clock of its own, and
the tenant whose clock is least is next. After a pause a tenant starts at the clocks of those that are served now, so a
pause gives it no credit and costs it nothing. Where the queue is full, the tenant that has most in it gives way.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from antefix.errors import Overloaded

# Of how long places are held: the last one counts so much, those before it the rest.
_HELD_WEIGHT = 0.1
_RETRY_S_MAX = 60.0
# Clocks of tenants that wait for nothing are forgotten when there are so many.
_NUM_CLOCKS_MAX = 1024


@dataclass(slots=True, eq=False)
class _Waiter:
    tenant: str
    start: float
    cost: float
    turn: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class FairTurns:
    """num_places: at work at once.  num_waiting_max: behind them; None: any number.

    num_extra: places more, for tenants that have nothing at work: where work lasts, turns alone would come too late.
    """

    def __init__(self, num_places: int, num_waiting_max: int | None = None, num_extra: int = 0) -> None:
        self._running: Counter[str] = Counter()
        self._num_extra = num_extra
        self._num_places = num_places
        self._num_waiting_max = num_waiting_max
        self._queue: list[tuple[float, int, _Waiter]] = []
        self._number = 0
        self._waiting: Counter[str] = Counter()
        # The clock of what is served now, and where each tenant's own one stands.
        self._now = 0.0
        self._clocks: dict[str, float] = {}
        self._forget_at = _NUM_CLOCKS_MAX
        # How long places are held, faded; 0: none was yet.
        self._held_s = 0.0

    @property
    def num_running(self) -> int:
        return self._running.total()

    @property
    def num_waiting(self) -> int:
        return self._waiting.total()

    @property
    def is_full(self) -> bool:
        """Whether one that comes now has to wait."""
        return self.num_running >= self._num_places or bool(self._waiting)

    @contextlib.asynccontextmanager
    async def turn(
        self, tenant: str, cost: float, *, share: int = 1, retry_after_s: float | None = None
    ) -> AsyncIterator[None]:
        """Wait for a place and hold it.  cost: predicted work, in any unit that all of them share.
        share: a tenant with 2 gets twice the work of one with 1 where both wait.  retry_after_s: what one that is
        refused is told; None: as long as places were held lately, for those that wait.

        Raises:  Overloaded: the queue is full, and this tenant has as much in it as anybody.
        """
        await self._enter(tenant, cost / share, retry_after_s)
        begun = time.monotonic()
        try:
            yield
        finally:
            held_s = time.monotonic() - begun
            self._held_s = held_s if not self._held_s else self._held_s + _HELD_WEIGHT * (held_s - self._held_s)
            self._end(tenant)

    async def _enter(self, tenant: str, cost: float, retry_after_s: float | None) -> None:
        start = max(self._now, self._clocks.get(tenant, 0.0))
        if not self.is_full or self._has_extra(tenant):
            self._clocks[tenant], self._now = start + cost, max(self._now, start if not self.is_full else 0.0)
            self._running[tenant] += 1
            self._forget()
            return
        self._make_room(tenant, retry_after_s)
        self._clocks[tenant] = start + cost
        waiter = _Waiter(tenant, start, cost)
        self._number += 1
        heapq.heappush(self._queue, (start, self._number, waiter))
        self._waiting[tenant] += 1
        try:
            await waiter.turn
        except BaseException:
            if waiter.turn.done() and not waiter.turn.cancelled() and waiter.turn.exception() is None:
                # It had its turn and cannot use it.
                self._end(tenant)
            else:
                self._leave(waiter)
            raise

    def _leave(self, waiter: _Waiter) -> None:
        """It left while it waited, or gave way."""
        if any(each[2] is waiter for each in self._queue):
            self._queue = [each for each in self._queue if each[2] is not waiter]
            heapq.heapify(self._queue)
            _take_off(self._waiting, waiter.tenant)
            # What it was counted with was not done.
            self._clocks[waiter.tenant] = self._clocks.get(waiter.tenant, waiter.cost) - waiter.cost

    def _make_room(self, tenant: str, retry_after_s: float | None) -> None:
        if self._num_waiting_max is None or self.num_waiting < self._num_waiting_max:
            return
        greediest, most = self._waiting.most_common(1)[0] if self._waiting else ("", 0)
        if most <= self._waiting[tenant] + 1:
            raise self._overloaded(retry_after_s)
        last = max((each for each in self._queue if each[2].tenant == greediest), key=lambda each: each[:2])[2]
        self._leave(last)
        last.turn.set_exception(self._overloaded(retry_after_s))

    def _overloaded(self, retry_after_s: float | None) -> Overloaded:
        if retry_after_s is None:
            # Half of those that wait now have had their turns by then.
            wait_s = self.num_waiting / 2 * self._held_s / self._num_places
            retry_after_s = min(max(1.0, wait_s), _RETRY_S_MAX)
        return Overloaded(f"{self.num_waiting} requests are waiting already", retry_after_s=retry_after_s)

    def _has_extra(self, tenant: str) -> bool:
        return not self._running[tenant] and self.num_running < self._num_places + self._num_extra

    def _end(self, tenant: str) -> None:
        _take_off(self._running, tenant)
        while self._queue and self.num_running < self._num_places:
            start, _, waiter = heapq.heappop(self._queue)
            _take_off(self._waiting, waiter.tenant)
            if waiter.turn.done():
                continue
            self._now = max(self._now, start)
            self._running[waiter.tenant] += 1
            waiter.turn.set_result(None)
        for each in sorted(self._queue, key=lambda each: each[:2]) if self._num_extra else ():
            waiter = each[2]
            if not waiter.turn.done() and self._has_extra(waiter.tenant):
                self._queue.remove(each)
                _take_off(self._waiting, waiter.tenant)
                self._running[waiter.tenant] += 1
                waiter.turn.set_result(None)
        heapq.heapify(self._queue)
        self._forget()

    def _forget(self) -> None:
        """Names come from callers, so only clocks that say something are kept: none when nobody is here."""
        if not self.num_running and not self._waiting:
            self._clocks.clear()
            self._now = 0.0
        elif len(self._clocks) > self._forget_at:
            self._clocks = {name: clock for name, clock in self._clocks.items() if clock > self._now}
            self._forget_at = max(_NUM_CLOCKS_MAX, 2 * len(self._clocks))


def _take_off(counts: Counter[str], name: str) -> None:
    counts[name] -= 1
    if not counts[name]:
        del counts[name]

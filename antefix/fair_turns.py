"""A bounded queue for a few places that is fair to tenants: no tenant's work blocks the work of the others.

Start-time fair queueing (Goyal, Vin and Cheng, 1996). Each tenant has a clock that advances with the cost of its work,
and the tenant with the lowest clock is next. A tenant that returns after a pause starts at the clock of the tenants
served now, so a pause neither helps nor costs it. If the queue is full, the tenant with the most entries loses one.
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

# The weight of the newest value in the running mean of how long a place is held.
_HELD_WEIGHT = 0.1
_RETRY_S_MAX = 60.0
# Above this many clocks, those of tenants that wait for nothing are forgotten.
_NUM_CLOCKS_MAX = 1024


@dataclass(slots=True, eq=False)
class _Waiter:
    tenant: str
    start: float
    cost: float
    turn: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class FairTurns:
    """num_places: how many may work at once.  num_waiting_max: how many may wait; None: no limit.

    num_extra: further places, for tenants that have no other work running. Without further places, a tenant's first
    request would wait too long where work lasts long.
    """

    def __init__(self, num_places: int, num_waiting_max: int | None = None, num_extra: int = 0) -> None:
        self._running: Counter[str] = Counter()
        self._num_extra = num_extra
        self._num_places = num_places
        self._num_waiting_max = num_waiting_max
        self._queue: list[tuple[float, int, _Waiter]] = []
        self._number = 0
        self._waiting: Counter[str] = Counter()
        # The clock of the work that is served now, and the clock of each tenant.
        self._now = 0.0
        self._clocks: dict[str, float] = {}
        self._forget_at = _NUM_CLOCKS_MAX
        # The running mean of how long a place is held; 0: no place has been held yet.
        self._held_s = 0.0

    @property
    def num_running(self) -> int:
        return self._running.total()

    @property
    def num_waiting(self) -> int:
        return self._waiting.total()

    @property
    def is_full(self) -> bool:
        """Whether a request that arrives now has to wait."""
        return self.num_running >= self._num_places or bool(self._waiting)

    def has_waiting(self, tenant: str) -> bool:
        return tenant in self._waiting

    @contextlib.asynccontextmanager
    async def turn(
        self, tenant: str, cost: float, *, share: int = 1, retry_after_s: float | None = None
    ) -> AsyncIterator[None]:
        """Wait for a place in the queue's working set, and hold the place.

        cost: predicted work, in the same unit for all callers.  share: while both wait, a tenant with share 2 gets
        twice the work of a tenant with share 1.  retry_after_s: the delay that a refused caller is told; None: it is
        computed from the number of waiters and how long places were held lately.

        Raises:  Overloaded: the queue is full, and no other tenant has more entries in it.
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
                # The caller was given a place just when it was cancelled, so return the place.
                self._end(tenant)
            else:
                self._leave(waiter)
            raise

    def _leave(self, waiter: _Waiter) -> None:
        """Remove a waiter that was cancelled, or that lost its entry in a full queue."""
        if any(each[2] is waiter for each in self._queue):
            self._queue = [each for each in self._queue if each[2] is not waiter]
            heapq.heapify(self._queue)
            _take_off(self._waiting, waiter.tenant)
            # The clock was advanced for work that was not done.
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
            # By then, half of the requests that wait now have had their turns.
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
        """Drop the clocks of tenants that no longer matter: all of them when nobody works or waits. Tenant names come
        from callers, so their number must be bounded.
        """
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

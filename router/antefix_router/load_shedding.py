"""Refuses requests whose wait for the first token would be too long. A request is refused by its head, before its body
is read and before it has a bill.

    wait = a tenant's waiting requests / its share among waiting tenants / first tokens per second measured under a
    queue

Workers serve tenants' queues in turn, so this predicts when the tenant's next request is served. A tenant with no
waiting request is never refused here. No request is refused while fewer wait than the workers run at once. A refusal
costs almost nothing. A request that is accepted and then abandoned by an impatient client costs as much as an answer.

A short burst is not an overload: a queue that is new may have five times the wait of a queue that lasts.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from contextvars import ContextVar
from typing import Final, TypeVar

from antefix.errors import Overloaded

T = TypeVar("T")

# After this time a served request counts a third. Only time with a queue counts, because without one the rate of served
# requests only shows how many arrive.
_MEMORY_S: Final = 10.0
# How long a queue must last before its measured rate is used.
_SEEN_S_MIN: Final = 3.0
# A worker runs this many requests at once, so fewer waiting requests are not a queue.
FREE_PER_WORKER: Final = 32
# In multiples of the longest wait: the wait accepted in a burst, and how long a queue may last and still count as a
# burst. After an overload it takes as long until a new queue counts as a burst.
BURST_FACTOR: Final = 5


class LoadShedding:
    """Refuses requests at one router. num_refused: how many requests. share_of: returns a tenant's share of the
    workers.
    """

    def __init__(
        self, wait_s_max: float, num_workers: Callable[[], int], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """wait_s_max: the longest wait that is accepted; 0: any wait. num_workers: returns the number of decode
        workers.
        """
        self.wait_s_max = wait_s_max
        self.num_refused = 0
        self._num_workers = num_workers
        self._clock = clock
        self.share_of: Callable[[str], int] = lambda tenant: 1
        self._waiting: Counter[str] = Counter()
        # Decaying sums: the time with a queue, and the requests served in that time.
        self._queued_s = 0.0
        self._num_served = 0.0
        self._seen_s = clock()
        # How long there has been a queue, minus later time without one.
        self._standing_s = 0.0

    @property
    def num_waiting(self) -> int:
        return self._waiting.total()

    @contextlib.contextmanager
    def waiting(self, tenant: str, *, may_refuse: bool = True) -> Iterator[None]:
        """Wraps a request, which counts as waiting until `served` is called for it or it ends.

        Raises:  Overloaded: its first token would take too long.
        """
        if may_refuse:
            self._check(tenant)
        self._pass()
        self._waiting[tenant] += 1
        place = _Place(self, tenant)
        _place.set(place)
        try:
            yield
        finally:
            place.leave()

    def wait_s(self, tenant: str) -> float:
        """The predicted wait of the tenant's next request; 0 if there is no wait, or if the wait is not known yet."""
        self._pass()
        own = self._waiting[tenant]
        if not own or not self._has_queue or self._queued_s < _SEEN_S_MIN:
            return 0.0
        num_turns = (own + 1) * sum(map(self.share_of, self._waiting)) / self.share_of(tenant)
        return num_turns * self._queued_s / self._num_served if self._num_served else math.inf

    @property
    def bound_s(self) -> float:
        """The longest predicted wait that is accepted now; 0: any wait."""
        burst_s = BURST_FACTOR * self.wait_s_max
        return burst_s if self._standing_s < burst_s else self.wait_s_max

    def _check(self, tenant: str) -> None:
        if not self.wait_s_max or (wait_s := self.wait_s(tenant)) <= self.bound_s:
            return
        self.num_refused += 1
        told = f"{wait_s:.0f} s" if wait_s < 3600 else "longer than anybody waits"
        raise Overloaded(
            f"the first token would take {told}, more than {self.bound_s:g} s",
            retry_after_s=min(max(1.0, wait_s - self.bound_s), 60.0),
        )

    @property
    def _has_queue(self) -> bool:
        return self.num_waiting >= FREE_PER_WORKER * max(1, self._num_workers())

    def _pass(self) -> None:
        """Take the time that has passed into account. Call this before any change."""
        now = self._clock()
        passed_s = now - self._seen_s
        change_s = passed_s if self._has_queue else -passed_s
        # Bounded, because otherwise a burst would be refused for as long as the last overload had lasted.
        self._standing_s = min(max(0.0, self._standing_s + change_s), 2 * BURST_FACTOR * self.wait_s_max)
        if self._has_queue:
            faded = math.exp(-passed_s / _MEMORY_S)
            self._queued_s = faded * self._queued_s + _MEMORY_S * (1 - faded)
            self._num_served *= faded
        self._seen_s = now

    def _leave(self, tenant: str, *, is_served: bool) -> None:
        self._pass()
        self._num_served += is_served and self._has_queue
        self._waiting[tenant] -= 1
        if not self._waiting[tenant]:
            del self._waiting[tenant]


class _Place:
    """The place of one waiting request in the counts."""

    def __init__(self, shedding: LoadShedding, tenant: str) -> None:
        self._shedding: LoadShedding | None = shedding
        self._tenant = tenant

    def leave(self, *, is_served: bool = False) -> None:
        shedding, self._shedding = self._shedding, None
        if shedding is not None:
            shedding._leave(self._tenant, is_served=is_served)


# The place of the request that the present task works for.
_place: ContextVar[_Place | None] = ContextVar("antefix_waiting_place", default=None)


async def until_served(outputs: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """The same outputs. With its first token, a request no longer counts as waiting."""
    async with contextlib.aclosing(outputs):
        async for output in outputs:
            if (place := _place.get()) is not None:
                place.leave(is_served=True)
                _place.set(None)
            yield output

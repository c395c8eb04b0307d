"""Refuses early what would wait too long for its first token: by its head, before its body is read or it has a bill.

    wait = a tenant's requests that wait / its share among waiting tenants / first tokens per second of a queue

Workers' queues go round by tenant, so that is when the tenant's next request has its turn. A tenant that has none
waiting is never refused here, nor is anybody while no more wait than workers take at once. Refused work costs next to
nothing; work that is accepted and given up later by an impatient client costs as much as an answer.

A burst is no overload: a queue that has just come may take five times as long as one that stays.
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

# What was served that long ago counts a third. Only time in which there is a queue counts: before, how many are served
# says how many ask.
_MEMORY_S: Final = 10.0
# Of a queue, before it is believed how fast it goes.
_SEEN_S_MIN: Final = 3.0
# A worker runs so many at once, so fewer are no queue.
FREE_PER_WORKER: Final = 32
# Of the longest wait: what a burst's last one waits, and how long a queue may stay and be a burst. After an overload it
# takes as long again until a queue is taken for a burst once more.
BURST_FACTOR: Final = 5


class LoadShedding:
    """One router's. num_refused: requests.  share_of: a tenant's, of the workers."""

    def __init__(
        self, wait_s_max: float, num_workers: Callable[[], int], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """wait_s_max: the longest wait that is accepted; 0: any.  num_workers: that decode."""
        self.wait_s_max = wait_s_max
        self.num_refused = 0
        self._num_workers = num_workers
        self._clock = clock
        self.share_of: Callable[[str], int] = lambda tenant: 1
        self._waiting: Counter[str] = Counter()
        # Fading sums, of the time with a queue and of what was served in it.
        self._queued_s = 0.0
        self._num_served = 0.0
        self._seen_s = clock()
        # How long there is a queue, less the time since without one.
        self._standing_s = 0.0

    @property
    def num_waiting(self) -> int:
        return self._waiting.total()

    @contextlib.contextmanager
    def waiting(self, tenant: str, *, may_refuse: bool = True) -> Iterator[None]:
        """Around a request: it waits until `served` is called for it in here, or it ends.

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
        """Predicted for the tenant's next request; 0 where nobody has to wait, or where it is not known yet."""
        self._pass()
        own = self._waiting[tenant]
        if not own or not self._has_queue or self._queued_s < _SEEN_S_MIN:
            return 0.0
        num_turns = (own + 1) * sum(map(self.share_of, self._waiting)) / self.share_of(tenant)
        return num_turns * self._queued_s / self._num_served if self._num_served else math.inf

    @property
    def bound_s(self) -> float:
        """The longest predicted wait that is accepted now; 0: any."""
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
        """Time passed. To be called before anything changes."""
        now = self._clock()
        passed_s = now - self._seen_s
        change_s = passed_s if self._has_queue else -passed_s
        # Bounded above, or after a long overload the next burst would be refused for as long.
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
    """One waiting request's."""

    def __init__(self, shedding: LoadShedding, tenant: str) -> None:
        self._shedding: LoadShedding | None = shedding
        self._tenant = tenant

    def leave(self, *, is_served: bool = False) -> None:
        shedding, self._shedding = self._shedding, None
        if shedding is not None:
            shedding._leave(self._tenant, is_served=is_served)


# Of the request that the present task works for.
_place: ContextVar[_Place | None] = ContextVar("antefix_waiting_place", default=None)


async def until_served(outputs: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """The same outputs; with the first one the request waits no more."""
    async with contextlib.aclosing(outputs):
        async for output in outputs:
            if (place := _place.get()) is not None:
                place.leave(is_served=True)
                _place.set(None)
            yield output

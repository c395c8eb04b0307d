"""Refuses requests whose wait for the first token would be too long. A request is refused by its head, before its body
is read and before it has a bill.

    wait = a tenant's waiting requests / its first tokens per second

This is Little's law, which holds for any order in which requests are served. A tenant's first tokens per second are its
share of all first tokens per second, measured while requests queue, or what it was seen to get if that is more.

Until a queue has been measured, its rate is expected to be somewhat more than what was seen with fewer requests, so
that a sudden overload is not let in whole. A tenant with no waiting request is never refused here. No request is
refused before as many wait as the workers run at once, so a few dozen clients that each wait for their answer are no
overload. From then on fewer may wait, until the queue has been short for some seconds.

A request with much more work of its own than others does not count as waiting: workers let short requests pass it, and
its own limit is --ttft-s-max. A refusal costs almost nothing. A request that is accepted and then abandoned by an
impatient client costs as much as an answer.

A short burst is not an overload: a queue that is new may have twice the wait of a queue that lasts.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final, TypeVar

from antefix.errors import Overloaded

T = TypeVar("T")

# While this many requests wait per worker, the worker always has work, so the rate of first tokens is the most that it
# can give. Fewer are never refused.
BUSY_PER_WORKER: Final = 16
# A worker runs this many requests at once. Until more wait, none is refused.
FREE_PER_WORKER: Final = 32
# A queue that is kept at BUSY_PER_WORKER or at the longest wait is longer than these parts of them.
_STANDING_PER_WORKER: Final = 12
_STANDING_PART: Final = 0.5
# In multiples of the longest wait: the wait accepted in a burst, and how long a queue may last and still count as a
# burst. After an overload it takes as long until a new queue counts as a burst.
BURST_FACTOR: Final = 2
# After this time with a queue, a served request counts a third.
_QUEUE_MEMORY_S: Final = 5.0
# The same for time with at least one waiting request.
_ANY_MEMORY_S: Final = 10.0
# After this time without a queue, a measured queue counts a third.
_FORGET_S: Final = 60.0
# The rate that is expected of a new queue counts as much as this time with a queue, and then less and less. It no
# longer counts after _MEASURED_S with a queue.
_EXPECTED_S: Final = 1.0
_MEASURED_S: Final = 3.0
# A queue keeps workers busier than single requests do.
_EXPECTED_FACTOR: Final = 1.5
# A request does not count as waiting if its own work takes more than this part of the longest wait, and more than this
# many times the usual work. (A usual request counts however slow a busy worker is.)
_LONG_PART: Final = 0.5
_LONG_TIMES: Final = 4.0
# The weight of the newest request in the usual work, a geometric mean.
_USUAL_WEIGHT: Final = 0.1
# At most this many refusals per second are answered at once for each tenant. Further ones are answered later, because a
# client that asks again at once would otherwise keep the router busy with refusals.
REFUSALS_PER_S: Final = 64.0
_HELD_S_MAX: Final = 1.0


@dataclass(slots=True)
class _Seen:
    """Decaying sums: seconds of some kind, and requests served in those seconds."""

    seconds: float = 0.0
    num_served: float = 0.0

    def pass_time(self, passed_s: float, memory_s: float) -> None:
        faded = math.exp(-passed_s / memory_s)
        self.seconds = faded * self.seconds + memory_s * (1 - faded)
        self.num_served *= faded

    def forget(self, passed_s: float) -> None:
        faded = math.exp(-passed_s / _FORGET_S)
        self.seconds *= faded
        self.num_served *= faded


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
        # Requests without a first token: those that count, by tenant, and those with much work of their own.
        self._waiting: Counter[str] = Counter()
        self._num_long = 0
        # The natural logarithm of the usual work of a request, in seconds; None: not known.
        self._usual_log_s: float | None = None
        # What was served while requests queued, and while any request waited.
        self._in_queue = _Seen()
        self._in_any = _Seen()
        # Of `_in_queue.num_served`, the requests of each tenant.
        self._served: dict[str, float] = {}
        self._seen_s = clock()
        # How long there has been a queue, minus later time without one.
        self._standing_s = 0.0
        # Whether more than FREE_PER_WORKER have waited in this queue.
        self._is_overloaded = False
        # For each tenant, the time at which its next refusal may be answered.
        self._refused_s: dict[str, float] = {}

    @property
    def num_waiting(self) -> int:
        return self._waiting.total() + self._num_long

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
        """The predicted wait of the tenant's next request; 0 if no request of the tenant waits, or only few requests
        wait.
        """
        self._pass()
        if not (own := self._waiting[tenant]) or not self._has_queue:
            return 0.0
        part = self.share_of(tenant) / sum(map(self.share_of, self._waiting))
        seen_per_s = self._served.get(tenant, 0.0) / (self._in_queue.seconds + self._expected_s)
        per_s = max(part * self._per_s, seen_per_s)
        return (own + 1) / per_s if per_s else math.inf

    @property
    def bound_s(self) -> float:
        """The longest predicted wait that is accepted now; 0: any wait."""
        burst_s = BURST_FACTOR * self.wait_s_max
        return burst_s if self._standing_s < burst_s else self.wait_s_max

    def _check(self, tenant: str) -> None:
        if not self.wait_s_max or (wait_s := self.wait_s(tenant)) <= self.bound_s:
            return
        self._is_overloaded = self._is_overloaded or self._waits(FREE_PER_WORKER)
        if not self._is_overloaded:
            return
        self.num_refused += 1
        told = f"{wait_s:.0f} s" if wait_s < 3600 else "longer than anybody waits"
        refusal = Overloaded(
            f"the first token would take {told}, more than {self.bound_s:g} s",
            retry_after_s=min(max(1.0, wait_s - self.bound_s), 60.0),
        )
        refusal.hold_s = self._hold_s(tenant)
        raise refusal

    def _hold_s(self, tenant: str) -> float:
        """For how long to hold back the answer to a refused request."""
        now = self._seen_s
        if len(self._refused_s) > len(self._waiting):
            self._refused_s = {name: at_s for name, at_s in self._refused_s.items() if at_s > now}
        # A second's refusals may be answered at once after a pause.
        at_s = max(self._refused_s.get(tenant, 0.0), now - 1.0) + 1 / REFUSALS_PER_S
        self._refused_s[tenant] = min(at_s, now + _HELD_S_MAX)
        return max(0.0, self._refused_s[tenant] - now)

    @property
    def _per_s(self) -> float:
        """First tokens per second of a queue, as far as known. Before anything was served, it is a guess with which a
        burst may be as long as FREE_PER_WORKER per worker.
        """
        guess_s = _EXPECTED_FACTOR * (self.wait_s_max or 1.0) / (FREE_PER_WORKER * max(1, self._num_workers()))
        fewer_per_s = (self._in_any.num_served + 1) / (self._in_any.seconds + guess_s)
        queue, expected_s = self._in_queue, self._expected_s
        return (queue.num_served + expected_s * _EXPECTED_FACTOR * fewer_per_s) / (queue.seconds + expected_s)

    @property
    def _expected_s(self) -> float:
        """The weight of the expected rate, next to the seconds in which a queue was measured."""
        return _EXPECTED_S * max(0.0, 1 - self._in_queue.seconds / _MEASURED_S)

    @property
    def _has_queue(self) -> bool:
        return self._waits(BUSY_PER_WORKER)

    def _waits(self, num_per_worker: int) -> bool:
        return self._waiting.total() >= num_per_worker * max(1, self._num_workers())

    def _pass(self) -> None:
        """Take the time that has passed into account. Call this before any change."""
        now = self._clock()
        passed_s, self._seen_s = now - self._seen_s, now
        has_queue = self._has_queue
        if self._waiting:
            self._in_any.pass_time(passed_s, _ANY_MEMORY_S)
        before = self._in_queue.num_served
        if has_queue:
            self._in_queue.pass_time(passed_s, _QUEUE_MEMORY_S)
        else:
            self._in_queue.forget(passed_s)
        if self._served:
            self._fade_served(self._in_queue.num_served / before if before else 0.0)
        is_long = self._waiting.total() > _STANDING_PART * self.wait_s_max * self._per_s
        is_standing = is_long and self._waits(_STANDING_PER_WORKER)
        change_s = passed_s if is_standing else -passed_s
        # Bounded, because otherwise a burst would be refused for as long as the last overload had lasted.
        self._standing_s = min(max(0.0, self._standing_s + change_s), 2 * BURST_FACTOR * self.wait_s_max)
        self._is_overloaded = self._is_overloaded and self._standing_s > 0.0

    def _fade_served(self, factor: float) -> None:
        if factor < 1.0:
            # A tenant with less than this no longer matters, and tenants' names come from callers.
            self._served = {name: num * factor for name, num in self._served.items() if num * factor > 0.1}

    def _is_long(self, own_s: float) -> bool:
        """Whether this is much more work than usual. Counts the request among the usual ones."""
        log_s = math.log(max(own_s, 1e-6))
        usual = log_s if self._usual_log_s is None else self._usual_log_s
        self._usual_log_s = usual + _USUAL_WEIGHT * (log_s - usual)
        return own_s > _LONG_PART * self.wait_s_max and log_s > usual + math.log(_LONG_TIMES)

    def _leave(self, tenant: str, *, is_served: bool) -> None:
        self._pass()
        self._in_any.num_served += is_served
        if is_served and self._has_queue:
            self._in_queue.num_served += 1
            self._served[tenant] = self._served.get(tenant, 0.0) + 1
        self._waiting[tenant] -= 1
        if not self._waiting[tenant]:
            del self._waiting[tenant]


class _Place:
    """The place of one waiting request in the counts."""

    def __init__(self, shedding: LoadShedding, tenant: str) -> None:
        self._shedding: LoadShedding | None = shedding
        self._tenant = tenant
        self._is_long = False

    def note_own_work(self, seconds: float) -> None:
        shedding = self._shedding
        if shedding is None or self._is_long:
            return
        if shedding._is_long(seconds):
            self._is_long = True
            shedding._leave(self._tenant, is_served=False)
            shedding._num_long += 1

    def leave(self, *, is_served: bool = False) -> None:
        shedding, self._shedding = self._shedding, None
        if shedding is None:
            return
        if self._is_long:
            shedding._num_long -= 1
        else:
            shedding._leave(self._tenant, is_served=is_served)


# The place of the request that the present task works for.
_place: ContextVar[_Place | None] = ContextVar("antefix_waiting_place", default=None)


def note_own_work(seconds: float) -> None:
    """The present task's request has this much work of its own before its first token, which is no wait."""
    if (place := _place.get()) is not None:
        place.note_own_work(seconds)


async def until_served(outputs: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """The same outputs. With its first token, a request no longer counts as waiting."""
    async with contextlib.aclosing(outputs):
        async for output in outputs:
            if (place := _place.get()) is not None:
                place.leave(is_served=True)
                _place.set(None)
            yield output

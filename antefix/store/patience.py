"""How long a caller waits for a store before it continues without the answer.

    a call takes longer than `UsualTimes.limit_s`   it is late: its caller does something else, and may take the answer
                                                    if it still comes
    a late call ends in any way                     no longer late
    while any call is late                          further calls get the shortest limit

The limit is a multiple of the predicted time, and of the time that nearly all recent calls took, each divided by its
own prediction. So a store that is busy, and slower than predicted, is waited for. Calls that fail are not observed: a
store that hangs must not teach callers to wait longer.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from contextvars import Context
from typing import Any, Final, TypeVar

from antefix.errors import Unavailable

T = TypeVar("T")

# No call is late before this time: a thread or an event loop of a busy machine waits as long for a core.
FLOOR_S: Final = 0.05
# A call may take this many times its prediction.
FACTOR: Final = 3.0
# A call may take this many times what nearly all recent calls took, in proportion to their predictions.
USUAL_FACTOR: Final = 2.0
# What "nearly all" and "recent" mean.
_QUANTILE: Final = 0.98
_NUM_RECENT: Final = 128
# Until so many calls were observed, no call is late before this time: the first ones open files and connections.
NUM_OBSERVED_MIN: Final = 16
UNKNOWN_S: Final = 0.25
# What recent calls took raises a limit to this at most.
USUAL_S_MAX: Final = 1.0
# A call that takes no predicted time, such as a look-up, counts as predicted to take this.
BASE_S: Final = 0.005
# The writing of records, which syncs a disk, is not late before this time, unless the store is known to be late.
WRITE_FLOOR_S: Final = 1.0
# Assumed for writes: a single disk, or a network of 1 Gbit/s at half its speed.
WRITE_BYTES_PER_S: Final = 50e6
# A timer that rings this much later than it should shows that this process's own event loop was delayed.
_OWN_DELAY_S: Final = 0.025
# After a timer rang, an answer that has arrived already has this long to reach its caller.
_GRACE_S: Final = 0.005


class StoreLate(Unavailable):
    """The store has not answered in the usual time, and its caller continued. The call continues without its caller."""


class UsualTimes:
    """The times of one kind of calls, relative to their predictions."""

    def __init__(self, *, floor_s: float | None = None) -> None:
        self._floor_s = floor_s
        self._ratios: deque[float] = deque(maxlen=_NUM_RECENT)
        self._usual = 0.0

    def limit_s(self, predicted_s: float) -> float:
        """For how long to wait for a call that is predicted to take `predicted_s`."""
        predicted_s = max(predicted_s, BASE_S)
        floor_s = max(FLOOR_S, self._floor_s or 0.0)
        if len(self._ratios) < NUM_OBSERVED_MIN:
            floor_s = max(floor_s, UNKNOWN_S)
        usual_s = min(USUAL_S_MAX, USUAL_FACTOR * self._usual * predicted_s)
        return max(floor_s, FACTOR * predicted_s, usual_s)

    def observe(self, predicted_s: float, took_s: float) -> None:
        self._ratios.append(took_s / max(predicted_s, BASE_S))
        self._usual = sorted(self._ratios)[int(_QUANTILE * (len(self._ratios) - 1))]


class Patience:
    """The patience of one process with its store. Used from one event loop.

    num_late: calls that are late now.
    """

    def __init__(self) -> None:
        self.look_ups = UsualTimes()
        self.reads = UsualTimes()
        self.handoffs = UsualTimes(floor_s=UNKNOWN_S)
        self.writes = UsualTimes(floor_s=WRITE_FLOOR_S)
        self.num_late = 0
        # Work that continues without its caller; asyncio itself keeps no reference to it.
        self._left: set[asyncio.Future[Any]] = set()

    def limit_s(self, times: UsualTimes, predicted_s: float) -> float:
        """The limit of a call that begins now."""
        return max(FLOOR_S, predicted_s) if self.num_late else times.limit_s(predicted_s)

    async def within(self, times: UsualTimes, predicted_s: float, call: Coroutine[Any, Any, T]) -> T:
        """The result of `call`. The caller must not need the call's buffers after StoreLate was raised.

        Raises:  StoreLate: the call is late. It is cancelled, and ends when it can.
        """
        watch = Watch(self)

        async def watched() -> T:
            with watch.waiting(times, predicted_s):
                return await call

        work = asyncio.ensure_future(watched())
        try:
            if await watch.ended_in_time(work):
                return work.result()
        except asyncio.CancelledError:
            self.leave(work)
            raise
        self.leave(work)
        raise StoreLate("the store did not answer in the usual time")

    def leave(self, work: asyncio.Future[Any]) -> None:
        """Cancel work whose result nobody wants any more, without waiting for its end."""
        if not work.done():
            self._left.add(work)
            work.add_done_callback(self._left.discard)
        work.add_done_callback(_read_error)
        work.cancel()

    def keep(self, work: asyncio.Future[Any]) -> None:
        """Let work continue to its end, although nobody waits for it."""
        self._left.add(work)
        work.add_done_callback(self._left.discard)
        work.add_done_callback(_read_error)


class Watch:
    """Watches the calls to the store that one caller makes.  late: set while one of them is late."""

    def __init__(self, patience: Patience) -> None:
        self.late = asyncio.Event()
        self._patience = patience
        self._num_late = 0

    @contextlib.contextmanager
    def waiting(self, times: UsualTimes, predicted_s: float = 0.0) -> Iterator[None]:
        """A context around one call that is predicted to take `predicted_s`."""
        call = _Call(self._count_late, self._patience.limit_s(times, predicted_s))
        try:
            yield
        except BaseException:
            call.end()
            raise
        times.observe(predicted_s, call.end())

    def _count_late(self, change: int) -> None:
        self._patience.num_late += change
        self._num_late += change
        if self._num_late:
            self.late.set()
        else:
            self.late.clear()

    async def ended_in_time(self, work: asyncio.Future[Any]) -> bool:
        """Wait until `work` has ended, or a call that it makes is late. A cancellation does not reach `work`."""
        late = asyncio.ensure_future(self.late.wait())
        try:
            await asyncio.wait({work, late}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            late.cancel()
        return work.done()


class _Call:
    """A call that is late if it has not ended after `limit_s`.  count_late: called with 1 when the call becomes late,
    and with -1 when a late call ends.
    """

    def __init__(self, count_late: Callable[[int], None], limit_s: float) -> None:
        self._count_late = count_late
        self._is_late = False
        self._loop = asyncio.get_running_loop()
        self._begun = self._loop.time()
        self._due = self._begun + limit_s
        # An empty context: a timer that outlives its request must not keep the request's context.
        self._timer = self._loop.call_at(self._due, self._rings, context=Context())

    def _rings(self) -> None:
        own_delay_s = self._loop.time() - self._due
        again_s = FLOOR_S if own_delay_s > _OWN_DELAY_S else _GRACE_S
        self._timer = self._loop.call_later(again_s, self._is_over, context=Context())

    def _is_over(self) -> None:
        self._is_late = True
        self._count_late(1)

    def end(self) -> float:
        """Seconds that the call took."""
        self._timer.cancel()
        if self._is_late:
            self._is_late = False
            self._count_late(-1)
        return self._loop.time() - self._begun


def _read_error(work: asyncio.Future[Any]) -> None:
    """Retrieve the exception, or asyncio logs that it was never retrieved."""
    if not work.cancelled():
        work.exception()

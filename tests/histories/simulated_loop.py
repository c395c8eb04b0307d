"""An event loop with simulated time and without threads, so that the same seed gives the same history.

`async-solipsism` also simulates time, but it has no executors, which ledger and store need. Here an executor's jobs run
in the loop after a delay that the seed draws, and so does every call over the simulated network. If all tasks wait for
ever, the loop raises `Stuck`.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import contextvars
import errno
import functools
import heapq
import itertools
import random
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

from prometheus_client import Histogram

from antefix_billing import ledger_reserve, progress_slots
from antefix_router import accounting

WALL_S = 1_790_000_000.0


class Stuck(Exception):
    """A task waits for an event that no other task will cause."""


class _Turn(list[Any]):
    """A callback to run: [callback, arguments, context, time]; the callback is None after `cancel`.

    Like asyncio's Handle and TimerHandle, but without their support for debugging. A list is made in half of the time.
    """

    __slots__ = ()

    def cancel(self) -> None:
        # The callback often refers back to this object, so dropping it breaks a cycle.
        self[0], self[1] = None, ()

    def cancelled(self) -> bool:
        return self[0] is None

    def when(self) -> float:
        when: float = self[3]
        return when


class SimulatedLoop(asyncio.BaseEventLoop):
    """rng: draws the times of executors' jobs.  wall_step_s: how far the wall clock has been moved."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.now_s = 0.0
        self.wall_step_s = 0.0
        self._rng = rng
        # The turns that run next, in order; and later turns as (time, order of arrival, turn).
        self._turns: collections.deque[_Turn] = collections.deque()
        self._later: list[tuple[float, int, _Turn]] = []
        self._numbers = itertools.count()
        # asyncio calls both for each future.
        self.create_future = functools.partial(asyncio.Future, loop=self)  # type: ignore[method-assign]
        self.get_debug = bool  # type: ignore[method-assign]

    def time(self) -> float:
        return self.now_s

    def wall_s(self) -> float:
        return WALL_S + self.now_s + self.wall_step_s

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Any = None) -> Any:
        turn = _Turn((callback, args, contextvars.copy_context() if context is None else context, 0.0))
        self._turns.append(turn)
        return turn

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any, context: Any = None) -> Any:
        when = self.now_s + delay
        turn = _Turn((callback, args, contextvars.copy_context() if context is None else context, when))
        heapq.heappush(self._later, (when, next(self._numbers), turn))
        return turn

    def call_at(self, when: float, callback: Callable[..., object], *args: Any, context: Any = None) -> Any:
        turn = _Turn((callback, args, contextvars.copy_context() if context is None else context, when))
        heapq.heappush(self._later, (when, next(self._numbers), turn))
        return turn

    def _run_once(self) -> None:
        """Run rounds until the loop is stopped. Waiting moves the clock to the next timer that was not cancelled. There
        is no selector.
        """
        turns, later = self._turns, self._later
        while True:
            while later and later[0][2][0] is None:
                heapq.heappop(later)
            if not turns and not self._stopping:  # type: ignore[attr-defined]
                if not later:
                    raise Stuck("nothing is scheduled, and somebody waits")
                self.now_s = max(self.now_s, later[0][0])
            now_s = self.now_s
            while later and later[0][0] <= now_s:
                turns.append(heapq.heappop(later)[2])
            # Turns that these add run in the next round.
            for _ in itertools.repeat(None, len(turns)):
                callback, args, context, _ = turns.popleft()
                if callback is not None:
                    try:
                        context.run(callback, *args)
                    except (SystemExit, KeyboardInterrupt):
                        raise
                    except BaseException as err:
                        self.call_exception_handler({"message": "in a callback", "exception": err})
            if self._stopping:  # type: ignore[attr-defined]
                return

    def _process_events(self, events: list[Any]) -> None:
        """Does nothing, because there are no events of a selector."""

    def _write_to_self(self) -> None:
        """Does nothing, because no other thread wakes the loop."""

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: Any, context: Any = None) -> asyncio.Handle:
        return self.call_soon(callback, *args, context=context)

    def run_in_executor(self, executor: object, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        done = self.create_future()

        def run() -> None:
            try:
                result = func(*args)
            except Exception as err:
                if not done.cancelled():
                    done.set_exception(err)
            else:
                if not done.cancelled():
                    done.set_result(result)

        self.call_later(self._rng.uniform(0.0001, 0.003), run)
        return done


class InlineExecutor:
    """Runs each job at once in the calling thread, which is one order that threads could also take."""

    def submit(self, func: Callable[..., Any], *args: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(func(*args))
        except Exception as err:
            done.set_exception(err)
        return done

    def shutdown(self) -> None:
        """Does nothing, because no job is running."""


def _no_allocation(*_: object) -> None:
    raise OSError(errno.EOPNOTSUPP, "this disk is simulated")


def _not_observed(*_: object) -> None:
    """Does nothing."""


class _Unmeasured:
    def count(self, record: object) -> None:
        """Does nothing."""


@contextlib.contextmanager
def simulated(loop: SimulatedLoop, rng: random.Random) -> Iterator[None]:
    """Within this context the clocks are the loop's, and secrets come from the seed."""
    replaced = [
        (time, "monotonic", loop.time),
        (time, "perf_counter", loop.time),
        (time, "time", loop.wall_s),
        (time, "time_ns", lambda: int(loop.wall_s() * 1e9)),
        # Reserving space ahead has no use here. In a file system in memory it would take as much time as all other
        # work.
        (ledger_reserve, "allocate", _no_allocation),
        (progress_slots, "allocate", _no_allocation),
        # Metrics are not among the protocols. Counting them would take a tenth of the time.
        (accounting, "RequestMeasures", _Unmeasured),
        (Histogram, "observe", _not_observed),
        (secrets, "token_bytes", lambda nbytes=32: rng.randbytes(nbytes)),
        (secrets, "token_hex", lambda nbytes=32: rng.randbytes(nbytes).hex()),
        (secrets, "randbits", rng.getrandbits),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    try:
        for owner, name, value in replaced:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)

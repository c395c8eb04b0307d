"""An event loop with simulated time and without threads, so that the same seed gives the same history.

`async-solipsism` simulates time as well, but has no executors, which ledger and store work in. Here what is given to an
executor runs in the loop, after a delay that the seed draws; so does every call over the simulated network. When
nothing is left to do but wait for ever, the history is stuck, and says so.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import contextvars
import errno
import heapq
import itertools
import random
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any
from unittest import mock

WALL_S = 1_790_000_000.0


class Stuck(Exception):
    """A task waits for an event that no other task will cause."""


class _Turn:
    """What asyncio's Handle and TimerHandle do, without what is for debugging."""

    __slots__ = ("_args", "_callback", "_context", "_when", "is_cancelled")

    def __init__(self, callback: Callable[..., object], args: tuple[Any, ...], context: Any, when: float = 0.0) -> None:
        self._callback = callback
        self._args = args
        self._context = contextvars.copy_context() if context is None else context
        self._when = when
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True
        # What it would have run is often a cycle that leads back here.
        self._callback, self._args = _nothing, ()

    def cancelled(self) -> bool:
        return self.is_cancelled

    def when(self) -> float:
        return self._when


def _nothing() -> None:
    """Of a turn that was cancelled."""


class SimulatedLoop(asyncio.BaseEventLoop):
    """rng: draws how long what runs in executors takes.  wall_step_s: how far the wall clock has been moved."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.now_s = 0.0
        self.wall_step_s = 0.0
        self._rng = rng
        # What runs next, in order; and what runs later: when, which came first of those, and what.
        self._turns: collections.deque[_Turn] = collections.deque()
        self._later: list[tuple[float, int, _Turn]] = []
        self._numbers = itertools.count()

    def time(self) -> float:
        return self.now_s

    def wall_s(self) -> float:
        return WALL_S + self.now_s + self.wall_step_s

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Any = None) -> Any:
        turn = _Turn(callback, args, context)
        self._turns.append(turn)
        return turn

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any, context: Any = None) -> Any:
        turn = _Turn(callback, args, context, when := self.now_s + delay)
        heapq.heappush(self._later, (when, next(self._numbers), turn))
        return turn

    def call_at(self, when: float, callback: Callable[..., object], *args: Any, context: Any = None) -> Any:
        turn = _Turn(callback, args, context, when)
        heapq.heappush(self._later, (when, next(self._numbers), turn))
        return turn

    def _run_once(self) -> None:
        """Waits by moving the clock to the next timer; one that was cancelled moves nothing. Nobody asks a selector."""
        turns, later = self._turns, self._later
        while later and later[0][2].is_cancelled:
            heapq.heappop(later)
        if not turns and not self._stopping:  # type: ignore[attr-defined]
            if not later:
                raise Stuck("nothing is scheduled, and somebody waits")
            self.now_s = max(self.now_s, later[0][0])
        while later and later[0][0] <= self.now_s:
            turn = heapq.heappop(later)[2]
            if not turn.is_cancelled:
                turns.append(turn)
        # What these add has its turn next time.
        for _ in range(len(turns)):
            turn = turns.popleft()
            if not turn.is_cancelled:
                try:
                    turn._context.run(turn._callback, *turn._args)
                except (SystemExit, KeyboardInterrupt):
                    raise
                except BaseException as err:
                    self.call_exception_handler({"message": "in a callback", "exception": err})

    def _process_events(self, events: list[Any]) -> None:
        """There are none."""

    def _write_to_self(self) -> None:
        """Nobody else is there to wake us."""

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
    """Runs what it is given at once, in the calling thread: an order that threads could have taken."""

    def submit(self, func: Callable[..., Any], *args: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(func(*args))
        except Exception as err:
            done.set_exception(err)
        return done

    def shutdown(self) -> None:
        """Nothing runs."""


def _no_allocation(*_: object) -> None:
    raise OSError(errno.EOPNOTSUPP, "this disk is simulated")


@contextlib.contextmanager
def simulated(loop: SimulatedLoop, rng: random.Random) -> Iterator[None]:
    """Clocks and secrets are the loop's and the seed's in here."""
    with contextlib.ExitStack() as stack:
        for name, value in (
            ("monotonic", loop.time),
            ("perf_counter", loop.time),
            ("time", loop.wall_s),
            ("time_ns", lambda: int(loop.wall_s() * 1e9)),
        ):
            stack.enter_context(mock.patch.object(time, name, value))
        # Space ahead of time is of no use here, and in memory it costs as much as all the rest.
        for module in ("ledger_reserve", "progress_slots"):
            stack.enter_context(mock.patch(f"antefix_billing.{module}.allocate", _no_allocation))
        for name, drawn in (
            ("token_bytes", lambda nbytes=32: rng.randbytes(nbytes)),
            ("token_hex", lambda nbytes=32: rng.randbytes(nbytes).hex()),
            ("randbits", rng.getrandbits),
        ):
            stack.enter_context(mock.patch.object(secrets, name, drawn))
        yield

"""An event loop whose time is simulated and whose threads are not there: the same seed gives the same history.

`async-solipsism` simulates time as well, but has no executors, which ledger and store work in. Here what is given to an
executor runs in the loop, after a delay that the seed draws; so does every call over the simulated network. When
nothing is left to do but wait for ever, the history is stuck, and says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import heapq
import random
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any
from unittest import mock

WALL_S = 1_790_000_000.0


class Stuck(Exception):
    """Somebody waits for what nobody will do."""


class SimulatedLoop(asyncio.BaseEventLoop):
    """rng: draws how long what runs in executors takes.  wall_step_s: how far the wall clock has been moved."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.now_s = 0.0
        self.wall_step_s = 0.0
        self._rng = rng

    def time(self) -> float:
        return self.now_s

    def wall_s(self) -> float:
        return WALL_S + self.now_s + self.wall_step_s

    def _run_once(self) -> None:
        """As asyncio's, without its questions to a selector: they were a tenth of a history's time.

        Waits by moving the clock to the next timer; one that was cancelled moves nothing.
        """
        ready, scheduled = self._ready, self._scheduled  # type: ignore[attr-defined]
        while scheduled and scheduled[0]._cancelled:
            heapq.heappop(scheduled)._scheduled = False
            self._timer_cancelled_count -= 1
        if not ready and not self._stopping:  # type: ignore[attr-defined]
            if not scheduled:
                raise Stuck("nothing is scheduled, and somebody waits")
            self.now_s = max(self.now_s, scheduled[0]._when)
        while scheduled and scheduled[0]._when <= self.now_s:
            handle = heapq.heappop(scheduled)
            handle._scheduled = False
            if handle._cancelled:
                self._timer_cancelled_count -= 1
            else:
                ready.append(handle)
        # What these add has its turn next time.
        for _ in range(len(ready)):
            handle = ready.popleft()
            if not handle._cancelled:
                handle._run()

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

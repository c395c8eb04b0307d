"""When a request may be given to a second worker because its first one is late: within a budget, and never as a rule.

A late worker may hang, or everything may be slow because there is too much to do. In the second case doing work twice
makes it worse, so hedges are a small share of the requests, whatever happens.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Final

from antefix.errors import Unavailable

# One of so many requests may be done twice.
SHARE: Final = 0.1
# What is saved up: so many requests that one hanging worker holds at the same time move at once.
SAVED_MAX: Final = 8.0
# A prediction is off by so much in any case. With what it takes to notice, a hang costs 2 s more than predicted.
SLACK_S: Final = 1.5


class HedgeBudget:
    """One router's. num_hedges: given out.  num_denied: asked for and not given."""

    def __init__(self) -> None:
        self.num_hedges = 0
        self.num_denied = 0
        self._saved = SAVED_MAX

    def note_request(self) -> None:
        self._saved = min(SAVED_MAX, self._saved + SHARE)

    def take(self) -> bool:
        if self._saved < 1.0:
            self.num_denied += 1
            return False
        self._saved -= 1.0
        self.num_hedges += 1
        return True


class Late(Unavailable):
    """The worker is later than predicted. The request moves to another one."""


@contextlib.contextmanager
def moved_when_late(limit_s: float, may_move: Callable[[], bool]) -> Iterator[None]:
    """Wait for a worker in here.  may_move: asked once, after `limit_s`; where it says no, the wait continues.

    Raises:  Late.
    """
    task = asyncio.current_task()
    assert task is not None
    is_moved = False

    def late() -> None:
        nonlocal is_moved
        if may_move():
            is_moved = True
            task.cancel()

    timer = asyncio.get_running_loop().call_later(limit_s, late)
    try:
        yield
    except asyncio.CancelledError:
        # As asyncio.timeout does: our own cancellation is taken back; another one continues.
        if is_moved and task.uncancel() == 0:
            raise Late(f"nothing came within {limit_s:.1f} s") from None
        raise
    finally:
        timer.cancel()

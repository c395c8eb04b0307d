"""Limits how many requests are given to a second worker because the first worker is late.

A late worker may hang, or all workers may be slow from overload. Under overload, doing work twice makes things worse.
So second workers (hedges) are limited to a small share of the requests.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Final

from antefix.errors import Unavailable

# One of this many requests may be done twice.
SHARE: Final = 0.1
# How many hedges can be saved up, so that all requests held by one hanging worker can move at once.
SAVED_MAX: Final = 8.0
# Any prediction may be off by this much. Together with the detection time, a hang costs 2 s more than predicted.
SLACK_S: Final = 1.5


class HedgeBudget:
    """The budget of one router for second workers. num_hedges: how many were granted. num_denied: how many were asked
    for and refused.
    """

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
    """The worker is later than predicted, so the request moves. The request moves to another worker."""


@contextlib.contextmanager
def moved_when_late(limit_s: float, may_move: Callable[[], bool]) -> Iterator[None]:
    """Limits the wait for a worker. may_move: called once, after `limit_s`; if it returns False, the wait continues.

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
        # As in asyncio.timeout: the cancellation from this function is taken back; any other cancellation continues.
        if is_moved and task.uncancel() == 0:
            raise Late(f"nothing came within {limit_s:.1f} s") from None
        raise
    finally:
        timer.cancel()

"""The end of a router's grace period. Requests that still run when the grace period ends get a proper error instead of
a cut connection.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from antefix.errors import Draining


class Ending:
    """One router's ending. Code that waits for output does so inside `guard`, which raises Draining when the grace
    period is over.
    """

    def __init__(self) -> None:
        self.is_over = False
        self._waiting: set[asyncio.Task[object]] = set()
        self._woken: set[asyncio.Task[object]] = set()

    def end(self) -> None:
        """End the grace period."""
        self.is_over = True
        self._woken |= self._waiting
        for task in list(self._waiting):
            task.cancel()

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Raises:  Draining: the grace period is over, before or during the wait."""
        if self.is_over:
            raise self._error()
        task = asyncio.current_task()
        assert task is not None
        self._waiting.add(task)
        try:
            yield
        except asyncio.CancelledError:
            # As in asyncio.timeout: the cancellation from this guard is taken back; any other cancellation continues.
            if task in self._woken and task.uncancel() == 0:
                raise self._error() from None
            raise
        finally:
            self._waiting.discard(task)
            self._woken.discard(task)

    def _error(self) -> Draining:
        return Draining("the service is stopping and its grace period is over; send the request again")

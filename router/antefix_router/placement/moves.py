"""The workers on which one output of a request was tried, and whether it may move to another. The moves of our own
requests between decode workers, and of requests between a fleet's workers, are decided here.

If every worker has failed the output, the output waits for a worker that answers again. A worker may be stopped, cut
off or restarted for only a few seconds, and would then be available again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final

from antefix.errors import AntefixError, InternalError, NotFinite, StepFailed, Unavailable
from antefix.pulse import LAST_PATIENCE_S
from antefix_router.placement.workers import NUM_MOVES_MAX, Worker, Workers

log = logging.getLogger("antefix.router")

# The interval at which it is checked which workers answer.
_LOOK_S: Final = 0.05
# Errors of workers that answer and could not run this request. It may make every worker fail, so one more tries it.
FAILED_STEPS: Final = (StepFailed, NotFinite, InternalError)
# A call fails at once when a process dies. The pulse notices it within this many of its intervals.
_NUM_NOTICED: Final = 2


class Moves:
    """The moves of one output between workers. tried: the addresses that must not get the output again."""

    def __init__(
        self, workers: Workers, fits: Callable[[Worker], bool] = lambda worker: True, *, has_failed: bool = False
    ) -> None:
        """fits: decides whether the output may go to this worker at all.  has_failed: a worker that answers could not
        run the request already, so a second one that cannot either is the last.
        """
        self.tried: set[str] = set()
        self._workers = workers
        self._fits = fits
        # The workers that had the output, and how often each had begun to answer by then.
        self._had: dict[str, tuple[Worker, int]] = {}
        self._waits_until: float | None = None
        self._num_back = 0
        self._has_failed = has_failed

    def note(self, worker: Worker) -> None:
        """Record that this worker now has the output."""
        self.tried.add(worker.address)
        self._had[worker.address] = (worker, worker.num_returns)

    async def may_go_on(self, err: AntefixError, what: str, timeout_s: float = LAST_PATIENCE_S) -> bool:
        """Whether there is a worker to move to after this error. The worker may be one that failed earlier and answers
        again.

        Waits for such a worker until `LAST_PATIENCE_S` after the output's first failure, and no longer than
        `timeout_s`. what: the name of the waiting output in the log.
        """
        if isinstance(err, FAILED_STEPS):
            if self._has_failed:
                return False
            self._has_failed = True
        now = time.monotonic()
        if self._waits_until is None:
            self._waits_until = now + LAST_PATIENCE_S
        if self._workers.has_another(self.tried, self._fits):
            return True
        asked_every_s = [worker.pulse.every_s for worker, _ in self._had.values() if worker.pulse is not None]
        if not isinstance(err, Unavailable) or not asked_every_s or self._num_back >= NUM_MOVES_MAX:
            return False
        log.warning("%s waits until a worker that failed answers again: %s", what, err)
        until, noticed = min(self._waits_until, now + timeout_s), now + _NUM_NOTICED * max(asked_every_s)
        while not self._take_back() and not self._workers.has_another(self.tried, self._fits):
            now = time.monotonic()
            if now >= until or (now >= noticed and not self._is_any_away()):
                return False
            await asyncio.sleep(_LOOK_S)
        self._num_back += 1
        return True

    def _take_back(self) -> bool:
        """Allow the workers again that have begun to answer again."""
        back = {worker.address for worker in self._workers.workers if self._is_back(worker)}
        self.tried -= back
        return bool(back)

    def _is_back(self, worker: Worker) -> bool:
        if worker.address not in self.tried or worker.draining or not worker.answers:
            return False
        had, num_returns = self._had[worker.address]
        return worker is not had or worker.num_returns > num_returns

    def _is_any_away(self) -> bool:
        """Whether a worker that had the output may come back: the worker does not answer at present, or has left."""
        known = {worker.address: worker for worker in self._workers.workers}
        return any(
            address not in known or known[address].draining or known[address].answers is False for address in self._had
        )

"""Where one output of a request was tried, and whether it may move on.

Where every worker has failed it, it waits for one that answers again: a worker may be stopped, cut off or restarted
for a few seconds, and the next request would find it back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Final

from antefix.errors import AntefixError, Unavailable
from antefix.pulse import EVERY_S, LAST_PATIENCE_S
from antefix_router.placement.workers import NUM_MOVES_MAX, Worker, Workers

log = logging.getLogger("antefix.router")

# How often it is looked who answers.
_LOOK_S: Final = 0.05
# A call fails at once where a process dies; its pulse, which asks every EVERY_S, finds out within this.
_NOTICED_S: Final = 2 * EVERY_S


class Moves:
    """One output's. tried: the addresses that had it and are not to have it again."""

    def __init__(self, workers: Workers) -> None:
        self.tried: set[str] = set()
        self._workers = workers
        # Who had it, and how often each had begun to answer by then.
        self._had: dict[str, tuple[Worker, int]] = {}
        self._waits_until: float | None = None
        self._num_back = 0

    def note(self, worker: Worker) -> None:
        """It has the output now."""
        self.tried.add(worker.address)
        self._had[worker.address] = (worker, worker.num_returns)

    async def may_go_on(self, err: AntefixError, what: str, timeout_s: float = LAST_PATIENCE_S) -> bool:
        """Whether there is a worker to move to after this error, which may be one that failed and answers again.

        Waits for it, over all the output's moves until `LAST_PATIENCE_S` after the first one failed, and no longer
        than `timeout_s`.  what: that waits, for the log.
        """
        now = time.monotonic()
        if self._waits_until is None:
            self._waits_until = now + LAST_PATIENCE_S
        if self._workers.has_another(self.tried):
            return True
        is_asked = any(worker.pulse is not None for worker, _ in self._had.values())
        if not isinstance(err, Unavailable) or not is_asked or self._num_back >= NUM_MOVES_MAX:
            return False
        log.warning("%s waits for a worker that answers again: %s", what, err)
        until, noticed = min(self._waits_until, now + timeout_s), now + _NOTICED_S
        while not self._take_back() and not self._workers.has_another(self.tried):
            now = time.monotonic()
            if now >= until or (now >= noticed and not self._is_any_away()):
                return False
            await asyncio.sleep(_LOOK_S)
        self._num_back += 1
        return True

    def _take_back(self) -> bool:
        """Let those have it again that answer again."""
        back = {worker.address for worker in self._workers.workers if self._is_back(worker)}
        self.tried -= back
        return bool(back)

    def _is_back(self, worker: Worker) -> bool:
        if worker.address not in self.tried or worker.draining or not worker.answers:
            return False
        had, num_returns = self._had[worker.address]
        return worker is not had or worker.num_returns > num_returns

    def _is_any_away(self) -> bool:
        """Whether a worker that had it may come back: it does not answer, or has left."""
        known = {worker.address: worker for worker in self._workers.workers}
        return any(
            address not in known or known[address].draining or known[address].answers is False for address in self._had
        )

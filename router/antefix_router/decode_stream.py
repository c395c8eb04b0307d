"""Reads the messages of one call to a decode worker, and limits how long to wait for each if another worker could take
over.

A worker that hangs is abandoned (`antefix.pulse`). A late worker is given up only as long as the budget for such moves
allows. The request continues at another worker with the tokens that its client already has, so the answer stays the
same.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Final

from antefix.clients.decode import Decoded
from antefix.pulse import LAST_PATIENCE_S
from antefix_router.hedging import SLACK_S, HedgeBudget, moved_when_late
from antefix_router.placement.work import FETCH_WEIGHT, Work
from antefix_router.placement.workers import Worker, Workers

# A worker is late when a message takes this many times its expected time. Other sequences join the batch, and prompts
# run in between.
_GAPS: Final = 8.0
_FIRSTS: Final = 2.0
# The first message has the first token. The second comes after the prompt's blocks are loaded.
_NUM_FIRST: Final = 2
# The longest time to prepare a grammar.
_GRAMMAR_S: Final = 10.0


def first_work_s(work: Work, has_handoff: bool, worker: Worker, tokens_per_s: float, has_grammar: bool) -> float:
    """How long this worker should need for everything that it must compute and load before it generates.

    tokens_per_s: the speed of a prefill.
    """
    stored = work.num_tokens if has_handoff else (work.stored_tokens or 0)
    # Computing on a decode worker shares its time with all sequences that run there.
    tokens = FETCH_WEIGHT * stored + (work.num_tokens - stored) * (1 + worker.num_requests)
    return tokens / tokens_per_s + (_GRAMMAR_S if has_grammar else 0.0)


class DecodeStream:
    """Waits for the messages of one call."""

    def __init__(self, workers: Workers, worker: Worker, tried: set[str], budget: HedgeBudget, *, own_s: float) -> None:
        """tried: the addresses that have had this output, including this worker's. own_s: the result of
        `first_work_s`.
        """
        self._workers, self._worker, self._tried, self._budget = workers, worker, tried, budget
        self._own_s = own_s
        self._num_messages = 0

    async def next(self, outputs: AsyncGenerator[Decoded, None]) -> Decoded | None:
        """The next message, or None at the end.

        Raises:  Unavailable: the worker hangs.  Late: the worker is late, and another one may take over.
        """
        asked = time.perf_counter()
        # If no other worker is left, wait: this one may only be stopped for a while and come back.
        patience_s = 0.0 if self._workers.has_another(self._tried) else LAST_PATIENCE_S
        with self._worker.guard(patience_s), moved_when_late(self._limit_s, self._may_move):
            decoded = await anext(outputs, None)
        self._note(time.perf_counter() - asked)
        return decoded

    @property
    def _limit_s(self) -> float:
        pace = self._worker.pace
        if self._num_messages < _NUM_FIRST:
            return SLACK_S + _FIRSTS * (pace.first_s + self._own_s) + _GAPS * pace.gap_s
        return SLACK_S + _GAPS * pace.gap_s

    def _note(self, seconds: float) -> None:
        if self._num_messages == 0:
            self._worker.pace.note_first(max(0.0, seconds - self._own_s))
        elif self._num_messages >= _NUM_FIRST:
            self._worker.pace.note_gap(seconds)
        self._num_messages += 1

    def _may_move(self) -> bool:
        return self._workers.may_help(self._worker, self._tried) and self._budget.take()

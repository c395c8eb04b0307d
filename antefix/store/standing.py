"""Whether a tier is asked now, and how long its answer is waited for.

    unreachable                     left alone for SHUNNED_S, twice as long after each further failure, until it is back
    late                            nothing yet: the one who asked continues without, the answer counts when it comes
    late NUM_LATE_MAX times in a row, each asked after the one before was given up, and no answer since: as unreachable

What is late follows from the tier's own answers, as TCP times its segments out: their mean, and four times how much
they vary. So a store that gets slower with its load is given more time, and one that hangs costs some seconds in all
(its connection is found silent before that: `antefix.pulse`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final

SHUNNED_S: Final = 1.0
SHUNNED_S_MAX: Final = 30.0
# The least and the most that an answer is waited for. A request that has to compute 8K tokens loses more than the most.
ASK_S: Final = 0.5
ASK_S_MAX: Final = 2.0
NUM_LATE_MAX: Final = 3
# Of a new answer time, how much is believed at once; a slower one at once, a faster one after some.
_SLOWER: Final = 0.5
_FASTER: Final = 0.1
_DEVIATIONS: Final = 4.0


class Standing:
    """One tier's.  returned_s: when it last began to answer again, as its connection noticed.  clock: monotonic."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        returned_s: Callable[[], float] = lambda: -math.inf,
    ) -> None:
        self.num_late = 0
        self.returned_s = returned_s
        self._clock = clock
        self._num_failed_in_a_row = 0
        self._num_late_in_a_row = 0
        self._late_s = self._failed_s = -math.inf
        self._shunned_until = -math.inf
        self._mean_s = self._deviation_s = 0.0

    @property
    def is_shunned(self) -> bool:
        """It failed a moment ago and is not known to be back, so nobody waits for it."""
        return self._clock() < self._shunned_until and not self._is_back

    @property
    def limit_s(self) -> float:
        """How long it is waited for what it holds."""
        return min(ASK_S_MAX, max(ASK_S, self._mean_s + _DEVIATIONS * self._deviation_s))

    @property
    def _is_back(self) -> bool:
        return self.returned_s() > self._failed_s

    def failed(self) -> None:
        """It cannot be reached."""
        if self._is_back:
            self._num_failed_in_a_row = 0
        now = self._clock()
        pause_s = min(SHUNNED_S * 2**self._num_failed_in_a_row, SHUNNED_S_MAX)
        self._num_failed_in_a_row += 1
        self._failed_s, self._shunned_until = now, now + pause_s

    def late(self, begun_s: float) -> None:
        """An answer was given up that was asked for then."""
        self.num_late += 1
        if begun_s < self._late_s:
            return  # asked for before another one was given up, and says the same
        self._late_s = self._clock()
        self._num_late_in_a_row += 1
        if self._num_late_in_a_row >= NUM_LATE_MAX:
            self.failed()

    def answered(self, seconds: float | None = None) -> None:
        """It answers.  seconds: how long it took to say what it holds, in time or not."""
        self._num_failed_in_a_row = self._num_late_in_a_row = 0
        self._shunned_until = -math.inf
        if seconds is not None:
            error = seconds - self._mean_s
            believed = _SLOWER if error > 0 else _FASTER
            self._mean_s += believed * error
            self._deviation_s += believed * (abs(error) - self._deviation_s)

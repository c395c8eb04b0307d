"""Decides whether a tier is asked now, and how long to wait for its answer.

    unreachable     not asked for SHUNNED_S, twice as long after each further failure, or until its connection is back
    late once       still asked: the caller continues without the answer, which counts when it arrives
    late NUM_LATE_MAX times in a row, each question asked after the one before was given up, and no answer since:
                    treated as unreachable

The waiting time follows from the tier's own answer times, like TCP's retransmission timeout: their mean plus four times
their mean deviation. So a store that slows down under load gets more time, and a store that hangs costs a few seconds
in all (`antefix.pulse` finds its connection silent before that).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final

SHUNNED_S: Final = 1.0
SHUNNED_S_MAX: Final = 30.0
# The shortest and the longest time to wait for an answer. Computing 8K tokens again costs a request more than the
# longest wait.
ASK_S: Final = 0.5
ASK_S_MAX: Final = 2.0
NUM_LATE_MAX: Final = 3
# The weight of a new answer time in the running mean: a slower answer counts quickly, a faster one gradually.
_SLOWER: Final = 0.5
_FASTER: Final = 0.1
_DEVIATIONS: Final = 4.0


class Standing:
    """The state of one tier.

    returned_s: the time at which the tier's connection last noticed that the tier answers again. clock: monotonic
    seconds.
    """

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
        """Whether the tier failed a short time ago and is not known to be back, so that it is not asked."""
        return self._clock() < self._shunned_until and not self._is_back

    @property
    def limit_s(self) -> float:
        """How long to wait, in seconds, for the tier's answer which blocks it has."""
        return min(ASK_S_MAX, max(ASK_S, self._mean_s + _DEVIATIONS * self._deviation_s))

    @property
    def _is_back(self) -> bool:
        return self.returned_s() > self._failed_s

    def failed(self) -> None:
        """Record that the tier cannot be reached."""
        if self._is_back:
            self._num_failed_in_a_row = 0
        now = self._clock()
        pause_s = min(SHUNNED_S * 2**self._num_failed_in_a_row, SHUNNED_S_MAX)
        self._num_failed_in_a_row += 1
        self._failed_s, self._shunned_until = now, now + pause_s

    def late(self, begun_s: float) -> None:
        """Record that the question asked at `begun_s` was given up without an answer."""
        self.num_late += 1
        if begun_s < self._late_s:
            return  # asked before the last question was given up, so it shows nothing new
        self._late_s = self._clock()
        self._num_late_in_a_row += 1
        if self._num_late_in_a_row >= NUM_LATE_MAX:
            self.failed()

    def answered(self, seconds: float | None = None) -> None:
        """Record that the tier answers. seconds: how long the answer took, even if it was late."""
        self._num_failed_in_a_row = self._num_late_in_a_row = 0
        self._shunned_until = -math.inf
        if seconds is not None:
            error = seconds - self._mean_s
            believed = _SLOWER if error > 0 else _FASTER
            self._mean_s += believed * error
            self._deviation_s += believed * (abs(error) - self._deviation_s)

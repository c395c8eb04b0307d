"""How fast each worker is, as its callers measure it, and which workers are slow: alive, but far behind the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from antefix_router.placement.workers import Worker

_FADE: Final = 0.9
# A worker is slow if it takes this many times as long as the best of its role. Chance, load and cold caches explain up
# to half of that factor.
SLOW_FACTOR: Final = 4.0
# Below these times no worker counts as slow: for the answer to a health check, and for a token.
_RTT_S_MIN: Final = 0.25
_GAP_S_MIN: Final = 0.25
# A slow worker gets one request per this time, to find out whether it is still slow.
PROBE_S: Final = 10.0


@dataclass(slots=True)
class Pace:
    """Decaying means for one worker's outputs: seconds to a first token minus the prompt's own work, and seconds
    between messages. 0: not measured yet.
    """

    first_s: float = 0.0
    gap_s: float = 0.0

    def note_first(self, seconds: float) -> None:
        self.first_s = _faded(self.first_s, seconds)

    def note_gap(self, seconds: float) -> None:
        self.gap_s = _faded(self.gap_s, seconds)


def without_slow(workers: Sequence[Worker], now: float) -> Sequence[Worker]:
    """The workers to choose from. A slow worker gets no requests, except one every PROBE_S seconds. If all workers are
    equally slow, none of them is left out.
    """
    if len(workers) < 2:
        return workers
    slow = {id(worker) for worker in slow_ones(workers)}
    fast = [worker for worker in workers if id(worker) not in slow or now >= worker.probed_at + PROBE_S]
    return fast or workers


def slow_ones(workers: Sequence[Worker]) -> list[Worker]:
    """The workers that are far behind the best one, by one of three measures. The time is linear in their number."""
    measured = (
        ([worker.pulse.rtt_s if worker.pulse is not None else 0.0 for worker in workers], _RTT_S_MIN),
        ([worker.pace.gap_s for worker in workers], _GAP_S_MIN),
        ([1.0 / rate if rate else 0.0 for rate in [worker.backlog.tokens_per_s for worker in workers]], 0.0),
    )
    late: set[int] = set()
    for seconds, least_s in measured:
        limit = max(least_s, SLOW_FACTOR * min(filter(None, seconds), default=inf))
        # Nearly always no worker is late, and then one comparison shows it.
        if max(seconds, default=0.0) > limit:
            late.update(number for number, own in enumerate(seconds) if own > limit)
    return [workers[number] for number in sorted(late)]


def _faded(before: float, now: float) -> float:
    return _FADE * before + (1 - _FADE) * now if before else now

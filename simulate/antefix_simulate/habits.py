"""How checkpoints are used, by the reason for leaving them: how many are ever used, and how long after their last
use.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from antefix.window import Reason

# The ages from which lifetimes are chosen.
AGES_S = {"within_1min": 60.0, "within_5min": 300.0, "within_1h": 3600.0, "within_4h": 14_400.0, "within_24h": 86_400.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasonUse:
    """left: checkpoints that were written. used: those used at least once. ages: share of all uses, by time since the
    last use.
    """

    left: int
    used: int
    uses: int
    ages: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(slots=True)
class _Left:
    reason: Reason
    since_s: float
    used: bool = False


@dataclass(slots=True)
class Habits:
    """Counts that are filled in during a replay. A checkpoint that expired and is written again counts twice."""

    _current: dict[int, _Left] = field(default_factory=dict)
    _left: dict[Reason, int] = field(default_factory=dict)
    _used: dict[Reason, int] = field(default_factory=dict)
    _ages_s: dict[Reason, list[float]] = field(default_factory=dict)

    def left(self, name: int, reason: Reason, now_s: float) -> None:
        self._current[name] = _Left(reason, now_s)
        self._left[reason] = self._left.get(reason, 0) + 1

    def use(self, name: int, now_s: float) -> None:
        found = self._current[name]
        if not found.used:
            self._used[found.reason] = self._used.get(found.reason, 0) + 1
        self._ages_s.setdefault(found.reason, []).append(now_s - found.since_s)
        found.since_s, found.used = now_s, True

    def by_reason(self) -> dict[str, ReasonUse]:
        return {reason.value: self._of(reason) for reason in Reason if reason in self._left}

    def _of(self, reason: Reason) -> ReasonUse:
        ages = np.asarray(self._ages_s.get(reason, []))
        return ReasonUse(
            left=self._left[reason],
            used=self._used.get(reason, 0),
            uses=len(ages),
            ages={label: float((ages <= limit).mean()) if len(ages) else 0.0 for label, limit in AGES_S.items()},
        )

"""The last restores: the predicted time of every plan, the chosen plan, and the actual time. Knows no tensors."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from antefix.telemetry.exposition import histogram
from antefix.window import Plan

NUM_KEPT = 256
_ERRORS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOutcome:
    """One restore and how it was decided. plans: all plans that were compared, cheapest first; plan: the one that was
    carried out.

    actual_s: seconds until the prompt was computed and stored, the time that `plan.predicted_s` predicts.
    """

    plan: Plan
    plans: tuple[Plan, ...]
    num_tokens: int
    actual_s: float
    at_s: float = field(default_factory=time.time)

    @property
    def error(self) -> float:
        """The prediction's error as a fraction of the prediction."""
        return abs(self.actual_s - self.plan.predicted_s) / max(self.plan.predicted_s, 1e-9)


class PlanLog:
    """The last NUM_KEPT restores, oldest first."""

    def __init__(self) -> None:
        self.errors = histogram(
            "antefix_plan_error_ratio",
            "How far predictions were off: |actual - predicted| / predicted.",
            ("plan",),
            buckets=_ERRORS,
        )
        self._kept: deque[PlanOutcome] = deque(maxlen=NUM_KEPT)

    def add(self, outcome: PlanOutcome) -> None:
        self._kept.append(outcome)
        self.errors.labels(outcome.plan.kind.value).observe(outcome.error)

    def __iter__(self) -> Iterator[PlanOutcome]:
        return iter(tuple(self._kept))

    def __len__(self) -> int:
        return len(self._kept)

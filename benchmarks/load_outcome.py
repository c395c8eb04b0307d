"""What a series of requests got: latencies, statuses, answers per second, and when an overload was over."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(slots=True)
class Outcome:
    """The results of one series of requests. statuses: HTTP statuses; 0 means no answer.

    seconds: how long requests were sent.  answered_s: from the first request to the last good answer, which may come
    after the last request was sent.  waits: of each request, when it was sent since the first one, and its latency;
    infinity if there was no good answer.  other_cpu_s: processor time of programs outside the measurement meanwhile.
    """

    begun: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    answered_s: float = 0.0
    client_cpu_s: float = 0.0
    other_cpu_s: float = 0.0
    waits: list[tuple[float, float]] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)

    def note(self, sent_at: float, status: int) -> None:
        now = time.monotonic()
        self.statuses[status] += 1
        is_good = status == 200
        self.waits.append((sent_at - self.begun, now - sent_at if is_good else math.inf))
        if is_good:
            self.answered_s = now - self.begun

    @property
    def latencies_s(self) -> list[float]:
        return [latency_s for _, latency_s in self.waits if latency_s < math.inf]

    @property
    def p99_s(self) -> float:
        return float(np.quantile(self.latencies_s, 0.99)) if self.latencies_s else float("inf")

    def figures(self) -> dict[str, Any]:
        found = self.latencies_s
        # Answers that come after the last request was sent took that time as well.
        answering_s = max(self.seconds, self.answered_s, 1e-9)
        return {
            "asked_per_s": round(self.statuses.total() / max(self.seconds, 1e-9), 2),
            "goodput_per_s": round(len(found) / answering_s, 2),
            "p50_ms": round(1000 * float(np.quantile(found, 0.5))) if found else None,
            "p99_ms": round(1000 * self.p99_s) if found else None,
            # The share of one core that the clients took from the measured processes.
            "clients_cpu": round(self.client_cpu_s / max(self.seconds, 1e-9), 3),
            # Cores that programs outside the measurement used: if it is not small, the figures are not the system's.
            "others_cpu": round(self.other_cpu_s / max(self.seconds, 1e-9), 3),
            "statuses": {str(status): number for status, number in sorted(self.statuses.items())},
        }


def back(after: Outcome, p99_s_max: float) -> float | None:
    """After how many seconds the p99 of all later requests was at most `p99_s_max`; None: not in the first half of the
    time, after which too few requests are left.
    """
    waits = sorted(after.waits)
    for number, (sent_s, _) in enumerate(waits):
        if sent_s > after.seconds / 2:
            break
        later = sorted(latency_s for _, latency_s in waits[number:])
        if later[math.ceil(0.99 * len(later)) - 1] <= p99_s_max:
            return round(sent_s, 1)
    return None

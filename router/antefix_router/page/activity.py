"""Recent activity: counts over time, the newest requests, the busiest tenants. In memory, bounded."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from antefix.restore_report import RestoreReport
from antefix_billing.usage_record import Status, UsageRecord

# Four hours in intervals of ten seconds.
SECONDS_PER_BUCKET: Final = 10
_BUCKETS_MAX: Final = 1440
_REQUESTS_MAX: Final = 500
_TENANTS_MAX: Final = 1000


@dataclass(slots=True)
class Totals:
    """Sums over the requests that ended in one time interval."""

    requests: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    hit_tokens: int = 0
    output_tokens: int = 0
    charged: float = 0.0
    saved: float = 0.0
    ttft_s: float = 0.0
    num_with_ttft: int = 0

    def add(self, record: UsageRecord) -> None:
        self.requests += 1
        self.failed += record.status is Status.FAILED or record.status is Status.CRASHED
        self.prompt_tokens += record.prompt_tokens
        self.hit_tokens += record.cache_hit_tokens
        self.output_tokens += record.output_tokens
        self.charged += float(record.price)
        self.saved += float(record.saved)
        if record.ttft_us:
            self.ttft_s += record.ttft_s
            self.num_with_ttft += 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """The phases of one request in seconds, in order, and the worker's work for its prompt.

    wait_s: all time before the first token that is not restoring or computing: tokenizing, look-ups, placing, queues
    and the handoff. restore_s: reading stored KV and rebuilding window state. predicted_s: the planner's prediction of
    restore_s. compute_s: computing the tokens that missed. output_s: from the first token to the end.
    """

    wait_s: float
    restore_s: float
    compute_s: float
    output_s: float
    predicted_s: float
    bytes_read: int

    @classmethod
    def of(cls, record: UsageRecord, report: RestoreReport | None) -> Life:
        total_s = max(0.0, (record.finished_us - record.started_us) / 1e6)
        ttft_s = min(record.ttft_s or total_s, total_s)
        restore_s = min(report.restore_s if report else 0.0, ttft_s)
        compute_s = min(report.compute_s if report else 0.0, ttft_s - restore_s)
        return cls(
            wait_s=max(0.0, ttft_s - restore_s - compute_s),
            restore_s=restore_s,
            compute_s=compute_s,
            output_s=total_s - ttft_s,
            predicted_s=report.predicted_s if report else 0.0,
            bytes_read=report.bytes_read if report else 0,
        )


@dataclass(frozen=True, slots=True)
class Ended:
    """One of the newest requests."""

    record: UsageRecord
    life: Life

    def as_dict(self) -> dict[str, Any]:
        record = self.record
        return {
            "id": record.request_id,
            "attempt": record.attempt,
            "at": record.finished_us / 1e6,
            "tenant": record.tenant,
            "status": record.status.value,
            "detail": record.detail,
            "prompt_tokens": record.prompt_tokens,
            "hit_tokens": record.cache_hit_tokens,
            "hit_memory_tokens": record.hit_memory_tokens,
            "hit_store_tokens": record.hit_store_tokens,
            "hit_tiers": record.tokens_by_tier,
            "miss_tokens": record.cache_miss_tokens,
            "replayed_tokens": record.replayed_tokens,
            "written_tokens": record.written_tokens,
            "output_tokens": record.output_tokens,
            "plan": record.restore_plan,
            "miss_reason": record.miss_reason.value,
            "prefix_volatile": record.prefix_volatile,
            "write_error": record.write_error,
            "ttft_s": record.ttft_s,
            "price": str(record.price),
            "saved": str(record.saved),
            "currency": record.currency,
            "life": asdict(self.life),
        }


@dataclass(slots=True)
class TenantActivity:
    totals: Totals = field(default_factory=Totals)
    miss_reasons: Counter[str] = field(default_factory=Counter)


class Activity:
    """The activity of one router since it started."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self.started_at = clock()
        self.total = Totals()
        self.miss_tokens: Counter[str] = Counter()
        self.newest: deque[Ended] = deque(maxlen=_REQUESTS_MAX)
        self._buckets: OrderedDict[int, Totals] = OrderedDict()
        self._tenants: OrderedDict[str, TenantActivity] = OrderedDict()

    def note(self, record: UsageRecord, report: RestoreReport | None) -> None:
        """Add a record that was just written."""
        # 1. By time.
        number = int(self._clock() // SECONDS_PER_BUCKET)
        bucket = self._buckets.setdefault(number, Totals())
        while len(self._buckets) > _BUCKETS_MAX:
            self._buckets.popitem(last=False)
        # 2. By tenant. When there are too many, the tenant that was quiet longest is dropped.
        tenant = self._tenants.setdefault(record.tenant, TenantActivity())
        self._tenants.move_to_end(record.tenant)
        while len(self._tenants) > _TENANTS_MAX:
            self._tenants.popitem(last=False)
        for totals in (self.total, bucket, tenant.totals):
            totals.add(record)
        if reason := record.miss_reason.value:
            self.miss_tokens[reason] += record.cache_miss_tokens
            tenant.miss_reasons[reason] += record.cache_miss_tokens
        # 3. The newest.
        self.newest.append(Ended(record, Life.of(record, report)))

    def series(self, seconds: int, num_points: int = 120) -> list[dict[str, float]]:
        """The activity of the last `seconds`, in at most `num_points` equal steps, oldest first; `at` is a step's end,
        in Unix seconds.
        """
        step = max(1, -(-seconds // SECONDS_PER_BUCKET // num_points))
        last = int(self._clock() // SECONDS_PER_BUCKET)
        first = last - -(-seconds // SECONDS_PER_BUCKET // step) * step + 1
        points = []
        for start in range(first, last + 1, step):
            totals = Totals()
            for number in range(start, start + step):
                if found := self._buckets.get(number):
                    _add(totals, found)
            points.append({"at": (start + step) * SECONDS_PER_BUCKET, **asdict(totals)})
        return points

    def over(self, seconds: int) -> Totals:
        """The sums over all requests of the last `seconds`."""
        totals, last = Totals(), int(self._clock() // SECONDS_PER_BUCKET)
        for number in range(last - -(-seconds // SECONDS_PER_BUCKET) + 1, last + 1):
            if found := self._buckets.get(number):
                _add(totals, found)
        return totals

    def busiest(self, num_tenants: int) -> list[tuple[str, TenantActivity]]:
        by_tokens = sorted(self._tenants.items(), key=lambda item: -item[1].totals.prompt_tokens)
        return by_tokens[:num_tenants]


def _add(into: Totals, other: Totals) -> None:
    for name in Totals.__slots__:
        setattr(into, name, getattr(into, name) + getattr(other, name))

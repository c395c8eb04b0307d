"""Makes valid usage records from a few numbers, for the tests of the bill."""

from __future__ import annotations

from decimal import Decimal

from antefix.miss_reason import MissReason
from antefix_billing.usage_record import OpenEntry, Status, UsageRecord

NOW_US = 1_790_000_000_000_000


def record(request_id: str = "r1", *, hit: int = 128, miss: int = 72, **changes: object) -> UsageRecord:
    values: dict[str, object] = {
        "request_id": request_id,
        "source": "antefix/test",
        "tenant": "acme",
        "model": "antefix-tiny",
        "prompt_tokens": hit + miss,
        "cache_hit_tokens": hit,
        "last_hit_hash": "ab" * 32 if hit else "",
        "output_tokens": 10,
        "status": Status.STOP,
        "miss_reason": MissReason.FIRST_SEEN,
        "price": Decimal("0.000001"),
        "started_us": NOW_US,
        "finished_us": NOW_US + 1_000_000,
    }
    return UsageRecord(**(values | changes))  # type: ignore[arg-type]


def opened(request_id: str = "r1", *, attempt: int = 1, prompt_tokens: int = 200) -> OpenEntry:
    return OpenEntry(
        request_id=request_id,
        attempt=attempt,
        tenant="acme",
        user="",
        model="antefix-tiny",
        revision="",
        fingerprint="",
        request_digest="00",
        prompt_tokens=prompt_tokens,
        started_us=NOW_US,
    )

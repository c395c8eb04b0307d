"""What the cache did for an answer, in its headers and, where asked for, in its usage: docs/HTTP_API.md. Pure."""

from __future__ import annotations

from typing import Any, Final

from antefix_billing.usage_record import UsageRecord

# A request header: "true" asks for `antefix` in the usage.
DETAILS_HEADER: Final = "antefix-usage-details"
_NONE: Final = "none"


def cache_headers(record: UsageRecord) -> dict[str, str]:
    return {
        "antefix-plan": record.restore_plan or _NONE,
        "antefix-hit-tokens": str(record.cache_hit_tokens),
        "antefix-tier": _tier(record),
        "antefix-miss-reason": record.miss_reason.label,
    }


def cache_details(record: UsageRecord) -> dict[str, Any]:
    """`usage.antefix`: the record's own counts, with nothing that the bill has not."""
    return {
        "plan": record.restore_plan or _NONE,
        "tier": _tier(record),
        "miss_reason": record.miss_reason.label,
        "hit_tokens": record.cache_hit_tokens,
        "hit_memory_tokens": record.hit_memory_tokens,
        "hit_store_tokens": record.hit_store_tokens,
        "miss_tokens": record.cache_miss_tokens,
        "replayed_tokens": record.replayed_tokens,
        "written_tokens": record.cache_write_tokens + record.output_write_tokens,
    }


def _tier(record: UsageRecord) -> str:
    tiers = {"memory": record.hit_memory_tokens, "store": record.hit_store_tokens}
    return "+".join(tier for tier, number in tiers.items() if number) or _NONE

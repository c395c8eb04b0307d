"""Reports what the cache did for an answer, in its headers and, on request, in its usage (docs/HTTP_API.md). Pure."""

from __future__ import annotations

from typing import Any, Final

from antefix.usage import Usage

# A request header; "true" asks for `antefix` in the usage.
DETAILS_HEADER: Final = "antefix-usage-details"
_NONE: Final = "none"


def cache_headers(used: Usage) -> dict[str, str]:
    return {
        "antefix-plan": used.restore_plan or _NONE,
        "antefix-hit-tokens": str(used.cache_hit_tokens),
        "antefix-tier": _tier(used),
        "antefix-miss-reason": used.miss_reason.label,
        **({"antefix-evidence": used.evidence.label, "antefix-worker": used.worker} if used.worker else {}),
    }


def cache_details(used: Usage) -> dict[str, Any]:
    """`usage.antefix`: counts that are taken from the record in the bill."""
    return {
        "plan": used.restore_plan or _NONE,
        "tier": _tier(used),
        "miss_reason": used.miss_reason.label,
        "hit_tokens": used.cache_hit_tokens,
        "hit_memory_tokens": used.hit_memory_tokens,
        "hit_store_tokens": used.hit_store_tokens,
        "hit_tiers": used.tokens_by_tier,
        "miss_tokens": used.cache_miss_tokens,
        "replayed_tokens": used.replayed_tokens,
        "written_tokens": used.written_tokens,
        **(_of_a_fleet(used) if used.worker else {}),
    }


def _of_a_fleet(used: Usage) -> dict[str, Any]:
    """The fields for an answer that another engine's worker generated."""
    return {
        "evidence": used.evidence.label,
        "worker": used.worker,
        "expected_hit_tokens": used.expected_hit_tokens,
    }


def _tier(used: Usage) -> str:
    """Memory first, then the store. If there are several stores and tiers, the name of each, the one that gave most
    first.
    """
    tiers = sorted(used.tokens_by_tier.items(), key=lambda tier: (tier[0] != "memory", -tier[1]))
    return "+".join(label if label == "memory" or ":" in label else "store" for label, _ in tiers) or _NONE

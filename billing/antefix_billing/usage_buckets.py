"""Usage summed by time bucket and group, for the usage endpoints: OpenAI's organisation usage, and a plain table. Pure.

Source of OpenAI's format: platform.openai.com, "Usage" (list completions usage): pages of buckets, each with its
results.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Final

from antefix.errors import InvalidRequest
from antefix_billing.adjustment import Adjusted
from antefix_billing.ledger_files import Settled
from antefix_billing.usage_record import UsageRecord

# For each bucket width: its seconds, and the default and the maximum number of buckets, as in OpenAI's API.
WIDTHS: Final = {"1m": (60, 60, 1440), "1h": (3600, 24, 168), "1d": (86400, 7, 31)}
# Our names of the groups, and OpenAI's names for the same.
GROUPS: Final = {
    "model": "model",
    "user": "user_id",
    "key": "api_key_id",
    "tenant": "project_id",
    "tier": "tier",
    "miss_reason": "miss_reason",
}
_BY_OPENAI: Final = {theirs: ours for ours, theirs in GROUPS.items()}
_COUNTS: Final = (
    "prompt_tokens",
    "cache_hit_tokens",
    "cache_miss_tokens",
    "cache_write_tokens",
    "cache_write_1h_tokens",
    "output_tokens",
    "reasoning_tokens",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageQuery:
    """start_s: Unix seconds, the beginning of a bucket.  end_s: exclusive.  by: names from GROUPS.  where: the values
    to keep, by group.
    """

    start_s: int
    end_s: int
    width: str = "1d"
    by: tuple[str, ...] = ()
    where: dict[str, frozenset[str]] = field(default_factory=dict)

    @property
    def width_s(self) -> int:
        return WIDTHS[self.width][0]


@dataclass(slots=True)
class Sums:
    """The sums of one group in one bucket."""

    requests: int = 0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_COUNTS, 0))
    price: dict[str, Decimal] = field(default_factory=dict)
    saved: dict[str, Decimal] = field(default_factory=dict)
    adjusted: dict[str, Decimal] = field(default_factory=dict)

    def add(self, record: UsageRecord) -> None:
        self.requests += 1
        for name in _COUNTS:
            self.counts[name] += getattr(record, name)
        _add(self.price, record.currency, record.price)
        _add(self.saved, record.currency, record.saved)


def names_of(groups: Iterable[str]) -> tuple[str, ...]:
    """Maps the names of groups, both ours and OpenAI's, to ours.  Raises:  InvalidRequest: an unknown name."""
    found = []
    for name in groups:
        ours = _BY_OPENAI.get(name, name)
        if ours not in GROUPS:
            raise InvalidRequest(f"group_by takes {', '.join(GROUPS)}, not {name!r}")
        found.append(ours)
    return tuple(dict.fromkeys(found))


def bucketed(items: Iterable[Settled | Adjusted], query: UsageQuery) -> dict[int, dict[tuple[str, ...], Sums]]:
    """Sums by the bucket's beginning (Unix seconds) and group. An adjustment counts at the time when it was made."""
    buckets: dict[int, dict[tuple[str, ...], Sums]] = {}
    for item in items:
        time_us = item.record.started_us if isinstance(item, Settled) else item.adjustment.created_us
        second = time_us // 1_000_000
        if not query.start_s <= second < query.end_s:
            continue
        values = {name: _value(item, name) for name in {*query.by, *query.where}}
        if any(values[name] not in allowed for name, allowed in query.where.items()):
            continue
        begin = query.start_s + (second - query.start_s) // query.width_s * query.width_s
        sums = buckets.setdefault(begin, {}).setdefault(tuple(values[name] for name in query.by), Sums())
        if isinstance(item, Settled):
            sums.add(item.record)
        else:
            _add(sums.adjusted, item.adjustment.currency, item.adjustment.amount)
    return buckets


def openai_page(
    buckets: dict[int, dict[tuple[str, ...], Sums]], query: UsageQuery, *, next_page: str | None
) -> dict[str, Any]:
    """The answer in the form of OpenAI's API. The answer has a bucket for each span of time, even if nothing was used
    in it.
    """
    data = [
        {
            "object": "bucket",
            "start_time": begin,
            "end_time": min(begin + query.width_s, query.end_s),
            "results": [
                _openai_result(group, sums, query.by) for group, sums in sorted(buckets.get(begin, {}).items())
            ],
        }
        for begin in range(query.start_s, query.end_s, query.width_s)
    ]
    return {"object": "page", "data": data, "has_more": next_page is not None, "next_page": next_page}


def plain_rows(buckets: dict[int, dict[tuple[str, ...], Sums]], by: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each group of each bucket that has usage; money by currency, as decimal strings."""
    return [
        {
            "start_time": begin,
            **dict(zip(by, group, strict=True)),
            "requests": sums.requests,
            **sums.counts,
            "price": _money(sums.price),
            "saved": _money(sums.saved),
            "adjusted": _money(sums.adjusted),
        }
        for begin, groups in sorted(buckets.items())
        for group, sums in sorted(groups.items())
    ]


def _openai_result(group: tuple[str, ...], sums: Sums, by: Sequence[str]) -> dict[str, Any]:
    named = {GROUPS[name]: value for name, value in zip(by, group, strict=True)}
    return {
        "object": "organization.usage.completions.result",
        "input_tokens": sums.counts["prompt_tokens"],
        "input_cached_tokens": sums.counts["cache_hit_tokens"],
        "output_tokens": sums.counts["output_tokens"],
        "input_audio_tokens": 0,
        "output_audio_tokens": 0,
        "num_model_requests": sums.requests,
        **dict.fromkeys(("project_id", "user_id", "api_key_id", "model", "batch", "service_tier")),
        **named,
    }


def _value(item: Settled | Adjusted, name: str) -> str:
    about = item.record if isinstance(item, Settled) else item.adjustment
    if name in ("model", "user", "tenant"):
        return str(getattr(about, name))
    if not isinstance(item, Settled):
        return ""
    record = item.record
    if name == "key":
        return record.key_id
    if name == "tier":
        tiers = {"memory": record.hit_memory_tokens, "store": record.hit_store_tokens}
        return "+".join(tier for tier, tokens in tiers.items() if tokens) or "none"
    return record.miss_reason.label


def _add(sums: dict[str, Decimal], currency: str, amount: Decimal) -> None:
    if currency or amount:
        sums[currency] = sums.get(currency, Decimal(0)) + amount


def _money(sums: dict[str, Decimal]) -> dict[str, str]:
    return {currency: format(amount, "f") for currency, amount in sorted(sums.items())}

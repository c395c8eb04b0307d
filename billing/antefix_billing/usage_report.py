"""Sums usage by tenant, model and day: tokens, money, and what the cache saved. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import Final

from antefix.errors import ConfigError
from antefix.miss_reason import MissReason
from antefix.text_table import text_table
from antefix.usage import Usage
from antefix_billing.adjustment import Adjustment
from antefix_billing.pricing import moment_of
from antefix_billing.pruned import Total
from antefix_billing.ratecard import RateCards
from antefix_billing.usage_record import UsageRecord

GROUPS = ("tenant", "user", "key_id", "model", "month", "day", "hour", "miss_reason")
GROUPS_BY_DEFAULT = ("tenant", "model", "day")
# The groups that summaries of pruned entries distinguish.
GROUPS_OF_PRUNED: Final = frozenset({"tenant", "model", "month"})


@dataclass(slots=True)
class Line:
    """The sums of one group. Amounts in different currencies are never added, so the currency is part of the group.

    prefix_volatile: requests whose client's prompts begin with text that changes each time.
    adjusted: what adjustments add to the price.  missed: how much more the misses cost than hits would have.
    """

    group: tuple[str, ...]
    currency: str
    requests: int = 0
    charged: int = 0
    prompt_tokens: int = 0
    cache_hit_tokens: int = 0
    cache_miss_tokens: int = 0
    output_tokens: int = 0
    prefix_volatile: int = 0
    price: Decimal = Decimal(0)
    saved: Decimal = Decimal(0)
    adjusted: Decimal = Decimal(0)
    missed: Decimal = Decimal(0)

    @property
    def hit_rate(self) -> float:
        return self.cache_hit_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def add_total(self, total: Total) -> None:
        """Add the sums of pruned entries, which lack the other fields."""
        self.requests += total.records
        self.charged += total.charged
        self.prompt_tokens += total.prompt_tokens
        self.cache_hit_tokens += total.cache_hit_tokens
        self.cache_miss_tokens += total.cache_miss_tokens
        self.output_tokens += total.output_tokens
        self.price += total.price
        self.saved += total.saved
        self.adjusted += total.adjusted

    def add(self, record: UsageRecord, missed: Decimal = Decimal(0)) -> None:
        self.missed += missed
        self.requests += 1
        self.charged += record.is_charged
        self.prompt_tokens += record.prompt_tokens
        self.cache_hit_tokens += record.cache_hit_tokens
        self.cache_miss_tokens += record.cache_miss_tokens
        self.output_tokens += record.output_tokens
        self.prefix_volatile += record.prefix_volatile
        self.price += record.price
        self.saved += record.saved


def summarize(
    records: Iterable[UsageRecord],
    by: Sequence[str] = GROUPS_BY_DEFAULT,
    *,
    cards: RateCards | None = None,
    adjustments: Iterable[Adjustment] = (),
    totals: Iterable[Total] = (),
) -> list[Line]:
    """Sums for each combination of `by`, sorted.  cards: rate cards used to price the misses.  totals: sums of pruned
    entries, used if all groups in `by` are among GROUPS_OF_PRUNED.

    Raises:  ConfigError: an unknown group.
    """
    if unknown := set(by) - set(GROUPS):
        raise ConfigError(f"a report groups by {', '.join(GROUPS)}, not by {', '.join(sorted(unknown))}")
    lines: dict[tuple[tuple[str, ...], str], Line] = {}
    for record in records:
        group = tuple(_value(record, name) for name in by)
        line = lines.setdefault((group, record.currency), Line(group=group, currency=record.currency))
        line.add(record, missed_cost(record, cards))
    for made in adjustments:
        group = tuple(_value_of_adjustment(made, name) for name in by)
        line = lines.setdefault((group, made.currency), Line(group=group, currency=made.currency))
        line.adjusted += made.amount
    for total in totals:
        group = tuple(str(getattr(total, name)) for name in by)
        lines.setdefault((group, total.currency), Line(group=group, currency=total.currency)).add_total(total)
    return [lines[key] for key in sorted(lines)]


def missed_cost(record: UsageRecord, cards: RateCards | None) -> Decimal:
    """How much more the prompt's misses cost than hits would have: the most that a cache could have saved."""
    if cards is None or not record.is_charged:
        return Decimal(0)
    prices = cards.quote(record.model, moment_of(record.started_us)).prices
    hits = Usage(prompt_tokens=record.prompt_tokens, cache_hit_tokens=record.prompt_tokens)
    misses = Usage(
        prompt_tokens=record.prompt_tokens,
        cache_hit_tokens=record.cache_hit_tokens,
        cache_write_tokens=record.cache_write_tokens,
        cache_write_1h_tokens=record.cache_write_1h_tokens,
    )
    return max(Decimal(0), prices.price(misses) - prices.price(hits))


# For each miss reason, the change that would have turned those misses into hits.
_REMEDIES: Final = {MissReason.EXPIRED: "a longer time to live", MissReason.EVICTED: "a larger store"}


def remedies(records: Iterable[UsageRecord], cards: RateCards | None) -> list[dict[str, str | int]]:
    """What a longer time to live and a larger store would have saved at most, by currency.

    The estimate is an upper bound: it counts all tokens from the first miss on, although later misses of the prompt
    may have other reasons.
    """
    sums: dict[tuple[MissReason, str], tuple[int, int, Decimal]] = {}
    for record in records:
        if record.miss_reason in _REMEDIES:
            key = (record.miss_reason, record.currency)
            requests, tokens, cost = sums.get(key, (0, 0, Decimal(0)))
            more = missed_cost(record, cards)
            sums[key] = (requests + 1, tokens + record.cache_miss_tokens, cost + more)
    return [
        {
            "remedy": _REMEDIES[reason],
            "miss_reason": reason.value,
            "requests": requests,
            "tokens": tokens,
            "saves_at_most": format(cost, "f"),
            "currency": currency,
        }
        for (reason, currency), (requests, tokens, cost) in sorted(sums.items())
    ]


def remedies_text(rows: Sequence[dict[str, str | int]], *, has_prices: bool) -> str:
    if not rows:
        return "no tokens that a longer time to live or a larger store would have saved"
    lines = []
    for row in rows:
        saved = f", {row['saves_at_most']} {row['currency']} at most" if has_prices else ""
        lines.append(f"{row['remedy']} would have saved {row['tokens']} tokens of {row['requests']} requests{saved}")
    return "\n".join(lines)


def as_json(lines: Sequence[Line], by: Sequence[str]) -> str:
    rows = []
    for line in lines:
        row = asdict(line)
        group = row.pop("group")
        for name in ("price", "saved", "adjusted", "missed"):
            row[name] = format(getattr(line, name), "f")
        rows.append({**dict(zip(by, group, strict=True)), **row, "hit_rate": round(line.hit_rate, 6)})
    return json.dumps(rows, indent=2)


def as_text(lines: Sequence[Line], by: Sequence[str]) -> str:
    """A table with aligned columns."""
    head = [
        *by,
        "requests",
        "prompt",
        "hit",
        "miss",
        "output",
        "hit %",
        "volatile",
        "price",
        "adjusted",
        "saved",
        "missed",
        "",
    ]
    rows = [
        [
            *line.group,
            str(line.requests),
            str(line.prompt_tokens),
            str(line.cache_hit_tokens),
            str(line.cache_miss_tokens),
            str(line.output_tokens),
            f"{100 * line.hit_rate:.2f}",
            str(line.prefix_volatile),
            format(line.price, "f"),
            format(line.adjusted, "f"),
            format(line.saved, "f"),
            format(line.missed, "f"),
            line.currency,
        ]
        for line in lines
    ]
    return text_table(head, rows, num_left=len(by))


_TIMES: Final = {"month": "%Y-%m", "day": "%Y-%m-%d", "hour": "%Y-%m-%dT%H:00Z"}


def _time_value(time_us: int, name: str) -> str:
    moment = moment_of(time_us)
    return moment.strftime(_TIMES[name])


def _value_of_adjustment(made: Adjustment, name: str) -> str:
    if name in _TIMES:
        return _time_value(made.created_us, name)
    return str(getattr(made, name, ""))


def _value(record: UsageRecord, name: str) -> str:
    if name in _TIMES:
        return _time_value(record.started_us, name)
    if name == "miss_reason":
        return record.miss_reason.label
    return str(getattr(record, name))

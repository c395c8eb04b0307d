"""What was used, by tenant, model and day: tokens, money, and what the cache saved. Pure but for the plot."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path

from antefix.errors import ConfigError
from antefix.text_table import text_table
from antefix_billing.pricing import moment_of
from antefix_billing.usage_record import UsageRecord

GROUPS = ("tenant", "user", "model", "day")
GROUPS_BY_DEFAULT = ("tenant", "model", "day")


@dataclass(slots=True)
class Line:
    """One group's sums. Currencies are never added to one another, so they are part of the group.

    prefix_volatile: requests whose client's prompts begin with something that changes.
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

    @property
    def hit_rate(self) -> float:
        return self.cache_hit_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def add(self, record: UsageRecord) -> None:
        self.requests += 1
        self.charged += record.is_charged
        self.prompt_tokens += record.prompt_tokens
        self.cache_hit_tokens += record.cache_hit_tokens
        self.cache_miss_tokens += record.cache_miss_tokens
        self.output_tokens += record.output_tokens
        self.prefix_volatile += record.prefix_volatile
        self.price += record.price
        self.saved += record.saved


def summarize(records: Iterable[UsageRecord], by: Sequence[str] = GROUPS_BY_DEFAULT) -> list[Line]:
    """Sums for each combination of `by`, sorted. Raises:  ConfigError: an unknown group."""
    if unknown := set(by) - set(GROUPS):
        raise ConfigError(f"a report groups by {', '.join(GROUPS)}, not by {', '.join(sorted(unknown))}")
    lines: dict[tuple[tuple[str, ...], str], Line] = {}
    for record in records:
        group = tuple(_value(record, name) for name in by)
        line = lines.setdefault((group, record.currency), Line(group=group, currency=record.currency))
        line.add(record)
    return [lines[key] for key in sorted(lines)]


def as_json(lines: Sequence[Line], by: Sequence[str]) -> str:
    rows = []
    for line in lines:
        row = asdict(line)
        group = row.pop("group")
        row["price"], row["saved"] = format(line.price, "f"), format(line.saved, "f")
        rows.append({**dict(zip(by, group, strict=True)), **row, "hit_rate": round(line.hit_rate, 6)})
    return json.dumps(rows, indent=2)


def as_text(lines: Sequence[Line], by: Sequence[str]) -> str:
    """A table with aligned columns."""
    head = [*by, "requests", "prompt", "hit", "miss", "output", "hit %", "volatile", "price", "saved", ""]
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
            format(line.saved, "f"),
            line.currency,
        ]
        for line in lines
    ]
    return text_table(head, rows, num_left=len(by))


def plot(records: Iterable[UsageRecord], path: Path) -> None:
    """Tokens a day as hit, miss and output, and money paid beside money saved.

    Raises:  ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as err:
        raise ConfigError("the plot needs matplotlib: pip install matplotlib") from err
    lines = summarize(records, by=("day",))
    currency = next((line.currency for line in lines if line.currency), "")
    days = sorted({line.group[0] for line in lines})
    sums = {day: [line for line in lines if line.group[0] == day] for day in days}
    figure = Figure(figsize=(9, 6), layout="constrained")
    tokens, money = figure.subplots(2, 1, sharex=True)
    bottom = [0] * len(days)
    for name in ("cache_hit_tokens", "cache_miss_tokens", "output_tokens"):
        heights = [sum(getattr(line, name) for line in sums[day]) for day in days]
        tokens.bar(range(len(days)), heights, bottom=bottom, label=name.replace("_", " "))
        bottom = [low + high for low, high in zip(bottom, heights, strict=True)]
    for offset, name in ((-0.2, "price"), (0.2, "saved")):
        # Heights of bars, not amounts: here a float is what the plot needs.
        heights = [float(sum(getattr(line, name) for line in sums[day] if line.currency == currency)) for day in days]
        money.bar([i + offset for i in range(len(days))], heights, width=0.4, label=name)
    tokens.set_ylabel("tokens")
    money.set_ylabel(currency or "money")
    for axes in (tokens, money):
        axes.legend()
    money.set_xticks(range(len(days)), days, rotation=45)
    figure.savefig(path)


def _value(record: UsageRecord, name: str) -> str:
    if name == "day":
        return moment_of(record.started_us).date().isoformat()
    return str(getattr(record, name))

"""Plots of usage over time: tokens, money, and why prompts missed. Uses the sums of `usage_report`, and matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from antefix.errors import ConfigError
from antefix.extras import needs
from antefix_billing.ratecard import RateCards
from antefix_billing.usage_record import UsageRecord
from antefix_billing.usage_report import Line, summarize

# Up to this span the plot has one bar per hour, beyond it one per day.
_BY_HOUR_US: Final = 3 * 24 * 3_600_000_000
_LABELS_MAX: Final = 24
_COUNTS: Final = ("cache_hit_tokens", "cache_miss_tokens", "output_tokens")


def plot(records: Sequence[UsageRecord], path: Path, *, cards: RateCards | None = None) -> None:
    """Plots tokens as hit, miss and output; money paid next to money saved; and miss tokens by reason or, with rate
    cards, how much more the misses cost than hits would have. Bars are hours for up to three days, otherwise days.

    Raises:  ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as err:
        raise ConfigError(needs("the plot", "matplotlib", "plots")) from err
    unit = _unit(records)
    lines = summarize(records, by=(unit, "miss_reason"), cards=cards)
    times = sorted({line.group[0] for line in lines})
    # One plot shows one currency: that of most requests.
    currencies = sorted({line.currency for line in lines if line.currency}, key=lambda c: -_requests(lines, c))
    currency = currencies[0] if currencies else ""
    figure = Figure(figsize=(9, 9), layout="constrained")
    tokens, money, misses = figure.subplots(3, 1, sharex=True)
    _stack(tokens, times, {name.replace("_", " "): [_sum(lines, time, name) for time in times] for name in _COUNTS})
    of_currency = [line for line in lines if line.currency == currency]
    for offset, name in ((-0.2, "price"), (0.2, "saved")):
        heights = [_sum(of_currency, time, name) for time in times]
        money.bar([i + offset for i in range(len(times))], heights, width=0.4, label=name)
    chosen, what = (of_currency, "missed") if cards is not None else (lines, "cache_miss_tokens")
    reasons = sorted({line.group[1] for line in chosen})
    by_reason = {r: [_sum([x for x in chosen if x.group[1] == r], time, what) for time in times] for r in reasons}
    _stack(misses, times, {reason or "none": heights for reason, heights in by_reason.items() if any(heights)})
    tokens.set_ylabel("tokens")
    money.set_ylabel(currency or "money")
    misses.set_ylabel(f"cost of misses, {currency}" if cards is not None else "miss tokens by reason")
    for axes in (tokens, money, misses):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    step = max(1, -(-len(times) // _LABELS_MAX))
    misses.set_xticks(range(0, len(times), step), times[::step], rotation=45, ha="right")
    figure.savefig(path)


def _unit(records: Sequence[UsageRecord]) -> str:
    starts = [record.started_us for record in records]
    return "hour" if starts and max(starts) - min(starts) <= _BY_HOUR_US else "day"


def _requests(lines: Sequence[Line], currency: str) -> int:
    return sum(line.requests for line in lines if line.currency == currency)


def _sum(lines: Sequence[Line], time: str, name: str) -> float:
    # A bar's height may be a float; it is not used as an amount of money.
    return float(sum(getattr(line, name) for line in lines if line.group[0] == time))


def _stack(axes: Any, times: Sequence[str], heights_by_name: dict[str, list[float]]) -> None:
    bottom = [0.0] * len(times)
    for name, heights in heights_by_name.items():
        axes.bar(range(len(times)), heights, bottom=bottom, label=name)
        bottom = [low + high for low, high in zip(bottom, heights, strict=True)]

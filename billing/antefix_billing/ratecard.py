"""What tokens cost: rate cards by model and time, read from TOML, and the price of a request. Decimal only.

Prices are per million tokens; a price times a count needs no rounding, so sums of records are exact to the last digit.
A card holds from `effective` until the model's next one. Peak hours are a calendar in UTC; a request is priced by when
it started. Cards never change once used: a new price is a new card.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from decimal import Decimal, InvalidOperation, localcontext
from pathlib import Path
from typing import Any, Final

from antefix.errors import ConfigError
from antefix.usage import Usage

_MILLION: Final = Decimal(1_000_000)
# Six digits of a price are six beyond the million: more would not be exact in the twelve that a ledger amount has.
PRICE_DIGITS_MAX: Final = 6
_WEEKDAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """Per million tokens. write: on top of `miss`, for prompt tokens newly stored. reasoning: instead of `output`."""

    hit: Decimal
    miss: Decimal
    write: Decimal
    output: Decimal
    reasoning: Decimal

    def price(self, used: Usage) -> Decimal:
        with localcontext(prec=50):
            return (
                self.hit * used.cache_hit_tokens
                + self.miss * used.cache_miss_tokens
                + self.write * used.cache_write_tokens
                + self.output * (used.output_tokens - used.reasoning_tokens)
                + self.reasoning * used.reasoning_tokens
            ) / _MILLION

    def saved(self, used: Usage) -> Decimal:
        """What the hits would have cost more as misses; never below zero."""
        with localcontext(prec=50):
            return max(Decimal(0), (self.miss - self.hit) * used.cache_hit_tokens / _MILLION)


@dataclass(frozen=True, slots=True, kw_only=True)
class Calendar:
    """Peak hours: on `weekdays` (0 is Monday) within any of `hours`, but not on `holidays`. UTC."""

    weekdays: frozenset[int]
    hours: tuple[tuple[time, time], ...]
    holidays: frozenset[date] = frozenset()

    def is_peak(self, moment: datetime) -> bool:
        moment = moment.astimezone(UTC)
        if moment.weekday() not in self.weekdays or moment.date() in self.holidays:
            return False
        return any(start <= moment.time() < end for start, end in self.hours)


@dataclass(frozen=True, slots=True, kw_only=True)
class RateCard:
    """Prices of some models from a time on. `version` stands in every record priced with it."""

    version: str
    models: tuple[str, ...]
    currency: str
    effective: datetime
    prices: Prices
    source: str = ""
    peak: Prices | None = None
    calendar: Calendar | None = None

    def at(self, moment: datetime) -> Prices:
        peak = self.peak is not None and self.calendar is not None and self.calendar.is_peak(moment)
        return self.peak if peak and self.peak is not None else self.prices


@dataclass(frozen=True, slots=True, kw_only=True)
class Quote:
    """A price with the card it came from; `version` says "/peak" where peak prices applied."""

    version: str
    currency: str
    prices: Prices


FREE: Final = Quote(
    version="",
    currency="",
    prices=Prices(hit=Decimal(0), miss=Decimal(0), write=Decimal(0), output=Decimal(0), reasoning=Decimal(0)),
)


class RateCards:
    """All cards, looked up by model and moment."""

    def __init__(self, cards: Sequence[RateCard] = ()) -> None:
        """Raises:  ConfigError: two cards with one version, or for one model at one time."""
        self._by_model: dict[str, list[RateCard]] = {}
        versions: set[str] = set()
        for card in sorted(cards, key=lambda c: c.effective):
            if card.version in versions:
                raise ConfigError(f"rate card {card.version} is there twice")
            versions.add(card.version)
            for model in card.models:
                row = self._by_model.setdefault(model, [])
                if row and row[-1].effective == card.effective:
                    raise ConfigError(f"rate cards {row[-1].version} and {card.version}: both for {model} at one time")
                row.append(card)

    def quote(self, model: str, moment: datetime) -> Quote:
        """The prices in force; "*" stands for models without a card; without either everything is free."""
        for name in (model, "*"):
            card = next((c for c in reversed(self._by_model.get(name, ())) if c.effective <= moment), None)
            if card is not None:
                prices = card.at(moment)
                suffix = "/peak" if prices is card.peak else ""
                return Quote(version=card.version + suffix, currency=card.currency, prices=prices)
        return FREE

    @property
    def models(self) -> tuple[str, ...]:
        return tuple(sorted(self._by_model))


def load_cards(paths: Sequence[str | Path]) -> RateCards:
    """Raises:  ConfigError: a file does not parse or does not make sense; the message says where."""
    cards: list[RateCard] = []
    for path in paths:
        try:
            # tomllib gives floats; prices must be strings, or their digits are already lost.
            tables = tomllib.loads(Path(path).read_text())
        except (OSError, tomllib.TOMLDecodeError) as err:
            raise ConfigError(f"rate cards {path}: {err}") from err
        try:
            calendars = {name: _calendar(table) for name, table in _take(tables, "calendar", {}).items()}
            cards += [_card(table, calendars) for table in _take(tables, "card", [])]
            _refuse_rest(tables)
        except (ConfigError, ValueError, TypeError, KeyError, AttributeError) as err:
            raise ConfigError(f"rate cards {path}: {err}") from err
    return RateCards(cards)


def _card(table: dict[str, Any], calendars: dict[str, Calendar]) -> RateCard:
    version = str(_take(table, "version"))
    try:
        effective = _take(table, "effective")
        if not isinstance(effective, datetime) or effective.tzinfo is None:
            raise ConfigError("effective must be a date and time with a zone, like 2026-09-10T00:00:00Z")
        prices = _prices(_take(table, "prices"))
        peak_table = _take(table, "peak", None)
        calendar = calendars[str(_take(peak_table, "calendar"))] if peak_table else None
        card = RateCard(
            version=version,
            models=tuple(str(model) for model in _take(table, "models")),
            currency=str(_take(table, "currency")),
            effective=effective.astimezone(UTC),
            source=str(_take(table, "source", "")),
            prices=prices,
            peak=_prices(peak_table) if peak_table else None,
            calendar=calendar,
        )
        _refuse_rest(table)
    except KeyError as err:
        raise ConfigError(f"card {version}: no calendar {err}") from err
    except ConfigError as err:
        raise ConfigError(f"card {version}: {err}") from err
    if not card.models or len(card.currency) != 3:
        raise ConfigError(f"card {version}: it needs models and a three-letter currency")
    return card


def _prices(table: dict[str, Any]) -> Prices:
    output = _price(table, "output")
    prices = Prices(
        hit=_price(table, "hit"),
        miss=_price(table, "miss"),
        write=_price(table, "write", "0"),
        output=output,
        reasoning=_price(table, "reasoning", format(output, "f")),
    )
    if prices.hit > prices.miss:
        raise ConfigError(f"a hit at {prices.hit} costs more than a miss at {prices.miss}")
    _refuse_rest(table)
    return prices


def _price(table: dict[str, Any], name: str, default: str | None = None) -> Decimal:
    value = _take(table, name, default) if default is not None else _take(table, name)
    if not isinstance(value, str):
        raise ConfigError(f'{name} must be a string of digits, like "0.15", so that no float touches it; is {value!r}')
    try:
        price = Decimal(value)
    except InvalidOperation as err:
        raise ConfigError(f"{name}: {value!r} is not a decimal number") from err
    exponent = price.as_tuple().exponent
    if not price.is_finite() or price < 0 or not isinstance(exponent, int) or -exponent > PRICE_DIGITS_MAX:
        raise ConfigError(f"{name} must be at least 0, with {PRICE_DIGITS_MAX} decimals at most; is {value!r}")
    return price


def _calendar(table: dict[str, Any]) -> Calendar:
    weekdays = frozenset(_WEEKDAYS.index(str(day)) for day in _take(table, "weekdays"))
    hours = tuple(_hours(str(text)) for text in _take(table, "hours"))
    holidays = frozenset(_take(table, "holidays", []))
    if not weekdays or not hours or not all(isinstance(day, date) for day in holidays):
        raise ConfigError("a calendar needs weekdays (mon to sun), hours and holidays as dates")
    _refuse_rest(table)
    return Calendar(weekdays=weekdays, hours=hours, holidays=holidays)


def _hours(text: str) -> tuple[time, time]:
    start, _, end = text.partition("-")
    span = time.fromisoformat(start), time.fromisoformat(end)
    if span[0] >= span[1]:
        raise ConfigError(f"hours {text!r} must go up; cut those that pass midnight in two")
    return span


_MISSING: Final = object()


def _take(table: dict[str, Any], name: str, default: Any = _MISSING) -> Any:
    value = table.pop(name, default)
    if value is _MISSING:
        raise ConfigError(f"{name} is missing")
    return value


def _refuse_rest(table: dict[str, Any]) -> None:
    """What is not known is an error: a misspelt price must not become a free token."""
    if table:
        raise ConfigError(f"unknown names: {', '.join(sorted(table))}")

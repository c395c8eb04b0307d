"""The prices of tokens: rate cards by model and time, read from TOML, and the price of a request. Decimal only.

Prices are per million tokens; a price times a count needs no rounding, so sums of records are exact to the last digit.
A card holds from `effective` until the model's next card. Peak hours are a calendar in UTC. The start of a request
decides which card and which hours apply to it. A rate card never changes once it was used: a new price is a new card.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any, Final

from antefix.checked_files import parse_toml, read_toml
from antefix.checked_table import Table
from antefix.errors import ConfigError
from antefix.usage import Usage

_MILLION: Final = Decimal(1_000_000)
# A price has at most six decimals. Divided by a million tokens that gives the twelve decimals of a ledger amount, so
# amounts are exact.
PRICE_DIGITS_MAX: Final = 6
# The highest price per million tokens. With fifty digits of precision, a price times any count is still exact.
PRICE_MAX: Final = 10**15
_WEEKDAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """Prices per million tokens.  write: charged on top of `miss`, for prompt tokens newly stored.  reasoning: charged
    instead of `output`.

    write_1h: charged instead of `write`, for tokens to be kept for an hour or longer; None: the same as `write`.
    """

    hit: Decimal
    miss: Decimal
    write: Decimal
    output: Decimal
    reasoning: Decimal
    write_1h: Decimal | None = None

    def price(self, used: Usage) -> Decimal:
        with localcontext(prec=50):
            return (
                self.hit * used.cache_hit_tokens
                + self.miss * used.cache_miss_tokens
                + self.write * (used.cache_write_tokens - used.cache_write_1h_tokens)
                + (self.write if self.write_1h is None else self.write_1h) * used.cache_write_1h_tokens
                + self.output * (used.output_tokens - used.reasoning_tokens)
                + self.reasoning * used.reasoning_tokens
            ) / _MILLION

    def saved(self, used: Usage) -> Decimal:
        """How much more the hits would have cost as misses; never below zero."""
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
    """Prices of some models from a certain time on. Every record priced with this card contains its `version`.

    rerate: if the card is added after its `effective` time, records of requests since that time are to be priced again.
    """

    version: str
    models: tuple[str, ...]
    currency: str
    effective: datetime
    prices: Prices
    source: str = ""
    peak: Prices | None = None
    calendar: Calendar | None = None
    rerate: bool = False

    def at(self, moment: datetime) -> Prices:
        peak = self.peak is not None and self.calendar is not None and self.calendar.is_peak(moment)
        return self.peak if peak and self.peak is not None else self.prices


@dataclass(frozen=True, slots=True, kw_only=True)
class Quote:
    """Prices with the card that they came from. `version` ends in "/peak" if peak prices applied."""

    version: str
    currency: str
    prices: Prices


FREE: Final = Quote(
    version="",
    currency="",
    prices=Prices(hit=Decimal(0), miss=Decimal(0), write=Decimal(0), output=Decimal(0), reasoning=Decimal(0)),
)


class RateCards:
    """All rate cards, looked up by model and time."""

    def __init__(self, cards: Sequence[RateCard] = ()) -> None:
        """Raises:  ConfigError: two cards have the same version, or hold for one model from the same time."""
        self._by_model: dict[str, list[RateCard]] = {}
        versions: set[str] = set()
        for card in sorted(cards, key=lambda c: c.effective):
            if card.version in versions:
                raise ConfigError(f"the rate card version {card.version} is given twice")
            versions.add(card.version)
            for model in card.models:
                row = self._by_model.setdefault(model, [])
                if row and row[-1].effective == card.effective:
                    raise ConfigError(
                        f"rate cards {row[-1].version} and {card.version} both apply to {model} from the same time"
                    )
                row.append(card)

    def quote(self, model: str, moment: datetime) -> Quote:
        """The prices in force. A model without a card uses the card of "*"; without that either, everything is free."""
        card = self.card(model, moment)
        if card is None:
            return FREE
        prices = card.at(moment)
        suffix = "/peak" if prices is card.peak else ""
        return Quote(version=card.version + suffix, currency=card.currency, prices=prices)

    def card(self, model: str, moment: datetime) -> RateCard | None:
        """The card in force."""
        for name in (model, "*"):
            card = next((c for c in reversed(self._by_model.get(name, ())) if c.effective <= moment), None)
            if card is not None:
                return card
        return None

    def begins(self, model: str) -> list[datetime]:
        """The times from which any card for this model holds."""
        return [card.effective for name in (model, "*") for card in self._by_model.get(name, ())]

    @property
    def models(self) -> tuple[str, ...]:
        return tuple(sorted(self._by_model))


def load_cards(paths: Sequence[str | Path]) -> RateCards:
    """Read rate cards from files.  Raises:  ConfigError: a file does not parse, or a card is invalid; the message says
    where.
    """
    return RateCards(
        [card for path in paths for card in _cards_of(read_toml(path, "rate cards"), f"rate cards {path}")]
    )


def parse_cards(texts: Mapping[str, str]) -> RateCards:
    """Read rate cards from the texts of files, by file name.  Raises:  ConfigError: as `load_cards`."""
    wheres = {f"rate cards {name}": text for name, text in texts.items()}
    return RateCards([card for where, text in wheres.items() for card in _cards_of(parse_toml(text, where), where)])


def _cards_of(values: dict[str, Any], where: str) -> list[RateCard]:
    # tomllib reads unquoted prices as floats, which have lost digits already. So prices must be strings.
    file = Table(values, where)
    calendars = {name: _calendar(table) for name, table in file.named_children("calendar").items()}
    cards = [_card(table, calendars) for table in file.children("card")]
    file.close()
    return cards


def _card(table: Table, calendars: dict[str, Calendar]) -> RateCard:
    version = table.text("version")
    table.where += f" ({version})"
    effective = table.take("effective")
    if not isinstance(effective, datetime) or effective.tzinfo is None:
        raise table.wrong("effective", "a date and time with a zone, like 2026-09-10T00:00:00Z", effective)
    peak = table.child("peak")
    calendar = None if peak is None else peak.one_of("calendar", tuple(calendars))
    prices = table.child("prices")
    if prices is None:
        raise ConfigError(f"{table.where}: prices is missing")
    card = RateCard(
        version=version,
        models=table.texts("models"),
        currency=table.text("currency"),
        effective=_in_utc(table, effective),
        source=table.text("source", ""),
        rerate=table.boolean("rerate", False),
        prices=_prices(prices),
        peak=None if peak is None else _prices(peak),
        calendar=None if calendar is None else calendars[calendar],
    )
    table.close()
    if not card.models or not (len(card.currency) == 3 and card.currency.isascii() and card.currency.isalpha()):
        raise ConfigError(f"{table.where}: a rate card needs models and a three-letter currency")
    return card


def _in_utc(table: Table, effective: datetime) -> datetime:
    try:
        return effective.astimezone(UTC)
    except (OverflowError, ValueError) as err:
        raise table.wrong("effective", "a date of the years 1 to 9999 in UTC", effective) from err


def _prices(table: Table) -> Prices:
    output = _price(table, "output")
    prices = Prices(
        hit=_price(table, "hit"),
        miss=_price(table, "miss"),
        write=_price(table, "write", "0"),
        output=output,
        reasoning=_price(table, "reasoning", format(output, "f")),
        write_1h=_price(table, "write_1h") if table.has("write_1h") else None,
    )
    if prices.hit > prices.miss:
        raise ConfigError(f"{table.where}: a hit at {prices.hit} costs more than a miss at {prices.miss}")
    table.close()
    return prices


def _price(table: Table, name: str, default: str | None = None) -> Decimal:
    return table.decimal(name, default, below=PRICE_MAX, decimals=PRICE_DIGITS_MAX)


def _calendar(table: Table) -> Calendar:
    days = table.texts("weekdays")
    if unknown := [day for day in days if day not in _WEEKDAYS]:
        raise table.wrong("weekdays", f"a list of {', '.join(_WEEKDAYS)}", unknown[0])
    hours = tuple(_hours(table, text) for text in table.texts("hours"))
    holidays = table.take("holidays", [])
    if not isinstance(holidays, list) or not all(type(day) is date for day in holidays):
        raise table.wrong("holidays", "a list of dates, such as 2026-12-25", holidays)
    if not days or not hours:
        raise ConfigError(f"{table.where}: a calendar needs weekdays (mon to sun) and hours")
    table.close()
    return Calendar(weekdays=frozenset(_WEEKDAYS.index(day) for day in days), hours=hours, holidays=frozenset(holidays))


def _hours(table: Table, text: str) -> tuple[time, time]:
    start, _, end = text.partition("-")
    try:
        span = time.fromisoformat(start), time.fromisoformat(end)
        goes_up = span[0] < span[1]
    except (ValueError, TypeError) as err:  # TypeError: one of the two times has a time zone and the other has none
        raise table.wrong("hours", 'a list of spans like "09:00-17:30", in UTC', text) from err
    if not goes_up or span[0].tzinfo is not None:
        raise ConfigError(
            f"{table.where}: hours {text!r} must end after they begin, in UTC; split hours that pass midnight in two"
        )
    return span

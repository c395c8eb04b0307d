"""Finds which records that are already priced would be priced differently by new rate cards. This module has no side
effects; it only reads the ledger.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal

from antefix.errors import ConfigError
from antefix_billing.ledger import Ledger
from antefix_billing.ledger_files import read_settled, sequence_before
from antefix_billing.pricing import moment_of, priced
from antefix_billing.ratecard import RateCard, RateCards
from antefix_billing.usage_record import UsageRecord

_BEGINNING = datetime(1, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangedTime:
    """A span of time, from `begin` to before `end`, in which another card holds for a model.  card: the new card, or
    None if there is none.
    """

    model: str
    begin: datetime
    end: datetime
    card: RateCard | None

    def has(self, record: UsageRecord, moment: datetime) -> bool:
        return record.model == self.model and self.begin <= moment < self.end


def changed_times(old: RateCards, new: RateCards, models: Iterable[str], now: datetime) -> list[ChangedTime]:
    """For each model, the spans before `now` in which the old and the new cards differ."""
    found = []
    for model in models:
        begins = sorted({_BEGINNING, *old.begins(model), *new.begins(model)})
        for begin, end in zip(begins, [*begins[1:], now], strict=True):
            if begin < now and not _alike(old.card(model, begin), new.card(model, begin)):
                found.append(ChangedTime(model=model, begin=begin, end=min(end, now), card=new.card(model, begin)))
    return found


def affected(records: Iterable[UsageRecord], times: Iterable[ChangedTime]) -> Iterator[tuple[UsageRecord, ChangedTime]]:
    """The records of requests that started in one of these spans of time."""
    spans = list(times)
    for record in records:
        moment = moment_of(record.started_us)
        for span in spans:
            if span.has(record, moment):
                yield record, span


def _alike(one: RateCard | None, other: RateCard | None) -> bool:
    """Whether both cards give a request the same price under the same version name."""
    if one is None or other is None:
        return one is other
    return _terms(one) == _terms(other)


def _terms(card: RateCard) -> tuple[object, ...]:
    return (card.version, card.currency, card.prices, card.peak, card.calendar)


def entry_before(ledger: Ledger, times: list[ChangedTime]) -> int:
    """The number of an entry that precedes all records of these spans."""
    return sequence_before(ledger.directory, max(0.0, min(span.begin for span in times).timestamp()))


def refuse_priced(ledger: Ledger, after: int, times: list[ChangedTime], *, priced_by: RateCards | None = None) -> None:
    """Refuse new cards that would change the price of existing records.

    priced_by: records that these cards priced are left out.
    Raises:  ConfigError: records in these spans are already priced, and the new card does not ask for a re-rating.
    """
    counts: Counter[str] = Counter()
    firsts: dict[str, ChangedTime] = {}
    records = (item.record for item in read_settled(ledger.directory, after=after))
    for record, span in affected(records, times):
        if priced_by is not None and _costs(priced(record, priced_by)) == _costs(record):
            continue
        if span.card is None or not span.card.rerate:
            counts[record.model] += 1
            firsts.setdefault(record.model, span)
    for model, span in firsts.items():
        what = f"rate card {span.card.version}" if span.card is not None else "no rate card"
        raise ConfigError(
            f"{what} would apply to {model} from {span.begin.isoformat()} on, but {counts[model]} records since "
            "then are priced already: give the card a later `effective`, or set `rerate = true` in it to price "
            "them again"
        )


def _costs(record: UsageRecord) -> tuple[str, str, Decimal]:
    return record.rate_card, record.currency, record.price


def models_of(ledger: Ledger) -> set[str]:
    return {item.record.model for item in read_settled(ledger.directory)}

"""What other rate cards would change of records that are priced already. Pure but for reading the ledger."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from antefix_billing.pricing import moment_of
from antefix_billing.ratecard import RateCard, RateCards
from antefix_billing.usage_record import UsageRecord

_BEGINNING = datetime(1, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangedTime:
    """From `begin` to before `end` another card holds for a model; `card`: the new one, None: none."""

    model: str
    begin: datetime
    end: datetime
    card: RateCard | None

    def has(self, record: UsageRecord, moment: datetime) -> bool:
        return record.model == self.model and self.begin <= moment < self.end


def changed_times(old: RateCards, new: RateCards, models: Iterable[str], now: datetime) -> list[ChangedTime]:
    """Where the two differ before `now`, for each of the models."""
    found = []
    for model in models:
        begins = sorted({_BEGINNING, *old.begins(model), *new.begins(model)})
        for begin, end in zip(begins, [*begins[1:], now], strict=True):
            if begin < now and not _alike(old.card(model, begin), new.card(model, begin)):
                found.append(ChangedTime(model=model, begin=begin, end=min(end, now), card=new.card(model, begin)))
    return found


def affected(records: Iterable[UsageRecord], times: Iterable[ChangedTime]) -> Iterator[tuple[UsageRecord, ChangedTime]]:
    """Records that started in one of these times."""
    spans = list(times)
    for record in records:
        moment = moment_of(record.started_us)
        for span in spans:
            if span.has(record, moment):
                yield record, span


def _alike(one: RateCard | None, other: RateCard | None) -> bool:
    """Whether both price a request alike, and say so under one name."""
    if one is None or other is None:
        return one is other
    return _terms(one) == _terms(other)


def _terms(card: RateCard) -> tuple[object, ...]:
    return (card.version, card.currency, card.prices, card.peak, card.calendar)

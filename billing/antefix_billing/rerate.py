"""Re-rating: adjustments that change the price of existing records to what the present cards say. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal

from antefix.errors import ConfigError
from antefix_billing.adjustment import Adjusted, Adjustment, AdjustmentKind
from antefix_billing.ledger_files import Settled
from antefix_billing.pricing import moment_of
from antefix_billing.ratecard import RateCards
from antefix_billing.usage_record import UsageRecord


def rerated(
    items: Iterable[Settled | Adjusted],
    cards: RateCards,
    *,
    chosen: Callable[[UsageRecord], bool],
    now_us: int,
    reason: str,
    reference: str = "",
    author: str = "",
) -> Iterator[Adjustment]:
    """Adjustments to append to one ledger so that each chosen record costs what the cards say. A second run yields
    none.

    items: all of the ledger, because earlier re-ratings and earlier attempts of a request count.
    Raises:  ConfigError: a card has another currency than a record that it would price.
    """
    settled, before, numbers = [], defaultdict[str, Decimal](Decimal), Counter[str]()
    for item in items:
        if isinstance(item, Settled):
            settled.append(item.record)
        elif item.adjustment.kind is AdjustmentKind.RERATE:
            before[item.adjustment.of_event] += item.adjustment.amount
            numbers[item.adjustment.of_event] += 1
    paid: dict[str, Decimal] = {}
    for record in settled:
        now_costs = record.price + before[record.event_id]
        paid_before = paid.get(record.key, record.paid_before)
        if not chosen(record):
            paid[record.key] = paid_before + now_costs
            continue
        quote = cards.quote(record.model, moment_of(record.started_us))
        price = max(Decimal(0), quote.prices.price(record) - paid_before) if record.is_charged else Decimal(0)
        paid[record.key] = paid_before + price
        if price == now_costs:
            continue
        currency = quote.currency or record.currency
        if record.currency and currency != record.currency:
            raise ConfigError(
                f"the new rate card {quote.version} is in {currency}, but record {record.event_id} is in "
                f"{record.currency}: give the amount back with `antefix usage adjust`, and bill the request "
                "elsewhere"
            )
        yield Adjustment(
            adjustment_id=f"{AdjustmentKind.RERATE}:{record.event_id}:{numbers[record.event_id] + 1}",
            kind=AdjustmentKind.RERATE,
            tenant=record.tenant,
            user=record.user,
            model=record.model,
            request_id=record.request_id,
            of_event=record.event_id,
            of_source=record.source,
            rate_card=quote.version,
            amount=price - now_costs,
            currency=currency,
            reason=reason,
            reference=reference,
            author=author,
            source=record.source,
            created_us=now_us,
        )

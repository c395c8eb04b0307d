"""Adds the price to a record. Pure."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from decimal import Decimal

from antefix.usage import Usage
from antefix_billing.ratecard import Quote, RateCards
from antefix_billing.usage_record import UsageRecord

_EPOCH_US = 1_000_000


def moment_of(time_us: int) -> datetime:
    """Unix microseconds as a UTC time."""
    return datetime.fromtimestamp(time_us // _EPOCH_US, tz=UTC)


def priced(record: UsageRecord, cards: RateCards) -> UsageRecord:
    """The record with its price, by the card in force when the request started. A record that is not charged costs
    nothing but still names the card.

    The price of earlier attempts is subtracted, so in all a request costs as much as its most expensive attempt.
    """
    quote = cards.quote(record.model, moment_of(record.started_us))
    charged = record.is_charged
    return dataclasses.replace(
        record,
        rate_card=quote.version,
        currency=quote.currency,
        price=max(Decimal(0), quote.prices.price(record) - record.paid_before) if charged else Decimal(0),
        saved=quote.prices.saved(record) if charged else Decimal(0),
    )


def worst_price(quote: Quote, *, prompt_tokens: int, output_tokens_max: int) -> Decimal:
    """The most that a request can cost: no hit, every prompt token written, the longest output at the higher of the two
    output prices.
    """
    usual = Usage(prompt_tokens=prompt_tokens, cache_write_tokens=prompt_tokens)
    prompts = (usual, dataclasses.replace(usual, cache_write_1h_tokens=prompt_tokens))
    output = Usage(output_tokens=output_tokens_max)
    reasoning = Usage(output_tokens=output_tokens_max, reasoning_tokens=output_tokens_max)
    return max(map(quote.prices.price, prompts)) + max(quote.prices.price(output), quote.prices.price(reasoning))

"""A record with its price on it. Pure."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from decimal import Decimal

from antefix_billing.ratecard import Quote, RateCards, TokenCounts
from antefix_billing.usage_record import UsageRecord

_EPOCH_US = 1_000_000


def moment_of(time_us: int) -> datetime:
    """Unix microseconds as a UTC time."""
    return datetime.fromtimestamp(time_us // _EPOCH_US, tz=UTC)


def counts_of(record: UsageRecord) -> TokenCounts:
    return TokenCounts(
        hit=record.cache_hit_tokens,
        miss=record.cache_miss_tokens,
        output=record.output_tokens,
        written=record.cache_write_tokens,
        reasoning=record.reasoning_tokens,
    )


def priced(record: UsageRecord, cards: RateCards) -> UsageRecord:
    """The record by the card in force when the request started; uncharged ends cost nothing but name the card.

    What earlier attempts were charged is taken off: the dearest attempt is the most that a request costs.
    """
    quote = cards.quote(record.model, moment_of(record.started_us))
    charged = record.is_charged
    counts = counts_of(record)
    return dataclasses.replace(
        record,
        rate_card=quote.version,
        currency=quote.currency,
        price=max(Decimal(0), quote.prices.price(counts) - record.paid_before) if charged else Decimal(0),
        saved=quote.prices.saved(counts) if charged else Decimal(0),
    )


def worst_price(quote: Quote, *, prompt_tokens: int, output_tokens_max: int) -> Decimal:
    """The most a request can cost: no hit, all of it written, the longest output at the dearer output price."""
    counts = TokenCounts(hit=0, miss=prompt_tokens, written=prompt_tokens, output=output_tokens_max)
    reasoning = TokenCounts(hit=0, miss=0, output=output_tokens_max, reasoning=output_tokens_max)
    prompt_only = TokenCounts(hit=0, miss=prompt_tokens, written=prompt_tokens, output=0)
    return max(quote.prices.price(counts), quote.prices.price(prompt_only) + quote.prices.price(reasoning))

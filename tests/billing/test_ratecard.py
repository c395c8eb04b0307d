from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from antefix.errors import ConfigError
from antefix.usage import Usage
from antefix_billing.pricing import priced, worst_price
from antefix_billing.ratecard import load_cards
from antefix_billing.usage_record import Status
from tests.billing.usage_records import record

DEPLOY = Path(__file__).parents[2] / "deploy" / "ratecards"
CARD = """
[[card]]
version = "v1"
models = ["m"]
currency = "USD"
effective = 2026-01-01T00:00:00Z
prices = { hit = "0.01", miss = "0.10", output = "0.40" }
"""


def at(text):
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@pytest.mark.parametrize(
    ("model", "moment", "version", "hit", "miss", "output"),
    [
        ("deepseek-v4-flash", "2026-07-01T02:00", "deepseek-v4-flash/2026-04-26", "0.0028", "0.14", "0.28"),
        ("deepseek-v4-flash", "2026-08-16T15:59:59", "deepseek-v4-flash/2026-04-26", "0.0028", "0.14", "0.28"),
        ("deepseek-v4-flash", "2026-08-16T16:00", "deepseek-v4-flash/2026-08-16", "0.007", "0.22", "0.66"),
        # This day is a Saturday. Peak prices apply every day in August, but only on workdays from September 10 on.
        ("deepseek-v4-flash", "2026-08-22T02:00", "deepseek-v4-flash/2026-08-16/peak", "0.014", "0.44", "1.32"),
        ("deepseek-flash", "2026-09-12T02:00", "deepseek-flash/2026-09-10", "0.003", "0.15", "0.60"),
        ("deepseek-flash", "2026-09-11T02:00", "deepseek-flash/2026-09-10/peak", "0.006", "0.30", "1.20"),
        ("deepseek-flash", "2026-09-11T04:00", "deepseek-flash/2026-09-10", "0.003", "0.15", "0.60"),
        ("deepseek-flash", "2026-10-01T02:00", "deepseek-flash/2026-09-10", "0.003", "0.15", "0.60"),
        ("deepseek-v4-pro", "2026-09-11T09:59:59", "deepseek-v4-pro/2026-09-10/peak", "0.044", "1.32", "3.96"),
        ("deepseek-v4-pro", "2026-06-01T00:00", "deepseek-v4-pro/2026-05-22", "0.003625", "0.435", "0.87"),
    ],
)
def test_deepseeks_cards_price_by_model_time_and_peak_hours(model, moment, version, hit, miss, output):
    quote = load_cards([DEPLOY / "deepseek.toml"]).quote(model, at(moment))
    assert quote.version == version
    assert (quote.prices.hit, quote.prices.miss, quote.prices.output) == (Decimal(hit), Decimal(miss), Decimal(output))


def test_a_model_without_a_card_takes_the_default_one_and_without_that_is_free():
    cards = load_cards([DEPLOY / "example.toml"])
    assert cards.quote("unheard-of", at("2026-06-01")).version == "default/2026-01"
    assert load_cards([DEPLOY / "deepseek.toml"]).quote("unheard-of", at("2026-06-01")).version == ""
    assert cards.quote("antefix-tiny", at("2025-12-31")).version == ""


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('"0.10"', "0.10", "string"),
        ('"0.10"', '"-1"', "at least 0"),
        ('"0.10"', '"0.1234567"', "6 decimals"),
        ('"0.10"', '"NaN"', "at least 0"),
        ('"0.10"', '"ten"', "string of digits"),
        ('"0.01"', '"0.11"', "costs more than a miss"),
        ("miss =", "mis =", "miss is missing"),
        ("output =", 'outptu = "1", output =', "unknown names: outptu"),
        ("2026-01-01T00:00:00Z", "2026-01-01T00:00:00", "zone"),
        ('"USD"', '"dollars"', "currency"),
        ('["m"]', "[]", "models"),
        ("[[card]]", "[card]", "rate cards"),
        (
            "prices =",
            'peak = { calendar = "none", hit = "1", miss = "1", output = "1" }\nprices =',
            "calendar must be one of",
        ),
    ],
)
def test_a_card_that_makes_no_sense_is_refused(tmp_path, old, new, complaint):
    path = tmp_path / "cards.toml"
    path.write_text(CARD.replace(old, new))
    with pytest.raises(ConfigError, match=complaint):
        load_cards([path])


def test_two_cards_for_one_model_and_moment_are_refused(tmp_path):
    path = tmp_path / "cards.toml"
    path.write_text(CARD + CARD.replace("v1", "v2"))
    with pytest.raises(ConfigError, match="from the same time"):
        load_cards([path])


COUNTS = st.integers(0, 1 << 32)


def used(*, hit, miss, output, written, reasoning):
    return Usage(
        prompt_tokens=hit + miss,
        cache_hit_tokens=hit,
        cache_write_tokens=written,
        output_tokens=output,
        reasoning_tokens=reasoning,
    )


@given(hit=COUNTS, miss=COUNTS, output=COUNTS, data=st.data())
def test_prices_are_exact_and_additive(hit, miss, output, data):
    prices = load_cards([DEPLOY / "example.toml"]).quote("antefix-tiny", at("2026-06-01")).prices
    written, reasoning = data.draw(st.integers(0, miss)), data.draw(st.integers(0, output))
    counts = used(hit=hit, miss=miss, output=output, written=written, reasoning=reasoning)
    millionths = 10_000 * hit + 100_000 * miss + 25_000 * written + 400_000 * (output - reasoning) + 300_000 * reasoning
    assert prices.price(counts) == Decimal(millionths).scaleb(-12)
    assert prices.saved(counts) == Decimal(90_000 * hit).scaleb(-12)


@given(hit=st.integers(0, 10_000), miss=st.integers(0, 10_000), output=st.integers(0, 1000), data=st.data())
def test_no_request_costs_more_than_its_worst_price(hit, miss, output, data):
    quote = load_cards([DEPLOY / "example.toml"]).quote("antefix-tiny", at("2026-06-01"))
    counts = used(
        hit=hit,
        miss=miss,
        output=output,
        written=data.draw(st.integers(0, miss)),
        reasoning=data.draw(st.integers(0, output)),
    )
    assert quote.prices.price(counts) <= worst_price(quote, prompt_tokens=hit + miss, output_tokens_max=output)


def test_what_was_done_is_paid_and_of_what_we_broke_only_what_was_given():
    cards = load_cards([DEPLOY / "example.toml"])
    cancelled = priced(record(status=Status.CANCELLED, price=Decimal(0)), cards)
    nothing = {"output_tokens": 0, "reasoning_tokens": 0, "price": Decimal(0)}
    failed = priced(record(status=Status.FAILED, **nothing), cards)
    broken = priced(record(status=Status.CRASHED, price=Decimal(0)), cards)
    again = priced(record(attempt=2, paid_before=broken.price, price=Decimal(0)), cards)
    assert cancelled.price == Decimal("0.00001248") and cancelled.saved == Decimal("0.00001152")
    assert failed.price == 0 and failed.rate_card == "antefix-tiny/2026-01"
    assert broken.price == cancelled.price and (again.price, again.paid) == (0, broken.price)

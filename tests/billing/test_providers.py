"""The usual cost formulas applied to our usage fields: each token is billed once under every provider's rule."""

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from antefix_billing.providers import chat_usage, messages_usage, responses_usage
from tests.billing.usage_records import record

# Plausible prices. Under Anthropic's rule a written token costs 1.25 times an input token.
HIT, MISS, OUT = Fraction(3, 100), Fraction(7, 10), Fraction(11, 10)


@st.composite
def records(draw):
    hit, miss, output = draw(st.integers(0, 10**7)), draw(st.integers(0, 10**7)), draw(st.integers(0, 10**6))
    return record(
        hit=hit,
        miss=miss,
        output_tokens=output,
        cache_write_tokens=draw(st.integers(0, miss)),
        reasoning_tokens=draw(st.integers(0, output)),
    )


def right(r, *, write=MISS):
    unwritten = r.cache_miss_tokens - r.cache_write_tokens
    return HIT * r.cache_hit_tokens + MISS * unwritten + write * r.cache_write_tokens + OUT * r.output_tokens


@given(records())
def test_deepseeks_formula_bills_each_token_once(r):
    usage = chat_usage(r)
    cost = HIT * usage["prompt_cache_hit_tokens"] + MISS * usage["prompt_cache_miss_tokens"]
    assert cost + OUT * usage["completion_tokens"] == right(r)
    assert usage["prompt_cache_hit_tokens"] + usage["prompt_cache_miss_tokens"] == usage["prompt_tokens"]


@given(records())
def test_openais_formula_bills_each_token_once(r):
    usage = chat_usage(r)
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    cost = MISS * (usage["prompt_tokens"] - cached) + HIT * cached + OUT * usage["completion_tokens"]
    assert cost == right(r)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    # Reasoning tokens are part of completion_tokens. A formula that adds them on top is wrong for every provider.
    assert usage["completion_tokens_details"]["reasoning_tokens"] <= usage["completion_tokens"]


@given(records())
def test_the_responses_formula_bills_each_token_once(r):
    usage = responses_usage(r)
    cached = usage["input_tokens_details"]["cached_tokens"]
    written = usage["input_tokens_details"]["cache_write_tokens"]
    plain = MISS * (usage["input_tokens"] - cached) + HIT * cached + OUT * usage["output_tokens"]
    assert plain == right(r)
    # Models that bill written tokens separately subtract them from the uncached tokens, as with cached tokens.
    apart = MISS * (usage["input_tokens"] - cached - written) + HIT * cached + MISS * Fraction(5, 4) * written
    assert apart + OUT * usage["output_tokens"] == right(r, write=MISS * Fraction(5, 4))


@given(records())
def test_anthropics_formula_bills_each_token_once(r):
    usage = messages_usage(r)
    write = MISS * Fraction(5, 4)
    cost = (
        MISS * usage["input_tokens"]
        + write * usage["cache_creation_input_tokens"]
        + HIT * usage["cache_read_input_tokens"]
        + OUT * usage["output_tokens"]
    )
    assert cost == right(r, write=write)
    by_lifetime = usage["cache_creation"]
    assert sum(by_lifetime.values()) == usage["cache_creation_input_tokens"]


@given(records())
def test_a_library_that_normalises_between_rules_keeps_the_sum(r):
    """What gateways do: Anthropic's exclusive fields into OpenAI's inclusive ones; the prompt is the same."""
    usage, chat = messages_usage(r), chat_usage(r)
    inclusive = sum(usage[name] for name in ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens"))
    assert inclusive == chat["prompt_tokens"] == responses_usage(r)["input_tokens"]
    assert usage["cache_read_input_tokens"] == chat["prompt_tokens_details"]["cached_tokens"]

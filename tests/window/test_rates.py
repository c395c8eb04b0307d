"""Speeds are learnt from measured times, with fixed cost and slope kept apart."""

from __future__ import annotations

import math
import random

import pytest

from antefix.errors import InternalError
from antefix.linear_law import LinearLaw
from antefix.window import Rates
from antefix.window.rates import RatePriors


def test_priors_hold_until_something_is_measured() -> None:
    rates = Rates(RatePriors(prefill_tokens_per_s=1_000, prefill_fixed_s=0.5, load_bytes_per_s=1e9, load_fixed_s=0.25))
    assert rates.prefill_s(1_000, context=0) == pytest.approx(1.5)
    assert rates.load_s("disk", 10**9) == pytest.approx(1.25)
    assert rates.replay_s(1_000, context=0) == pytest.approx(1.5)


def test_nothing_costs_nothing() -> None:
    assert Rates().prefill_s(0, context=5) == Rates().load_s("disk", 0) == Rates().replay_s(0, context=0) == 0.0


def test_fixed_cost_and_rate_are_told_apart() -> None:
    rates = Rates()
    rng = random.Random(1)
    for _ in range(300):
        nbytes = int(2 ** rng.uniform(18, 28))
        rates.observe_load("disk", nbytes, (0.01 + nbytes / 2e9) * rng.uniform(0.95, 1.05))
    assert rates.load_s("disk", 1_000) == pytest.approx(0.01, rel=0.1)
    assert rates.load_bytes_per_s("disk") == pytest.approx(2e9, rel=0.1)


def test_growth_with_context_is_learnt() -> None:
    rates = Rates()
    rng = random.Random(2)

    def true_s(tokens: int, context: int) -> float:
        return 0.02 + tokens / 5_000 + tokens * (context + tokens / 2) * 2e-9

    for _ in range(400):
        tokens, context = int(2 ** rng.uniform(7, 15)), int(2 ** rng.uniform(7, 20))
        rates.observe_prefill(tokens, context=context, seconds=true_s(tokens, context) * rng.uniform(0.9, 1.1))
    for tokens, context in ((128, 1_000_000), (30_000, 0), (8_192, 500_000)):
        assert rates.prefill_s(tokens, context=context) == pytest.approx(true_s(tokens, context), rel=0.15)


def test_a_machine_that_slows_down_is_believed_within_a_hundred_observations() -> None:
    rates = Rates()
    for _ in range(200):
        rates.observe_prefill(1_000, context=0, seconds=0.1)
    for _ in range(100):
        rates.observe_prefill(1_000, context=0, seconds=0.4)
    assert rates.prefill_s(1_000, context=0) == pytest.approx(0.4, rel=0.2)


def test_after_short_prefills_that_waited_a_long_one_is_not_thought_to_be_free() -> None:
    # A busy worker's turns: some 300 new tokens behind 4,000, and most of the time is waiting. The law then takes all
    # of it for fixed cost, and a cold run of everything would look cheaper than a hit that loads a checkpoint.
    draw, rates = random.Random(20261130), Rates()
    for _ in range(3):
        rates.observe_prefill(4288, context=0, seconds=0.9)
    for _ in range(300):
        tokens = draw.choice((64, 192, 256, 320, 448))
        rates.observe_prefill(tokens, context=4096 + draw.randrange(800), seconds=draw.uniform(0.2, 0.6))
    assert rates.prefill_s(4544, context=0) >= 0.9
    assert rates.prefill_s(320, context=4224) + 0.1 < rates.prefill_s(4544, context=0)


def test_a_worker_that_gets_busy_takes_no_replay_for_as_fast_as_before() -> None:
    rates = Rates()
    for _ in range(20):
        rates.observe_replay(190, context=3840, seconds=0.06)
        rates.observe_prefill(320, context=4224, seconds=0.1)
    assert rates.replay_s(190, context=3840) == pytest.approx(0.06, rel=0.2)
    for _ in range(20):
        rates.observe_prefill(320, context=4224, seconds=1.0)
    # Both run on the same thread.
    assert rates.replay_s(190, context=3840) == pytest.approx(0.6, rel=0.25)


def test_the_first_replay_on_a_slow_machine_does_not_count_twice() -> None:
    rates = Rates()
    for _ in range(3):
        rates.observe_replay(1000, context=4000, seconds=5.0)
        rates.observe_prefill(1000, context=4000, seconds=10.0)
    assert rates.replay_s(1000, context=4000) == pytest.approx(5.0, rel=0.3)


def test_tiers_are_kept_apart() -> None:
    rates = Rates()
    for _ in range(20):
        rates.observe_load("pool", 10**6, 0.001)
        rates.observe_load("disk", 10**6, 0.1)
    assert rates.load_s("disk", 10**6) > 50 * rates.load_s("pool", 10**6)


def test_times_that_no_clock_gives_change_nothing() -> None:
    law = LinearLaw((1.0, 2.0), (1.0, 1.0))
    before = law.coefficients
    for seconds in (0.0, -1.0, math.nan, math.inf):
        law.observe((1.0, 1.0), seconds)
    assert law.coefficients == before


def test_no_fit_is_ever_negative() -> None:
    law = LinearLaw((0.1, 0.1), (1.0, 1.0))
    for x in (1.0, 2.0, 3.0, 4.0):
        law.observe((1.0, x), 5.0 - x)
    assert min(law.coefficients) >= 0.0


def test_a_law_without_sense_is_refused() -> None:
    with pytest.raises(InternalError):
        LinearLaw((1.0,), (1.0, 2.0))
    with pytest.raises(InternalError):
        RatePriors(prefill_tokens_per_s=0)

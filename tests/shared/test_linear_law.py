"""A law of seconds keeps the shape that other sizes taught it, and follows the machine's speed with any size."""

from __future__ import annotations

import random

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from antefix.linear_law import LinearLaw

PRIOR, SCALES = (0.01, 1 / 2000, 0.0), (1.0, 2048.0, 2048.0 * 16384.0)
# Tokens and context of predictions that are compared.
SIZES = ((64, 0), (300, 4224), (4544, 0), (16_384, 0), (512, 60_000))
few = settings(max_examples=8, deadline=None, phases=(Phase.explicit, Phase.generate))
machines = st.builds(
    lambda fixed_s, tokens_per_s, slope: lambda n, c: fixed_s + n / tokens_per_s + n * (c + n / 2) * slope,
    st.floats(0.005, 0.1),
    st.floats(500, 50_000),
    st.floats(1e-10, 5e-9),
)


def features(tokens: int, context: int) -> tuple[float, float, float]:
    return 1.0, float(tokens), float(tokens) * (context + tokens / 2)


def drawn(draw: random.Random) -> tuple[int, int]:
    return int(2 ** draw.uniform(6, 14.5)), int(2 ** draw.uniform(7, 17))


def after_mixed(machine, draw: random.Random, noise: float = 0.0) -> LinearLaw:
    law = LinearLaw(PRIOR, SCALES)
    for _ in range(150):
        size = drawn(draw)
        law.observe(features(*size), machine(*size) * draw.uniform(1 - noise, 1 + noise))
    return law


@few
@given(machine=machines, seed=st.integers(0, 99), size=st.sampled_from(SIZES), times=st.sampled_from((1 / 3, 1.0, 3.0)))
def test_with_one_size_only_other_sizes_keep_their_shape_at_the_present_level(machine, seed, size, times) -> None:
    draw = random.Random(seed)
    law = after_mixed(machine, draw, noise=0.1)
    for _ in range(200):
        law.observe(features(*size), times * machine(*size) * draw.uniform(0.9, 1.1))
    for other in SIZES:
        off = law.seconds(features(*other)) / (times * machine(*other))
        assert 1 / 1.6 < off < 1.6, other


@few
@given(
    machine=machines, seed=st.integers(0, 99), times=st.sampled_from((1 / 3, 3.0)), size=st.sampled_from((None, *SIZES))
)
def test_a_machine_that_changes_its_speed_is_followed_within_eight_observations(machine, seed, times, size) -> None:
    draw = random.Random(seed)
    law = after_mixed(machine, draw)
    for _ in range(8):
        one = size or drawn(draw)
        law.observe(features(*one), times * machine(*one))
    for other in SIZES:
        off = law.seconds(features(*other)) / (times * machine(*other))
        assert 1 / 1.6 < off < 1.6, other


@few
@given(
    seen=st.lists(
        st.tuples(st.integers(1, 1 << 20), st.integers(0, 1 << 20), st.floats(1e-6, 1e3)), min_size=1, max_size=30
    )
)
def test_whatever_was_seen_no_prediction_is_negative_and_none_falls_with_size(seen) -> None:
    law = LinearLaw(PRIOR, SCALES)
    for tokens, context, seconds in seen:
        law.observe(features(tokens, context), seconds)
        assert min(law.coefficients) >= 0
        predicted = [law.seconds(features(1 << power, context)) for power in range(0, 21, 4)]
        assert predicted == sorted(predicted)
        assert predicted[0] >= 0


@pytest.mark.parametrize("seed", range(3))
def test_where_only_short_ones_were_seen_long_ones_come_from_the_prior(seed: int) -> None:
    # Short prefills whose times do not depend on their size at all: they wait for others.
    draw, law = random.Random(seed), LinearLaw(PRIOR, SCALES)
    for _ in range(1_500):
        size = draw.choice((64, 192, 256, 320, 448)), 4096 + draw.randrange(800)
        law.observe(features(*size), draw.uniform(0.2, 0.6))
    prior = LinearLaw(PRIOR, SCALES)
    level = law.seconds(features(320, 4224)) / prior.seconds(features(320, 4224))
    for long in ((4544, 0), (16_384, 0)):
        prior_s = prior.seconds(features(*long))
        assert 0.8 * prior_s <= law.seconds(features(*long)) <= 1.2 * level * prior_s


@pytest.mark.parametrize("seed", range(3))
def test_after_thousands_of_short_ones_that_waited_long_ones_still_take_longer(seed: int) -> None:
    draw, law = random.Random(seed), LinearLaw(PRIOR, SCALES)
    for _ in range(3):
        law.observe(features(4288, 0), 0.9)
    for _ in range(3_000):
        size = draw.choice((64, 192, 256, 320, 448)), 4096 + draw.randrange(800)
        law.observe(features(*size), draw.uniform(0.2, 0.6))
    assert law.seconds(features(4544, 0)) > 3 * law.seconds(features(320, 4224))


def test_one_hiccup_moves_predictions_little() -> None:
    law = after_mixed(lambda n, _: 0.02 + n / 5_000, random.Random(1))
    before_s = law.seconds(features(4544, 0))
    law.observe(features(300, 0), 60.0)
    assert law.seconds(features(4544, 0)) < 1.6 * before_s

"""A tier's speed depends on its kind until reads measure it. A failing tier is left alone, for longer each time."""

from __future__ import annotations

import pytest

from antefix.errors import BlockCorrupt, Overloaded, PermissionDenied, Unavailable
from antefix.store.standing import ASK_S, ASK_S_MAX, NUM_LATE_MAX, SHUNNED_S, SHUNNED_S_MAX, Standing
from antefix.store.tier import Tier, TierSpeed
from antefix.tier_kind import TierKind
from tests.kvstore.small_store import Clock

pytestmark = pytest.mark.impatient


class Nothing:
    """A source that is never asked."""


def make_tier(clock: Clock) -> Tier:
    return Tier("a", TierKind.PEER, Nothing(), clock=lambda: clock() / 1000)  # type: ignore[arg-type]


def test_a_nearer_kind_is_believed_faster_until_measured() -> None:
    seconds = [TierSpeed(kind).predicted_s(1 << 20) for kind in TierKind]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize(("latency_s", "bytes_per_s"), [(0.0001, 5e9), (0.3, 20e6)])
def test_speed_follows_what_reads_took(latency_s: float, bytes_per_s: float) -> None:
    speed = TierSpeed(TierKind.OBJECT)
    for step in range(60):
        nbytes = (1 << 18) << step % 8
        speed.observe(nbytes, latency_s + nbytes / bytes_per_s)
    for nbytes in (1 << 18, 1 << 25):
        assert speed.predicted_s(nbytes) == pytest.approx(latency_s + nbytes / bytes_per_s, rel=0.1)
    assert speed.bytes_per_s == pytest.approx(bytes_per_s, rel=0.2)


def test_a_failing_tier_is_left_alone_longer_each_time() -> None:
    clock = Clock()
    tier = make_tier(clock)
    pauses = []
    for _ in range(8):
        tier.failed(Unavailable("away"))
        start = clock.ms
        while tier.is_shunned:
            clock.advance(0.25)
        pauses.append((clock.ms - start) / 1000)
    assert pauses[0] == pytest.approx(SHUNNED_S, abs=0.25)
    assert pauses == sorted(pauses)
    assert pauses[-1] == pytest.approx(SHUNNED_S_MAX, abs=0.25)
    tier.answered()
    tier.failed(Unavailable("away"))
    clock.advance(SHUNNED_S)
    assert not tier.is_shunned
    assert tier.num_failures == 9


@pytest.mark.parametrize("err", [PermissionDenied("another tenant's"), BlockCorrupt("one record"), Overloaded("now")])
def test_what_a_tier_refuses_to_one_is_no_reason_to_leave_it_alone(err: Exception) -> None:
    tier = make_tier(Clock())
    tier.failed(err)
    assert (tier.is_shunned, tier.num_failures) == (False, 1)


def test_a_tier_that_nobody_reads_is_tried_again_after_a_while() -> None:
    clock = Clock()
    speed = TierSpeed(TierKind.PEER, lambda: clock() / 1000)
    for _ in range(10):
        speed.observe(10_000_000, 0.04)
    usual_s = speed.predicted_s(10_000_000)
    for _ in range(3):
        speed.observe(10_000_000, 40.0)
    slow_s = speed.predicted_s(10_000_000)
    assert slow_s > 20 * usual_s
    clock.advance(30)
    assert usual_s < speed.predicted_s(10_000_000) < slow_s / 4
    clock.advance(600)
    assert speed.predicted_s(10_000_000) < 3 * usual_s


def standing_of(clock: Clock) -> Standing:
    return Standing(lambda: clock() / 1000)


def test_one_late_answer_leaves_a_tier_in_use_and_answers_in_time_forgive_it() -> None:
    clock = Clock()
    standing = standing_of(clock)
    for _ in range(20):
        begun_s = clock() / 1000
        clock.advance(standing.limit_s)
        standing.late(begun_s)
        assert not standing.is_shunned
        standing.answered(0.001)
    assert standing.num_late == 20


def test_a_burst_of_late_answers_counts_once() -> None:
    clock = Clock()
    standing = standing_of(clock)
    begun_s = clock() / 1000
    for number in range(50):
        clock.advance(0.01)
        standing.late(begun_s + number * 0.001)
    assert not standing.is_shunned


def test_a_tier_that_says_nothing_is_left_alone_after_some_late_answers_one_after_the_other() -> None:
    clock = Clock()
    standing = standing_of(clock)
    for number in range(NUM_LATE_MAX):
        assert not standing.is_shunned, number
        begun_s = clock() / 1000
        clock.advance(standing.limit_s)
        standing.late(begun_s)
    assert standing.is_shunned
    # The answer comes after all.
    standing.answered(NUM_LATE_MAX * ASK_S)
    assert not standing.is_shunned


def test_how_long_an_answer_is_waited_for_follows_from_the_answers() -> None:
    standing = standing_of(Clock())
    assert standing.limit_s == ASK_S
    # One slow answer at high load gives the tier more time for some further answers.
    standing.answered(0.8)
    assert 0.8 < standing.limit_s <= ASK_S_MAX
    for _ in range(50):
        standing.answered(0.01)
    assert standing.limit_s == ASK_S
    for _ in range(50):
        standing.answered(60.0)
    assert standing.limit_s == ASK_S_MAX


def test_a_tier_that_is_back_is_asked_at_once_however_long_it_was_away() -> None:
    clock, returned_s = Clock(), [float("-inf")]
    standing = Standing(lambda: clock() / 1000, lambda: returned_s[0])
    for _ in range(8):
        standing.failed()
        clock.advance(SHUNNED_S_MAX)
    standing.failed()
    clock.advance(0.1)
    assert standing.is_shunned
    returned_s[0] = clock() / 1000
    assert not standing.is_shunned
    # One more failure of a call that was already running costs as little as a first failure.
    clock.advance(0.01)
    standing.failed()
    clock.advance(SHUNNED_S + 0.01)
    assert not standing.is_shunned

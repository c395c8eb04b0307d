"""A store's turnover is its size divided by its write rate. There is none while the store has room."""

from __future__ import annotations

import pytest

from antefix.window import BudgetState, PromptFacts, Reason, Sizes, Turnover, parse

SIZES = Sizes(
    block_size=128,
    block_bytes=449_824,
    checkpoint_bytes=3_645_568,
    window_tokens=128,
    replay_reach=tuple(layers * 127 + 1 for layers in range(43, 0, -1)),
)


def _fed(*, used_bytes: int, budget_bytes: int | None) -> Turnover:
    turnover = Turnover()
    for second in range(0, 3000, 5):
        turnover.observe(second, bytes_written=10 * second, used_bytes=used_bytes, budget_bytes=budget_bytes)
    return turnover


def test_a_full_store_turns_over_in_its_size_over_its_write_rate() -> None:
    assert _fed(used_bytes=980, budget_bytes=1000).seconds == pytest.approx(100, rel=0.01)


def test_a_store_with_room_or_without_end_does_not_turn_over() -> None:
    assert _fed(used_bytes=700, budget_bytes=1000).seconds is None
    assert _fed(used_bytes=980, budget_bytes=None).seconds is None
    assert Turnover().seconds is None


def test_a_restarted_store_starts_counting_anew() -> None:
    turnover = _fed(used_bytes=980, budget_bytes=1000)
    before = turnover.seconds
    turnover.observe(3000, bytes_written=5, used_bytes=980, budget_bytes=1000)
    assert turnover.seconds == before
    turnover.observe(3005, bytes_written=55, used_bytes=980, budget_bytes=1000)
    assert turnover.seconds == pytest.approx(before, rel=0.01)


def test_the_same_moment_twice_changes_nothing() -> None:
    turnover = _fed(used_bytes=980, budget_bytes=1000)
    before = turnover.seconds
    turnover.observe(2995, bytes_written=99_999, used_bytes=980, budget_bytes=1000)
    assert turnover.seconds == before


@pytest.mark.parametrize(("turnover_s", "sparse"), [(None, True), (599.0, False), (601.0, True)])
def test_auto_leaves_sparse_marks_only_where_they_live_long_enough(turnover_s: float | None, sparse: bool) -> None:
    budget = BudgetState(turnover_s=turnover_s)
    facts = PromptFacts(num_tokens=100_000, num_stored_blocks=50, resume_block=0, budget=budget)
    reasons = {mark.reason for mark in parse("auto").at_prompt(facts, SIZES)}
    assert reasons >= {Reason.FORK, Reason.PROMPT_END}
    assert (Reason.SPARSE in reasons) == sparse

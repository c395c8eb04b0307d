"""Extreme cases of the break-even table, in which the answer is obvious."""

from __future__ import annotations

import pytest

from antefix_simulate.breakeven import BreakEven, break_even, break_even_text, chance_needed
from antefix_simulate.machine import Machine, model_sizes

SIZES = model_sizes("v4-flash")


def _one(prefix: int, disk: float, age_s: float) -> BreakEven:
    (row,) = break_even(SIZES, Machine(), prefixes=[prefix], disks=[disk], ages=[age_s])
    return row


def test_a_disk_slower_than_prefill_is_worth_nothing() -> None:
    # 18,000 tokens/s of prefill make 63 MB/s of global KV. With a slower disk, computing again is faster than loading.
    row = _one(65_536, 40e6, 60.0)
    assert row.continue_fastest == row.continue_per_byte == row.leave_fastest == "none"


def test_the_next_turn_wants_one_checkpoint_at_the_end() -> None:
    assert _one(65_536, 6e9, 60.0).continue_per_byte == "boundary"


def test_after_all_checkpoints_have_gone_global_kv_is_replayed() -> None:
    row = _one(262_144, 6e9, 48 * 3600.0)
    assert row.continue_fastest == row.leave_fastest == "zero"
    ttft = {outcome.strategy: outcome.continue_ttft_s for outcome in row.outcomes}
    assert ttft["full"] == pytest.approx(ttft["zero"])


def test_a_prefix_left_inside_is_fastest_with_every_boundary_kept() -> None:
    row = _one(16_384, 6e9, 60.0)
    assert row.leave_fastest == "full"
    stored = {outcome.strategy: outcome.stored_bytes for outcome in row.outcomes}
    assert stored["full"] > 7 * stored["zero"]


def test_a_checkpoint_at_every_block_needs_more_chances_than_there_are() -> None:
    assert chance_needed(SIZES, 128) > 8
    assert chance_needed(SIZES, 1_024) == pytest.approx(1, rel=0.02)
    assert chance_needed(SIZES, 2_668) == chance_needed(SIZES, 500_000) == pytest.approx(0.389, rel=0.01)


def test_the_table_has_a_line_for_each_combination() -> None:
    rows = break_even(SIZES, Machine(), prefixes=[1024, 4096], disks=[1e9], ages=[60.0, 7200.0])
    assert len(break_even_text(rows).splitlines()) == 1 + 4

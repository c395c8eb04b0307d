"""The planner estimates the cost of every way to restore a prompt, takes the cheapest, and reports its errors."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from antefix.errors import InternalError
from antefix.linear_law import LinearLaw
from antefix.store.tier import TierSpeed
from antefix.tier_kind import TierKind
from antefix.window import Plan, PlanKind, Rates, RestorePlanner, Sizes, StoredPrefix
from antefix.window.rates import RatePriors

SIZES = Sizes(
    block_size=128,
    block_bytes=449_824,
    checkpoint_bytes=3_645_568,
    window_tokens=128,
    replay_reach=tuple(layers * 127 + 1 for layers in range(43, 0, -1)),
)


def _planner(
    *, prefill_tokens_per_s: float = 18_000, load_bytes_per_s: float = 6e9, align_tokens: int = 1
) -> RestorePlanner:
    priors = RatePriors(
        prefill_tokens_per_s=prefill_tokens_per_s, prefill_fixed_s=0, load_bytes_per_s=load_bytes_per_s, load_fixed_s=0
    )
    return RestorePlanner(SIZES, Rates(priors), align_tokens=align_tokens)


def test_nothing_stored_is_cold() -> None:
    decision = _planner().plan(StoredPrefix(num_tokens=10_000, num_blocks=0))
    assert decision.plan.kind is PlanKind.COLD
    assert decision.plan.prefill_tokens == 10_000
    assert [plan.kind for plan in decision.plans] == [PlanKind.COLD]


def test_a_near_checkpoint_beats_replay_and_a_far_one_loses_to_it() -> None:
    near = _planner().plan(StoredPrefix(num_tokens=100_000, num_blocks=700, checkpoints={690: "disk"}))
    assert (near.plan.kind, near.plan.resume_block) == (PlanKind.CHECKPOINT, 690)
    far = _planner().plan(StoredPrefix(num_tokens=100_000, num_blocks=700, checkpoints={100: "disk"}))
    assert (far.plan.kind, far.plan.resume_block, far.plan.replay_from_block) == (PlanKind.REPLAY, 700, 700 - 43)
    assert far.plan.replay_tokens == 5_504


def _tiered(**bytes_per_s: float) -> RestorePlanner:
    """A planner whose tiers have these speeds."""
    laws = {tier: LinearLaw((0.0, 1 / rate), (1.0, 32e6)) for tier, rate in bytes_per_s.items()}
    return RestorePlanner(SIZES, Rates(RatePriors(prefill_tokens_per_s=18_000, prefill_fixed_s=0), tiers=laws))


def test_a_slow_tier_is_left_where_computing_is_faster() -> None:
    stored = StoredPrefix(num_tokens=100_000, num_blocks=700, block_tiers=((500, "near"), (700, "far")))
    # A block of 449,824 bytes takes 7.1 ms to compute, and 0.1 ms or 45 ms to load.
    fast = _tiered(near=5e9, far=5e9).plan(stored).plan
    assert (fast.kind, fast.resume_block) == (PlanKind.REPLAY, 700)
    slow = _tiered(near=5e9, far=10e6).plan(stored).plan
    assert (slow.kind, slow.resume_block) == (PlanKind.REPLAY, 500)
    both_slow = _tiered(near=10e6, far=10e6).plan(stored).plan
    assert both_slow.kind is PlanKind.COLD


def test_a_tier_that_turns_slow_is_left_after_some_reads_and_taken_again_when_it_is_fast() -> None:
    speed = TierSpeed(TierKind.PEER)
    for _ in range(10):
        speed.observe(100_000_000, 0.02)
    planner = RestorePlanner(
        SIZES, Rates(RatePriors(prefill_tokens_per_s=18_000, prefill_fixed_s=0), tiers={"far": speed})
    )
    stored = StoredPrefix(num_tokens=100_000, num_blocks=700, block_tiers=((700, "far"),))
    assert planner.plan(stored).plan.kind is PlanKind.REPLAY
    for _ in range(8):
        speed.observe(100_000_000, 100.0)
    assert planner.plan(stored).plan.kind is PlanKind.COLD
    for _ in range(12):
        speed.observe(100_000_000, 0.02)
    assert planner.plan(stored).plan.kind is PlanKind.REPLAY


def test_tiers_are_read_at_the_same_time_and_what_is_in_memory_is_not() -> None:
    stored = StoredPrefix(
        num_tokens=100_000, num_blocks=700, num_resident_blocks=200, block_tiers=((400, "a"), (700, "b"))
    )
    planner = _tiered(a=1e9, b=1e9)
    plan = next(each for each in planner.plan(stored).plans if each.resume_block == 700)
    assert plan.load_bytes == 500 * SIZES.block_bytes
    rest_s = planner.rates.replay_s(plan.replay_work_tokens, context=plan.replay_from_block * 128)
    rest_s += planner.rates.prefill_s(plan.prefill_tokens, context=700 * 128)
    assert plan.predicted_s - rest_s == pytest.approx(300 * SIZES.block_bytes / 1e9)


def test_a_replay_costs_the_layers_that_it_runs_and_in_reproducible_mode_all() -> None:
    stored = StoredPrefix(num_tokens=100_000, num_blocks=700)
    trimmed = _planner().plan(stored).plan
    # Of 43 layers the lowest runs 41 * 127 + 128 tokens, each next layer 127 fewer, and the last layer none.
    assert trimmed.replay_work_tokens == -(-sum(128 + 127 * above for above in range(42)) // 43) == 2_668
    whole = next(p for p in _planner(align_tokens=512).plan(stored).plans if p.kind is PlanKind.REPLAY)
    assert whole.replay_work_tokens == whole.replay_tokens == 5_632
    bounded = next(
        plan
        for plan in _planner().plan(StoredPrefix(num_tokens=100_000, num_blocks=700, bounded_windows=1)).plans
        if plan.kind is PlanKind.BOUNDED
    )
    assert (bounded.replay_tokens, bounded.replay_work_tokens) == (128, 126)


def test_a_disk_slower_than_prefill_makes_cold_the_choice() -> None:
    slow = _planner(load_bytes_per_s=10e6)
    decision = slow.plan(StoredPrefix(num_tokens=100_000, num_blocks=781, checkpoints={781: "disk"}))
    assert decision.plan.kind is PlanKind.COLD


def test_blocks_and_checkpoints_in_memory_cost_no_load() -> None:
    stored = StoredPrefix(
        num_tokens=100_000,
        num_blocks=781,
        checkpoints={781: "pool"},
        num_resident_blocks=781,
        resident_checkpoints=frozenset({781}),
    )
    plan = _planner(load_bytes_per_s=10e6).plan(stored).plan
    assert (plan.kind, plan.load_bytes) == (PlanKind.CHECKPOINT, 0)


def test_load_bytes_are_blocks_plus_one_checkpoint() -> None:
    plan = (
        _planner()
        .plan(StoredPrefix(num_tokens=1_000, num_blocks=7, checkpoints={7: "disk"}, num_resident_blocks=2))
        .plan
    )
    assert plan.load_bytes == 5 * SIZES.block_bytes + SIZES.checkpoint_bytes


def test_a_hit_leaves_at_least_one_token_to_run() -> None:
    stored = StoredPrefix(num_tokens=1_280, num_blocks=10, checkpoints={9: "disk", 10: "disk"})
    for plan in _planner().plan(stored).plans:
        assert plan.prefill_tokens > 0
        assert plan.resume_block <= 9


def test_bounded_replay_is_never_offered_unless_opted_in() -> None:
    exact = StoredPrefix(num_tokens=100_000, num_blocks=700)
    assert PlanKind.BOUNDED not in {plan.kind for plan in _planner().plan(exact).plans}
    opted = StoredPrefix(num_tokens=100_000, num_blocks=700, bounded_windows=1)
    plan = _planner().plan(opted).plan
    assert (plan.kind, plan.replay_tokens) == (PlanKind.BOUNDED, 128)


def test_reproducible_mode_resumes_only_where_a_cold_run_starts_a_chunk() -> None:
    planner = _planner(align_tokens=1024)
    stored = StoredPrefix(num_tokens=100_000, num_blocks=701, checkpoints={690: "disk", 688: "disk", 701: "disk"})
    plans = {plan.kind: plan for plan in planner.plan(stored).plans}
    assert plans[PlanKind.CHECKPOINT].resume_block == 688
    assert plans[PlanKind.REPLAY].resume_block % 8 == 0
    assert plans[PlanKind.REPLAY].replay_from_block % 8 == 0


def test_a_nearer_checkpoint_in_a_slow_tier_may_lose() -> None:
    planner = _planner()
    for _ in range(20):
        planner.rates.observe_load("remote", 3_645_568, 2.0)
        planner.rates.observe_load("disk", 3_645_568, 0.001)
    stored = StoredPrefix(num_tokens=100_000, num_blocks=700, checkpoints={700: "remote", 699: "disk"})
    assert planner.plan(stored).plan.resume_block == 699


@given(
    blocks=st.sets(st.integers(1, 780), min_size=1, max_size=40),
    resident=st.integers(0, 780),
    load=st.floats(1e6, 1e11),
    slope=st.floats(0, 1e-9),
)
def test_weighing_only_the_extreme_checkpoints_loses_nothing(
    blocks: set[int], resident: int, load: float, slope: float
) -> None:
    planner = _planner(load_bytes_per_s=load)
    for tokens in (100, 10_000, 100_000):
        planner.rates.observe_prefill(tokens, context=50_000, seconds=0.1 + tokens / 9_000 + tokens**2 * slope)

    def best(candidates: set[int]) -> float:
        stored = StoredPrefix(
            num_tokens=100_000,
            num_blocks=780,
            checkpoints=dict.fromkeys(candidates, "disk"),
            num_resident_blocks=resident,
            replay=False,
        )
        return min(plan.predicted_s for plan in planner.plan(stored).plans if plan.kind is PlanKind.CHECKPOINT)

    assert best(blocks) <= min(best({block}) for block in blocks) * (1 + 1e-9)


@given(
    num_tokens=st.integers(1, 300_000),
    num_blocks=st.integers(0, 2_500),
    checkpoints=st.sets(st.integers(1, 2_500), max_size=6),
    load=st.floats(1e6, 1e11),
    prefill=st.floats(50, 1e6),
    windows=st.integers(0, 4),
)
def test_the_choice_is_never_predicted_slower_than_cold(
    num_tokens: int, num_blocks: int, checkpoints: set[int], load: float, prefill: float, windows: int
) -> None:
    planner = _planner(prefill_tokens_per_s=prefill, load_bytes_per_s=load)
    stored = StoredPrefix(
        num_tokens=num_tokens,
        num_blocks=num_blocks,
        checkpoints={block: "disk" for block in checkpoints if block <= num_blocks},
        bounded_windows=windows,
    )
    decision = planner.plan(stored)
    assert decision.plan.predicted_s <= decision.cold.predicted_s
    for plan in decision.plans:
        assert plan.resume_block * 128 + plan.prefill_tokens == num_tokens
        assert 0 <= plan.replay_from_block <= plan.resume_block <= min(num_blocks, (num_tokens - 1) // 128)
        assert plan.replay_tokens == (plan.resume_block - plan.replay_from_block) * 128


def _true_seconds(plan: Plan, rng: random.Random) -> float:
    """A machine that differs from the planner's model: slower with longer context, with noise of a fifth."""
    load = 0.004 + plan.load_bytes / 1.5e9 if plan.load_bytes else 0.0
    context = plan.replay_from_block * 128
    tokens = plan.replay_work_tokens + plan.prefill_tokens
    compute = 0.02 + tokens / 9_000 * (1 + (context + tokens / 2) / 400_000)
    return (load + compute) * rng.uniform(0.8, 1.2)


def test_on_a_noisy_machine_no_choice_is_slower_than_cold_by_more_than_its_stated_error() -> None:
    rng = random.Random(5)
    planner = _planner(prefill_tokens_per_s=2_000, load_bytes_per_s=500e6)
    worst, violations, trials = 0.0, 0, 400
    for trial in range(trials):
        num_tokens = int(2 ** rng.uniform(8, 17))
        blocks = rng.randint(0, num_tokens // 128)
        checkpoints = {rng.randint(1, blocks): "disk" for _ in range(2) if blocks}
        decision = planner.plan(StoredPrefix(num_tokens=num_tokens, num_blocks=blocks, checkpoints=checkpoints))
        plan = decision.plan
        actual = _true_seconds(plan, rng)
        cold = _true_seconds(decision.cold, random.Random(trial))
        violations += actual > cold + decision.error_s
        error = planner.record(plan, actual)
        if trial >= trials // 2:
            worst = max(worst, error)
        context = plan.replay_from_block * 128
        tokens = plan.replay_work_tokens + plan.prefill_tokens
        load_s = plan.load_bytes / 1.5e9 + 0.004
        planner.rates.observe_prefill(tokens, context=context, seconds=actual - (load_s if plan.load_bytes else 0.0))
        planner.rates.observe_load("disk", plan.load_bytes, load_s)
    assert violations == 0
    # The noise alone causes an error of 0.25 for a prediction that is right on average.
    assert worst < 0.6


def test_the_stated_error_covers_the_last_surprise_and_fades() -> None:
    planner = _planner()
    stored = StoredPrefix(num_tokens=10_000, num_blocks=0)
    plan = planner.plan(stored).plan
    planner.record(plan, plan.predicted_s * 3)
    assert planner.plan(stored).plan.error_s == pytest.approx(plan.predicted_s * 2)
    for _ in range(200):
        planner.record(plan, plan.predicted_s)
    record = planner.records[PlanKind.COLD]
    assert record.num_outcomes == 201
    assert planner.plan(stored).plan.error_s < plan.predicted_s * 0.3
    assert record.mean_error < 0.01


def test_senseless_questions_are_refused() -> None:
    with pytest.raises(InternalError):
        _planner().plan(StoredPrefix(num_tokens=0, num_blocks=0))
    with pytest.raises(InternalError):
        _planner(align_tokens=0)

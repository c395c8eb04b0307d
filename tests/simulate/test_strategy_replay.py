"""A trace that is small enough to compute by hand, and rules that hold for any trace."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antefix.window import Mark, OutputFacts, PromptFacts, Sizes, Strategy, parse
from antefix_simulate.generated_traces import SHAPES, generate
from antefix_simulate.machine import RATE_CARDS, Machine, model_sizes
from antefix_simulate.simulated_store import StoreLimits
from antefix_simulate.trace import Trace, TraceRequest
from antefix_simulate.trace_replay import ReplaySetup, ideal_hit_tokens, simulate, store_hit_tokens

SIZES = model_sizes("v4-flash")
MACHINE = Machine(jitter=0.0)
FIXED = ("boundary", "periodic(2048)", "full", "zero")


def _setup(*, replay: bool = True, store_bytes: int | None = None) -> ReplaySetup:
    limits = StoreLimits(store_bytes=store_bytes)
    return ReplaySetup(sizes=SIZES, machine=MACHINE, card=RATE_CARDS["v4-flash"], limits=limits, replay=replay)


def _trace(*requests: tuple[int, list[int]]) -> Trace:
    made = [
        TraceRequest(at_s=float(i), num_tokens=tokens, output_tokens=1, names=np.asarray(names, dtype=np.int64))
        for i, (tokens, names) in enumerate(requests)
    ]
    return Trace(name="hand", unit_tokens=128, requests=tuple(made))


# The second request diverges from the first after 4 units of 128. The third repeats the second. The fourth diverges at
# the same place.
HAND = _trace(
    (1000, [0, 1, 2, 3, 4, 5, 6]),
    (1000, [0, 1, 2, 3, 14, 15, 16]),
    (1000, [0, 1, 2, 3, 14, 15, 16]),
    (1000, [0, 1, 2, 3, 24, 25, 26]),
)


def test_the_ideal_spares_every_prefix_that_was_there_before() -> None:
    assert ideal_hit_tokens(HAND) == 512 + 896 + 512


def test_a_stores_own_ideal_is_the_ideal_where_nothing_is_evicted_and_less_where_it_is() -> None:
    assert store_hit_tokens(HAND, _setup()) == ideal_hit_tokens(HAND)
    assert store_hit_tokens(HAND, _setup(store_bytes=4 * SIZES.block_bytes)) < ideal_hit_tokens(HAND)


def test_boundary_misses_the_fork_twice() -> None:
    result = simulate(HAND, parse("boundary"), _setup(replay=False))
    assert result.token_hit_rate == 896 / 4000
    assert result.recomputed_tokens == 512 + 512
    assert result.checkpoints_per_request == 3 / 4
    assert result.bytes_written == 13 * SIZES.block_bytes + 3 * SIZES.checkpoint_bytes
    assert result.bytes_kept == result.bytes_written
    assert result.plans == {"cold": 3, "checkpoint": 1, "replay": 0, "bounded": 0}
    assert result.dollars == pytest.approx((896 * 0.003 + 3104 * 0.15) / 1e6)


def test_auto_misses_the_fork_once_and_keeps_it() -> None:
    result = simulate(HAND, parse("auto"), _setup())
    assert result.token_hit_rate == (896 + 512) / 4000
    assert result.recomputed_tokens == 512
    assert result.checkpoints_per_request == 4 / 4


def test_full_is_ideal_and_zero_replays() -> None:
    full = simulate(HAND, parse("full"), _setup())
    assert full.token_hit_rate == full.ideal_token_hit_rate == 1920 / 4000
    assert full.checkpoints_per_request == 13 / 4
    zero = simulate(HAND, parse("zero"), _setup())
    assert (zero.token_hit_rate, zero.checkpoint_bytes_written) == (0.0, 0)


def test_a_replayed_token_is_no_hit_though_half_of_its_work_is_spared() -> None:
    long = list(range(1000))
    result = simulate(_trace((128_000, long), (128_500, long)), parse("zero"), _setup())
    assert result.replayed_tokens == result.recomputed_tokens == SIZES.replay_tokens
    assert result.token_hit_rate == (128_000 - SIZES.replay_tokens) / 256_500
    work = SIZES.replay_work_tokens(SIZES.replay_tokens)
    assert result.work_hit_rate == (128_000 - work) / 256_500
    assert result.share_of_ideal < result.work_share_of_ideal == (128_000 - work) / 128_000


def test_time_to_first_token_is_loading_and_computing() -> None:
    result = simulate(_trace((1000, [0, 1, 2, 3, 4, 5, 6])), parse("zero"), _setup())
    assert result.ttft_p50_s == result.ttft_p99_s == pytest.approx(MACHINE.compute_s(1000, context=0))


@pytest.mark.slow
@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_auto_is_near_ideal_with_few_checkpoints_on_every_generated_shape(shape: str) -> None:
    trace = generate(shape, num_requests=300, unit_tokens=128, seed=3)
    auto = simulate(trace, parse("auto"), _setup())
    boundary = simulate(trace, parse("boundary"), _setup())
    assert auto.share_of_ideal >= 0.98
    # auto is as good, except for random differences of plans on a noisy machine.
    assert auto.share_of_ideal >= boundary.share_of_ideal - 0.0005
    assert auto.checkpoints_per_request <= 1.6


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    shape=st.sampled_from(sorted(SHAPES)),
    seed=st.integers(0, 1000),
    name=st.sampled_from(("auto", *FIXED)),
    store=st.sampled_from([None, 2 * 10**8, 5 * 10**9]),
    replay=st.booleans(),
)
def test_hits_never_exceed_the_ideal_nor_bytes_the_budget(
    shape: str, seed: int, name: str, store: int | None, replay: bool
) -> None:
    trace = generate(shape, num_requests=60, unit_tokens=128, seed=seed)
    result = simulate(trace, parse(name), _setup(replay=replay, store_bytes=store))
    assert 0 <= result.token_hit_rate <= result.work_hit_rate <= result.ideal_token_hit_rate <= 1
    assert result.bytes_kept <= result.bytes_written
    assert store is None or result.bytes_kept_max <= store
    assert sum(result.plans.values()) == result.num_requests == 60
    assert result.plans["bounded"] == 0
    assert replay or result.plans["replay"] == 0


def test_a_run_is_the_same_every_time() -> None:
    trace = generate("chat", num_requests=100, unit_tokens=128, seed=1)
    runs = [simulate(trace, parse("auto"), _setup(store_bytes=10**9)).as_dict() for _ in range(2)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("name", ["auto", "boundary", "periodic(10000)"])
def test_a_conversation_of_100k_saved_every_10k_takes_at_most_400_mb(name: str) -> None:
    requests = [(10_000 * turn, list(range(10_000 * turn // 128))) for turn in range(1, 11)]
    result = simulate(_trace(*requests), parse(name), _setup())
    assert result.checkpoint_bytes_written >= 9 * SIZES.checkpoint_bytes
    assert result.bytes_kept <= 0.40e9


@pytest.mark.slow
def test_auto_holds_its_byte_budget() -> None:
    trace = generate("agents", num_requests=400, unit_tokens=128, seed=2)
    budget = 40 * SIZES.checkpoint_bytes
    tight = simulate(trace, parse(f"auto(budget={budget})"), _setup())
    wide = simulate(trace, parse("auto"), _setup())
    assert 0 < tight.checkpoint_bytes_kept_max <= budget < wide.checkpoint_bytes_kept_max
    assert tight.token_hit_rate > simulate(trace, parse("zero"), _setup()).token_hit_rate


class _Switched:
    """Changes to another strategy at the n-th prompt, as when an operator switches a namespace."""

    def __init__(self, before: Strategy, after: Strategy, at: int) -> None:
        self.before, self.after, self.left = before, after, at

    def at_prompt(self, facts: PromptFacts, sizes: Sizes) -> tuple[Mark, ...]:
        self.left -= 1
        return (self.before if self.left >= 0 else self.after).at_prompt(facts, sizes)

    def at_output(self, facts: OutputFacts, sizes: Sizes) -> tuple[Mark, ...]:
        return ()


def test_what_one_strategy_left_is_used_after_switching_to_another() -> None:
    requests = [(1000, list(range(7))), (2000, list(range(15))), (2000, [*range(7), 90, 91, 92])]
    result = simulate(_trace(*requests), _Switched(parse("boundary"), parse("zero"), at=1), _setup())
    assert result.checkpoints_per_request == 1 / 3
    assert result.token_hit_rate == 2 * 896 / 5000


def test_a_pool_that_forgets_is_survived_by_replay() -> None:
    units = list(range(1000))
    late = Trace(
        name="late",
        unit_tokens=128,
        requests=tuple(
            TraceRequest(at_s=at, num_tokens=128_100, output_tokens=1, names=np.asarray(units, dtype=np.int64))
            for at in (0.0, 100.0, 10_000.0)
        ),
    )
    result = simulate(late, parse("auto(ends=pool)"), _setup())
    assert result.plans["checkpoint"] == 2
    assert result.bytes_kept < 1000 * SIZES.block_bytes + 5 * SIZES.checkpoint_bytes

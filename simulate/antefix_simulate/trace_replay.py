"""Replays one trace under one strategy: each request is looked up, planned, run on the model machine, and stored.

A request ends before the next one arrives: the next request finds everything that was written, and nothing waits in a
queue. Replaying one request at a time favours all strategies equally; another simulation (`cluster`) has queues and
many workers. Outputs are not stored, because traces do not name their tokens; so hits on outputs are missing in all
results, also in the ideal.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from antefix.window import (
    BudgetState,
    Plan,
    PlanKind,
    PromptFacts,
    RatePriors,
    Rates,
    RestorePlanner,
    Sizes,
    StoredPrefix,
    Strategy,
    Turnover,
)
from antefix_simulate.habits import Habits
from antefix_simulate.machine import Machine, TokenPrices, carry_out
from antefix_simulate.replay_result import StrategyResult, percentile
from antefix_simulate.simulated_store import SimStore, StoreLimits
from antefix_simulate.trace import Trace, TraceRequest

# So many times per run, progress is reported, expired checkpoints are freed and the stored bytes are measured.
_STEPS = 200
_LOOK_EVERY_S = 5.0

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplaySetup:
    """Settings that are the same for all strategies that are compared. replay: whether exact replay may be planned."""

    sizes: Sizes
    machine: Machine
    card: TokenPrices
    limits: StoreLimits
    replay: bool = True


@dataclass(slots=True)
class _Tally:
    ttft_s: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    plans: dict[str, int] = field(default_factory=lambda: {kind.value: 0 for kind in PlanKind})
    hit_tokens: int = 0
    spared_tokens: int = 0
    recomputed_tokens: int = 0
    replayed_tokens: int = 0
    bytes_kept_max: int = 0
    checkpoint_bytes_kept_max: int = 0


def ideal_hits(trace: Trace) -> Iterator[int]:
    """For each request, the tokens that an unlimited store would save if it had window state at every boundary."""
    seen: set[int] = set()
    for request in trace.requests:
        low, high = 0, len(request.names)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if int(request.names[middle - 1]) in seen else (low, middle - 1)
        yield min(low, (request.num_tokens - 1) // trace.unit_tokens) * trace.unit_tokens
        seen.update(request.names[low:].tolist())


def ideal_hit_tokens(trace: Trace) -> int:
    """The sum of `ideal_hits`."""
    return sum(ideal_hits(trace))


def store_hit_tokens(trace: Trace, setup: ReplaySetup) -> int:
    """The tokens that the same limited store would save if window state took no bytes, which is its own ideal."""
    unit_blocks = trace.unit_tokens // setup.sizes.block_size
    store = SimStore(setup.sizes, setup.limits, unit_blocks=unit_blocks)
    unit_s = trace.unit_tokens / setup.machine.prefill_tokens_per_s
    total = 0
    for request in trace.requests:
        num_units = store.num_stored(request.names)
        total += min(num_units, (request.num_tokens - 1) // trace.unit_tokens) * trace.unit_tokens
        store.touch(request.names, num_units, request.at_s)
        store.put_units(request.names, num_units, request.at_s, unit_s)
    return total


def simulate(trace: Trace, strategy: Strategy, setup: ReplaySetup, progress: Progress | None = None) -> StrategyResult:
    """Replay the whole trace under `strategy`. progress: called with the number of requests done and in all."""
    run = _Run(trace, strategy, setup)
    total = len(trace.requests)
    every = max(total // _STEPS, 1)
    for index, request in enumerate(trace.requests):
        run.serve(request)
        if index % every == 0:
            run.look(request.at_s)
            if progress:
                progress(index, total)
    if trace.requests:
        run.look(trace.requests[-1].at_s)
    return run.result()


class _Run:
    def __init__(self, trace: Trace, strategy: Strategy, setup: ReplaySetup) -> None:
        self.trace = trace
        self.strategy = strategy
        self.setup = setup
        self.unit_blocks = trace.unit_tokens // setup.sizes.block_size
        self.store = SimStore(setup.sizes, setup.limits, unit_blocks=self.unit_blocks)
        # At first the planner knows the machine's speed only roughly; it learns the rest during the trace.
        self.rates = Rates(RatePriors(prefill_tokens_per_s=setup.machine.prefill_tokens_per_s / 2))
        self.planner = RestorePlanner(setup.sizes, self.rates)
        self.rng = random.Random(1)
        self.tally = _Tally()
        self.habits = Habits()
        self.turnover = Turnover()
        self.looked_s = -_LOOK_EVERY_S

    def serve(self, request: TraceRequest) -> None:
        names, now_s = request.names, request.at_s
        # 1. Look up what is stored of the prompt, and where window state is.
        self._look_at_store(now_s)
        self.store.expire(now_s)
        num_units = self.store.num_stored(names)
        found = self.store.last_checkpoint(names, num_units, now_s)
        # 2. Plan, and run the plan on the machine.
        checkpoints = {found[0] * self.unit_blocks: found[1].value} if found else {}
        stored = StoredPrefix(
            num_tokens=request.num_tokens,
            num_blocks=num_units * self.unit_blocks,
            checkpoints=checkpoints,
            replay=self.setup.replay,
        )
        plan = self.planner.plan(stored).plan
        self._carry_out(plan)
        self._count(request, plan, num_units)
        # 3. Note the use of what was read.
        self.store.touch(names, num_units, now_s)
        if found and plan.kind is PlanKind.CHECKPOINT:
            self.store.touch_checkpoint(names, found[0], found[1], now_s)
            self.habits.use(int(names[found[0] - 1]), now_s)
        # 4. Store new blocks, and write the checkpoints that the strategy wants.
        self._write(request, plan, num_units, tuple(checkpoints))
        window_bytes = self.store.checkpoint_bytes_kept()
        self.tally.checkpoint_bytes_kept_max = max(self.tally.checkpoint_bytes_kept_max, window_bytes)

    def _look_at_store(self, now_s: float) -> None:
        """Measure the simulated store as a worker does: every few seconds, not for every request."""
        if now_s >= self.looked_s + _LOOK_EVERY_S:
            self.looked_s = now_s
            self.turnover.observe(
                now_s,
                bytes_written=self.store.bytes_written,
                used_bytes=self.store.bytes_kept,
                budget_bytes=self.setup.limits.store_bytes,
            )

    def _carry_out(self, plan: Plan) -> None:
        timing = carry_out(self.setup.machine, self.setup.sizes, plan, self.rng)
        start = plan.replay_from_block * self.setup.sizes.block_size
        self.rates.observe_prefill(plan.prefill_tokens, context=start + plan.replay_tokens, seconds=timing.prefill_s)
        if plan.replay_tokens:
            self.rates.observe_replay(plan.replay_work_tokens, context=start, seconds=timing.replay_s)
        if timing.load_blocks_s:
            window_bytes = self.setup.sizes.checkpoint_bytes if plan.checkpoint_tier else 0
            self.rates.observe_load("disk", plan.load_bytes - window_bytes, timing.load_blocks_s)
        if plan.checkpoint_tier:
            self.rates.observe_load(plan.checkpoint_tier, self.setup.sizes.checkpoint_bytes, timing.load_checkpoint_s)
        self.tally.errors.append(self.planner.record(plan, timing.total_s))
        self.tally.ttft_s.append(timing.total_s)

    def _count(self, request: TraceRequest, plan: Plan, num_units: int) -> None:
        block_size = self.setup.sizes.block_size
        usable = min(num_units * self.unit_blocks, (request.num_tokens - 1) // block_size) * block_size
        hit = plan.resume_block * block_size - plan.replay_tokens
        self.tally.plans[plan.kind.value] += 1
        self.tally.hit_tokens += hit
        self.tally.spared_tokens += hit + plan.replay_tokens - plan.replay_work_tokens
        self.tally.replayed_tokens += plan.replay_tokens
        self.tally.recomputed_tokens += usable - hit

    def _write(self, request: TraceRequest, plan: Plan, num_units: int, checkpoints: tuple[int, ...]) -> None:
        now_s, machine = request.at_s, self.setup.machine
        facts = PromptFacts(
            num_tokens=request.num_tokens,
            num_stored_blocks=max(num_units * self.unit_blocks, plan.resume_block),
            resume_block=plan.resume_block,
            checkpoints=checkpoints,
            align_blocks=self.unit_blocks,
            budget=BudgetState(
                used_bytes=self.store.checkpoint_bytes_kept(), limit_bytes=None, turnover_s=self.turnover.seconds
            ),
        )
        marks = self.strategy.at_prompt(facts, self.setup.sizes)
        unit_s = machine.compute_s(self.trace.unit_tokens, context=0) - machine.prefill_fixed_s
        num_kept = self.store.put_units(request.names, num_units, now_s, unit_s)
        for mark in marks:
            unit = mark.block // self.unit_blocks
            # A mark that is not at a boundary of the trace's units (periodic(p) with such a p) moves to the boundary
            # before it.
            if 0 < unit <= num_kept and self.store.put_checkpoint(
                request.names,
                unit,
                tier=mark.tier,
                ttl_s=mark.ttl_s,
                now_s=now_s,
                cost_s=mark.saved_tokens / machine.prefill_tokens_per_s,
            ):
                self.habits.left(int(request.names[unit - 1]), mark.reason, now_s)

    def look(self, now_s: float) -> None:
        self.store.sweep(now_s)
        self.tally.bytes_kept_max = max(self.tally.bytes_kept_max, self.store.bytes_kept)

    def result(self) -> StrategyResult:
        tally, store, trace = self.tally, self.store, self.trace
        tokens, count = max(trace.num_tokens, 1), max(len(trace.requests), 1)
        ideal = ideal_hit_tokens(trace)
        return StrategyResult(
            strategy=str(self.strategy),
            num_requests=len(trace.requests),
            token_hit_rate=tally.hit_tokens / tokens,
            work_hit_rate=tally.spared_tokens / tokens,
            ideal_token_hit_rate=ideal / tokens,
            share_of_ideal=tally.hit_tokens / ideal if ideal else 1.0,
            work_share_of_ideal=tally.spared_tokens / ideal if ideal else 1.0,
            checkpoints_per_request=store.num_checkpoints_written / count,
            bytes_kept=store.bytes_kept,
            bytes_kept_max=tally.bytes_kept_max,
            checkpoint_bytes_kept=store.checkpoint_bytes_kept(),
            checkpoint_bytes_kept_max=tally.checkpoint_bytes_kept_max,
            bytes_written=store.bytes_written,
            checkpoint_bytes_written=store.checkpoint_bytes_written,
            recomputed_tokens=tally.recomputed_tokens,
            replayed_tokens=tally.replayed_tokens,
            refused=store.num_refused,
            ttft_p50_s=percentile(tally.ttft_s, 0.5),
            ttft_p90_s=percentile(tally.ttft_s, 0.9),
            ttft_p99_s=percentile(tally.ttft_s, 0.99),
            ttft_mean_s=sum(tally.ttft_s) / count,
            dollars=self.setup.card.dollars(
                hit_tokens=tally.spared_tokens, miss_tokens=trace.num_tokens - tally.spared_tokens
            ),
            plans=tally.plans,
            plan_error=sum(tally.errors) / count,
            reasons=self.habits.by_reason(),
        )

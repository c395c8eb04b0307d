"""The break-even table: for each prefix length, disk speed and reuse age, which strategy saves most time per stored
byte?

One prompt of P tokens was prefilled cold, and the strategy wrote its checkpoints. After `age_s` seconds a second prompt
comes. The second prompt continues from the end (the next turn), or differs from some position inside on (another
question, another document). Checkpoints that have expired by that age are gone. The real strategies decide what was
written, the real planner decides how to restore, and the model machine tells how long this takes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from antefix.text_table import text_table
from antefix.window import PromptFacts, RatePriors, Rates, RestorePlanner, Sizes, StoredPrefix, Strategy, parse
from antefix_simulate.machine import Machine, carry_out
from antefix_simulate.result_table import human_bytes

STRATEGIES = ("zero", "boundary", "auto", "periodic(8192)", "periodic(2048)", "full")
PREFIX_TOKENS = (1_024, 4_096, 16_384, 65_536, 262_144, 1_048_576)
DISK_BYTES_PER_S = (50e6, 500e6, 1.5e9, 6e9)
AGES_S = (60.0, 1_800.0, 6 * 3600.0, 48 * 3600.0)
# Tokens after the shared prefix: the next turn's own tokens, and equally many after a fork, so that the columns
# compare.
STEP_TOKENS = 512
# Forks are at these shares of the prefix: evenly spread, because the table should not assume auto's rules, and never at
# round fractions, where periodic checkpoints happen to be (golden-ratio steps).
LEAVES = tuple((0.5 + i * 0.618_033_988_75) % 1 for i in range(32))


@dataclass(frozen=True, slots=True, kw_only=True)
class PointOutcome:
    """One strategy at one point of the table. stored_bytes: the bytes stored at that age. *_saved_s: the time saved
    against a cold run of the same request.
    """

    strategy: str
    stored_bytes: int
    continue_ttft_s: float
    continue_saved_s: float
    leave_ttft_s: float
    leave_saved_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakEven:
    """All strategies at one point of the table, and the best ones: `*_fastest` by time, `*_per_byte` by seconds saved
    per stored byte.

    The best is "none" if no strategy is faster than a cold run. Among equal strategies, the one that stores least is
    the best.
    """

    prefix_tokens: int
    disk_bytes_per_s: float
    age_s: float
    outcomes: tuple[PointOutcome, ...]
    continue_fastest: str
    continue_per_byte: str
    leave_fastest: str
    leave_per_byte: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def break_even(
    sizes: Sizes,
    machine: Machine,
    *,
    prefixes: Sequence[int] = PREFIX_TOKENS,
    disks: Sequence[float] = DISK_BYTES_PER_S,
    ages: Sequence[float] = AGES_S,
) -> list[BreakEven]:
    """The table for every combination, grouped by disk. The disk speed and the jitter of the machine itself are not
    used.
    """
    strategies = [parse(name) for name in STRATEGIES]
    rows = []
    for disk in disks:
        exact = replace(machine, disk_bytes_per_s=disk, jitter=0.0)
        planner = _planner(sizes, exact)
        for tokens in prefixes:
            for age_s in ages:
                outcomes = tuple(_outcome(strategy, tokens, age_s, planner, exact) for strategy in strategies)
                rows.append(_row(tokens, disk, age_s, outcomes))
    return rows


def chance_needed(sizes: Sizes, gap_tokens: int) -> float:
    """The chance of use, relative to that of its blocks, above which a checkpoint is worth its bytes.

    A checkpoint `gap_tokens` after the previous one saves that many tokens when it is used, but at most the work of a
    replay. A block saves the tokens that it holds. At the returned ratio, a byte of checkpoint saves as much as a byte
    of block, whatever the machine's speed.
    """
    saved = min(gap_tokens, sizes.exact_replay_work_tokens)
    if not saved:
        # With a single layer, a replay runs no query, so checkpoints save nothing.
        return math.inf
    return (sizes.checkpoint_bytes / saved) / (sizes.block_bytes / sizes.block_size)


def break_even_text(rows: Sequence[BreakEven]) -> str:
    """The winners as a table."""
    head = ["prefix", "disk", "age", "next turn: fastest", "per byte", "left inside: fastest", "per byte"]
    table = []
    for row in rows:
        table.append(
            [
                f"{row.prefix_tokens}",
                f"{human_bytes(row.disk_bytes_per_s)}/s",
                human_age(row.age_s),
                row.continue_fastest,
                row.continue_per_byte,
                row.leave_fastest,
                row.leave_per_byte,
            ]
        )
    return text_table(head, table)


def _planner(sizes: Sizes, machine: Machine) -> RestorePlanner:
    """A planner that knows the machine's speeds: its rates are fitted to the machine's own times."""
    rates = Rates(RatePriors(prefill_tokens_per_s=machine.prefill_tokens_per_s))
    for _ in range(3):
        for tokens in (128, 4_096, 65_536, 1_048_576):
            rates.observe_prefill(tokens, context=0, seconds=machine.compute_s(tokens, context=0))
            rates.observe_prefill(tokens, context=500_000, seconds=machine.compute_s(tokens, context=500_000))
            rates.observe_load("disk", tokens * 1000, machine.load_s("disk", tokens * 1000))
            rates.observe_load("pool", tokens * 1000, machine.load_s("pool", tokens * 1000))
    return RestorePlanner(sizes, rates)


def _outcome(strategy: Strategy, tokens: int, age_s: float, planner: RestorePlanner, machine: Machine) -> PointOutcome:
    sizes = planner.sizes
    # 1. What the first request wrote, and what of it has not expired.
    marks = strategy.at_prompt(PromptFacts(num_tokens=tokens, num_stored_blocks=0, resume_block=0), sizes)
    alive = {mark.block: mark.tier.value for mark in marks if mark.ttl_s > age_s}
    num_blocks = tokens // sizes.block_size
    stored = num_blocks * sizes.block_bytes + len(alive) * sizes.checkpoint_bytes

    def ttft_s(shared_tokens: int, checkpoints: dict[int, str]) -> tuple[float, float]:
        shared = shared_tokens // sizes.block_size
        prefix = StoredPrefix(
            num_tokens=shared_tokens + STEP_TOKENS,
            num_blocks=shared,
            checkpoints=checkpoints,
        )
        decision = planner.plan(prefix)
        rng = random.Random(0)
        seconds = carry_out(machine, sizes, decision.plan, rng).total_s
        return seconds, carry_out(machine, sizes, decision.cold, rng).total_s - seconds

    # 2. The next turn, and requests that differ from some position inside the prefix on.
    on = ttft_s(tokens, alive)
    left = [ttft_s(int(share * tokens), alive) for share in LEAVES]
    return PointOutcome(
        strategy=str(strategy),
        stored_bytes=stored,
        continue_ttft_s=on[0],
        continue_saved_s=on[1],
        leave_ttft_s=sum(seconds for seconds, _ in left) / len(left),
        leave_saved_s=sum(saved for _, saved in left) / len(left),
    )


def _row(tokens: int, disk: float, age_s: float, outcomes: tuple[PointOutcome, ...]) -> BreakEven:
    def winner(values: Sequence[float]) -> str:
        best = max(values)
        # Times within a thousandth are equal; then fewer stored bytes win.
        near = [o for o, value in zip(outcomes, values, strict=True) if value >= best - abs(best) / 1000]
        return min(near, key=lambda o: o.stored_bytes).strategy if best > 1e-9 else "none"

    on = [o.continue_saved_s for o in outcomes]
    left = [o.leave_saved_s for o in outcomes]
    stored = [max(o.stored_bytes, 1) for o in outcomes]
    return BreakEven(
        prefix_tokens=tokens,
        disk_bytes_per_s=disk,
        age_s=age_s,
        outcomes=outcomes,
        continue_fastest=winner(on),
        continue_per_byte=winner([saved / nbytes for saved, nbytes in zip(on, stored, strict=True)]),
        leave_fastest=winner(left),
        leave_per_byte=winner([saved / nbytes for saved, nbytes in zip(left, stored, strict=True)]),
    )


def human_age(seconds: float) -> str:
    """The age in minutes if it is below an hour, else in hours."""
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h"

"""Inputs and outputs of strategies: facts about a request, and marks for checkpoints. Only value types."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from antefix.errors import InternalError
from antefix.window.sizes import Sizes

HOUR_S = 3600.0
POOL_TTL_S = 600.0


class Tier(StrEnum):
    """Where a checkpoint goes. POOL: the window pool in memory, which is shared through Redis if several hosts run.
    DISK: the store.
    """

    POOL = "pool"
    DISK = "disk"


class Reason(StrEnum):
    """Why a checkpoint is left; shown by `antefix explain`."""

    PROMPT_END = "prompt_end"
    OUTPUT_END = "output_end"
    FORK = "fork"
    SPARSE = "sparse"
    PERIOD = "period"
    EVERY_BLOCK = "every_block"
    CLIENT = "client"


# How long after its last use a checkpoint is kept. Measured on agent traces, share of all uses of an end's checkpoint
# by its age: 95.7% within 5 min, 99.8% within 1 h, all but 0.02% within 4 h; of a fork's: 89% within 1 h, 98% within
# 4 h, all within 24 h (docs/results/window_state.md, "Reuse age"; benchmarks/trace_habits.py).
TTL_S: dict[Reason, float] = {
    Reason.PROMPT_END: 4 * HOUR_S,
    Reason.OUTPUT_END: 4 * HOUR_S,
    Reason.FORK: 24 * HOUR_S,
    Reason.SPARSE: 24 * HOUR_S,
    Reason.PERIOD: 24 * HOUR_S,
    Reason.EVERY_BLOCK: 24 * HOUR_S,
}


# Of 100 sparse marks 3 to 6 are ever resumed from, of 100 ends 18 to 95, of 100 forks 10 to 75
# (benchmarks/trace_habits.py).
SPARSE_CHANCE = 1 / 8
_RESUME_POINTS = (Reason.PROMPT_END, Reason.OUTPUT_END, Reason.FORK)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """Leave a checkpoint after `block` blocks.

    saved_tokens: how many tokens of computation the checkpoint is expected to save. Eviction uses this number: the
    record's cost_s is the time to compute so many tokens.
    """

    block: int
    reason: Reason
    tier: Tier
    ttl_s: float
    saved_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetState:
    """The bytes of checkpoints that the namespace holds, and the limit (None: the store's own budget is the limit).

    turnover_s: the turnover time of the store (`Turnover.seconds`); None while the store has room or the time is not
    known.
    """

    used_bytes: int = 0
    limit_bytes: int | None = None
    turnover_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptFacts:
    """What is known when a prompt's restore has been planned. Boundaries are numbers of blocks from the start.

    num_tokens: the length of the prompt. num_stored_blocks: its longest stored prefix, before this request.
    resume_block: the boundary where the plan resumes; window state at boundaries before it will not be available.
    checkpoints: boundaries that have a checkpoint already. align_blocks: in reproducible mode, the prefill chunk in
    blocks; 1 otherwise.
    """

    num_tokens: int
    num_stored_blocks: int
    resume_block: int
    checkpoints: tuple[int, ...] = ()
    align_blocks: int = 1
    budget: BudgetState = BudgetState()

    def __post_init__(self) -> None:
        if self.num_tokens < 0 or not 0 <= self.resume_block <= self.num_stored_blocks or self.align_blocks < 1:
            raise InternalError(f"contradictory prompt facts: {self!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFacts:
    """What is known when an output has ended: `num_tokens` counts prompt and output, prompt_tokens the prompt alone."""

    num_tokens: int
    prompt_tokens: int
    align_blocks: int = 1
    budget: BudgetState = BudgetState()

    def __post_init__(self) -> None:
        if not 0 <= self.prompt_tokens <= self.num_tokens or self.align_blocks < 1:
            raise InternalError(f"contradictory output facts: {self!r}")


class Strategy(Protocol):
    """str(strategy) is a text that parses back to an equal strategy."""

    def at_prompt(self, facts: PromptFacts, sizes: Sizes) -> tuple[Mark, ...]:
        """Checkpoints to leave while prefilling: ascending boundaries in [resume_block, end], none stored yet.

        A checkpoint at `resume_block` itself is asked for only after a replay, because the state is exact there before
        the first new token.
        """

    def at_output(self, facts: OutputFacts, sizes: Sizes) -> tuple[Mark, ...]:
        """Checkpoints to leave in the output, at block boundaries after the prompt's last boundary, in
        ascending order.
        """


def aligned(block: int, align_blocks: int) -> int:
    return block // align_blocks * align_blocks


def prompt_marks(
    facts: PromptFacts, sizes: Sizes, wanted: Iterable[tuple[int, Reason]], *, ends: Tier = Tier.DISK
) -> tuple[Mark, ...]:
    """Marks of the wanted boundaries in ascending order, each boundary once (the first reason counts), without
    boundaries that are stored already or that the state does not pass through. ends: the tier of marks at ends; all
    others go to disk.
    """
    stored = set(facts.checkpoints)
    reasons: dict[int, Reason] = {}
    for block, reason in wanted:
        if block > 0 and block >= facts.resume_block and block not in stored:
            reasons.setdefault(block, reason)
    before = max((block for block in stored if block <= facts.resume_block), default=0)
    return _chained(sizes, sorted(reasons.items()), before, ends)


def output_marks(
    facts: OutputFacts, sizes: Sizes, wanted: Iterable[tuple[int, Reason]], *, ends: Tier = Tier.DISK
) -> tuple[Mark, ...]:
    """Marks in ascending order; the rest of the prompt is taken to end at its last boundary."""
    return _chained(sizes, sorted(wanted), facts.prompt_tokens // sizes.block_size, ends)


def _chained(sizes: Sizes, wanted: Iterable[tuple[int, Reason]], before: int, ends: Tier) -> tuple[Mark, ...]:
    marks = []
    for block, reason in wanted:
        # Without an end or a fork a hit there is replayed: the checkpoints before are older and go first.
        since = 0 if reason in _RESUME_POINTS else before
        saved = min((block - since) * sizes.block_size, sizes.exact_replay_work_tokens)
        if reason is Reason.SPARSE:
            saved = round(saved * SPARSE_CHANCE)
        tier = ends if reason in (Reason.PROMPT_END, Reason.OUTPUT_END) else Tier.DISK
        ttl_s = min(TTL_S[reason], POOL_TTL_S) if tier is Tier.POOL else TTL_S[reason]
        marks.append(Mark(block=block, reason=reason, tier=tier, ttl_s=ttl_s, saved_tokens=saved))
        before = block
    return tuple(marks)

"""The strategy `auto`: few checkpoints, where requests are seen to resume (docs/WINDOW_STATE.md, "auto").

    ends     of prompt and output: where the next turn of a conversation resumes.
    forks    where a second request leaves a stored prefix: the third will leave it there too.
    sparse   where a first request is likely to leave a long stretch of new ground: near its end (another question on
             one document), soon after its start (another document after one preamble), in the middle if it is long;
             and a little after an unforeseen fork, since who rewrites a prompt's tail once does so every turn.
What lies between is replayed or prefilled, whichever the planner finds cheaper; a replay bounds the loss of any miss.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from antefix.errors import ConfigError
from antefix.window.fixed import output_end
from antefix.window.marks import (
    BudgetState,
    Mark,
    OutputFacts,
    PromptFacts,
    Reason,
    Tier,
    aligned,
    output_marks,
    prompt_marks,
)
from antefix.window.sizes import Sizes

# The last tokens of a prompt are the template's cue to answer; the next turn writes them differently, and a boundary
# that they touch is missed by the whole gap. Of 162 prompts in Claude Code traces that were at most 1 token longer than
# whole 64-token blocks, 157 were left one block early, of 5,157 others 53: two tokens change.
CUE_TOKENS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseRule:
    """When a prompt adds at least `stretch_tokens` new tokens, a checkpoint is left at the fraction `fraction` of them,
    or a number of tokens before their end.

    stretch_tokens: the smallest number of new tokens that gets a checkpoint. below_tokens: the smallest number that
    gets none any more; None: there is no such limit.
    """

    stretch_tokens: int
    below_tokens: int | None = None
    fraction: float | None = None
    before_end_tokens: int | None = None

    def holds(self, tokens: int) -> bool:
        return self.stretch_tokens <= tokens and (self.below_tokens is None or tokens < self.below_tokens)


# Where first requests leave a stretch, measured on chat, document and agent traces (benchmarks/trace_habits.py): in its
# first fifth, in its last 2,048 tokens, and long ones in the middle too; seldom a stretch below 8,192 tokens. Chat
# leaves 0.15 of its stretches up to 32,768 tokens and 0.04 of longer ones; agents leave 0.4 of those, early, but have
# so few that an early mark there would gain 0.01%. Each number moved by a sixth to a quarter changes no trace's hit
# rate by more than 0.1%, but for 6,144 instead of 8,192 before the end (chat 0.2% less).
SPARSE_RULES = (
    SparseRule(stretch_tokens=7_168, before_end_tokens=1_024),
    SparseRule(stretch_tokens=8_192, below_tokens=32_768, fraction=0.15),
    SparseRule(stretch_tokens=16_384, fraction=0.4),
    SparseRule(stretch_tokens=24_576, before_end_tokens=8_192),
)
# A client that drops part of its prompt in the next turn (search results, a tool's output) leaves its own stretch soon
# after where it left the one before. Of the chat trace's stretches of 4,096 tokens and more behind an unforeseen fork
# 28% are left inside, four fifths of them one unit of 512 tokens after the fork; of those behind an end 5%.
REWRITTEN_TOKENS = 4_096
AFTER_FORK_TOKENS = 512
# New ground is a stretch much longer than all before it, or very long: the steps of a running conversation are resumed
# from at their ends (agents left 3 of 167 steps of 8K to 16K tokens inside), so marks in them are mostly dead.
NEW_GROUND_RATIO = 10
NEW_GROUND_TOKENS = 32_768
# A store that writes its own size in less time takes sparse marks before they are used (most are used after minutes to
# hours), and each costs room for blocks: at a turnover of 2 to 5 min leaving none gains 0.2 to 2.6 points of hit rate.
TURNOVER_MIN_S = 600.0
# From half of the budget on nothing sparse is left any more, and all else for a shorter time: what is used lives on,
# because each use starts its time again, and what is dead makes room the sooner the less there is.
PRESSURE_FREE = 0.5
TTL_MIN_S = 60.0


_PRIORITY = (Reason.PROMPT_END, Reason.OUTPUT_END, Reason.FORK, Reason.SPARSE)


@dataclass(frozen=True, slots=True)
class Auto:
    """Checkpoints at ends, at forks and at sparse positions, within a byte budget: never more than fit into the budget,
    and ends first.

    budget_bytes: the limit on checkpoints of the namespace; None leaves the limit to the store. ends: the tier for
    checkpoints at ends of prompts and outputs. Those checkpoints are reused within minutes or never, so a window pool
    can spare the disk their writes.
        None leaves the tier to the deployment (`in_force`): the window pool if there is one, otherwise the disk.
    """

    budget_bytes: int | None = None
    ends: Tier | None = None

    def __post_init__(self) -> None:
        if self.budget_bytes is not None and self.budget_bytes < 0:
            raise ConfigError(
                f"the window strategy auto(budget=B) needs a budget of at least 0 bytes, is {self.budget_bytes}"
            )

    def at_prompt(self, facts: PromptFacts, sizes: Sizes) -> tuple[Mark, ...]:
        end = aligned(max(facts.num_tokens - CUE_TOKENS, 0) // sizes.block_size, facts.align_blocks)
        fork = aligned(facts.num_stored_blocks, facts.align_blocks)
        # A hit that ends at no checkpoint is where a stored prefix was left (or a checkpoint lost): either way the next
        # request like this one resumes here, and state passes through on the way.
        wanted = [(fork, Reason.FORK)] if fork < end else []
        wanted.append((end, Reason.PROMPT_END))
        turnover_s = facts.budget.turnover_s
        lasts = turnover_s is None or turnover_s >= TURNOVER_MIN_S
        if lasts and self._pressure(facts.budget) <= PRESSURE_FREE:
            start = max(fork, facts.resume_block)
            sparse = _sparse_blocks(start, end, facts, sizes)
            if fork < end:
                sparse += _after_fork(fork, end, facts, sizes)
            wanted += [(block, Reason.SPARSE) for block in sparse]
        return self._within(facts.budget, sizes, prompt_marks(facts, sizes, wanted, ends=self._ends))

    def at_output(self, facts: OutputFacts, sizes: Sizes) -> tuple[Mark, ...]:
        marks = output_marks(facts, sizes, output_end(facts, sizes), ends=self._ends)
        return self._within(facts.budget, sizes, marks)

    @property
    def _ends(self) -> Tier:
        return self.ends or Tier.DISK

    def _limit_bytes(self, budget: BudgetState) -> int | None:
        limits = [limit for limit in (self.budget_bytes, budget.limit_bytes) if limit is not None]
        return min(limits, default=None)

    def _pressure(self, budget: BudgetState) -> float:
        """The share of the limit that is used: 0 without a limit, 1 at the limit."""
        limit = self._limit_bytes(budget)
        return 0.0 if limit is None else min(budget.used_bytes / max(limit, 1), 1.0)

    def _within(self, budget: BudgetState, sizes: Sizes, marks: tuple[Mark, ...]) -> tuple[Mark, ...]:
        limit = self._limit_bytes(budget)
        if limit is None:
            return marks
        room = max(limit - budget.used_bytes, 0) // sizes.checkpoint_bytes
        first = sorted(marks, key=lambda mark: (_PRIORITY.index(mark.reason), -mark.block))[:room]
        share = min((1 - self._pressure(budget)) / (1 - PRESSURE_FREE), 1.0)
        kept = [replace(mark, ttl_s=max(mark.ttl_s * share, TTL_MIN_S)) for mark in first]
        return tuple(sorted(kept, key=lambda mark: mark.block))

    def __str__(self) -> str:
        args = [] if self.budget_bytes is None else [f"budget={self.budget_bytes}"]
        args += [] if self.ends is None else [f"ends={self.ends}"]
        return f"auto({', '.join(args)})" if args else "auto"


def _sparse_blocks(start: int, end: int, facts: PromptFacts, sizes: Sizes) -> list[int]:
    stretch = end - start
    if stretch <= NEW_GROUND_RATIO * start and stretch * sizes.block_size < NEW_GROUND_TOKENS:
        return []
    blocks = []
    for rule in SPARSE_RULES:
        if not rule.holds(stretch * sizes.block_size):
            continue
        if rule.fraction is not None:
            blocks.append(start + int(rule.fraction * stretch))
        if rule.before_end_tokens is not None:
            blocks.append(end - sizes.blocks_up(rule.before_end_tokens))
    return [aligned(block, facts.align_blocks) for block in blocks if block > start]


def _after_fork(fork: int, end: int, facts: PromptFacts, sizes: Sizes) -> list[int]:
    # One block after a checkpoint is no fork: the checkpoint was left so early for the template's cue.
    before = max((block for block in facts.checkpoints if block <= fork), default=0)
    if fork - before < 2 or (end - fork) * sizes.block_size < REWRITTEN_TOKENS:
        return []
    block = aligned(fork + sizes.blocks_up(AFTER_FORK_TOKENS), facts.align_blocks)
    return [block] if block > fork else []

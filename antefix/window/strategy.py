"""Strategies: at which block boundaries a request leaves a checkpoint, in which tier and for how long.

A strategy is a value; its two methods are pure functions of what the worker knows at two moments: when a prompt's
restore has been planned (state passes through every boundary from `resume_block` on, so each can be kept without
recomputing anything), and when an output has ended. What was stored under one strategy stays usable under any other:
strategies decide writes, the planner reads whatever there is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from antefix.errors import ConfigError, InvalidRequest
from antefix.window.sizes import Sizes

MINUTE_S = 60.0
HOUR_S = 3600.0
# 95% of agents' hit tokens are reused within five minutes, 99.8% within an hour (docs/WINDOW_STATE.md, "Reuse age").
POOL_TTL_S = 10 * MINUTE_S
DISK_TTL_S = 4 * HOUR_S


class Tier(StrEnum):
    """Where a checkpoint goes. POOL: memory, shared through Redis where several hosts run. DISK: the store."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """Leave a checkpoint after `block` blocks."""

    block: int
    reason: Reason
    tier: Tier
    ttl_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetState:
    """Bytes of checkpoints that the namespace holds, and may hold (None: whatever the store's own budget allows)."""

    used_bytes: int = 0
    limit_bytes: int | None = None

    @property
    def pressure(self) -> float:
        """0 with nothing used or no limit, 1 at the limit."""
        if self.limit_bytes is None:
            return 0.0
        return min(self.used_bytes / max(self.limit_bytes, 1), 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptFacts:
    """What is known when a prompt's restore has been planned. Boundaries are numbers of blocks from the start.

    num_tokens: of the prompt.  num_stored_blocks: its longest stored prefix, before this request.
    resume_block: the plan's; window state at boundaries before it will not be in hand.
    checkpoints: boundaries at most num_stored_blocks that have a checkpoint already, ascending.
    align_blocks: in reproducible mode, the prefill chunk in blocks; 1 elsewhere.
    """

    num_tokens: int
    num_stored_blocks: int
    resume_block: int
    checkpoints: tuple[int, ...] = ()
    align_blocks: int = 1
    budget: BudgetState = BudgetState()

    def __post_init__(self) -> None:
        if self.num_tokens < 0 or not 0 <= self.resume_block <= self.num_stored_blocks or self.align_blocks < 1:
            raise InvalidRequest(f"contradictory prompt facts: {self!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFacts:
    """What is known when an output has ended: `num_tokens` counts prompt and output, prompt_tokens the prompt alone."""

    num_tokens: int
    prompt_tokens: int
    align_blocks: int = 1
    budget: BudgetState = BudgetState()

    def __post_init__(self) -> None:
        if not 0 <= self.prompt_tokens <= self.num_tokens or self.align_blocks < 1:
            raise InvalidRequest(f"contradictory output facts: {self!r}")


class Strategy(Protocol):
    """str(strategy) parses back to an equal strategy."""

    def at_prompt(self, facts: PromptFacts, sizes: Sizes) -> tuple[Mark, ...]:
        """Checkpoints to leave while prefilling: ascending boundaries in [resume_block, end], none stored yet.

        One at `resume_block` itself is asked for only after a replay: state is exact there, before the first new token.
        """

    def at_output(self, facts: OutputFacts, sizes: Sizes) -> tuple[Mark, ...]:
        """Checkpoints to leave of the output: ascending boundaries after the prompt's last one."""


@dataclass(frozen=True, slots=True)
class Zero:
    """Never any: a hit is replayed."""

    def at_prompt(self, facts: PromptFacts, sizes: Sizes) -> tuple[Mark, ...]:
        return ()

    def at_output(self, facts: OutputFacts, sizes: Sizes) -> tuple[Mark, ...]:
        return ()

    def __str__(self) -> str:
        return "zero"


@dataclass(frozen=True, slots=True)
class Full:
    """Every block boundary: nothing is ever recomputed, at about seven times global KV's bytes."""

    def at_prompt(self, facts: PromptFacts, sizes: Sizes) -> tuple[Mark, ...]:
        return _multiples(facts, sizes, facts.align_blocks, Reason.EVERY_BLOCK)

    def at_output(self, facts: OutputFacts, sizes: Sizes) -> tuple[Mark, ...]:
        return _output_multiples(facts, sizes, facts.align_blocks, Reason.EVERY_BLOCK)

    def __str__(self) -> str:
        return "full"


@dataclass(frozen=True, slots=True)
class Periodic:
    """Every `period_tokens`, counted from token 0, so that sequences that share a prefix share its checkpoints."""

    period_tokens: int

    def __post_init__(self) -> None:
        if self.period_tokens < 1:
            raise ConfigError(f"periodic(p) needs a positive p, is {self.period_tokens}")

    def at_prompt(self, facts: PromptFacts, sizes: Sizes) -> tuple[Mark, ...]:
        return _multiples(facts, sizes, self._step(facts.align_blocks, sizes), Reason.PERIOD)

    def at_output(self, facts: OutputFacts, sizes: Sizes) -> tuple[Mark, ...]:
        return _output_multiples(facts, sizes, self._step(facts.align_blocks, sizes), Reason.PERIOD)

    def _step(self, align_blocks: int, sizes: Sizes) -> int:
        blocks = sizes.blocks_up(self.period_tokens)
        return -(-blocks // align_blocks) * align_blocks

    def __str__(self) -> str:
        return f"periodic({self.period_tokens})"


@dataclass(frozen=True, slots=True)
class Boundary:
    """The end of the prompt and the end of the output: what the next turn of a conversation resumes from."""

    def at_prompt(self, facts: PromptFacts, sizes: Sizes) -> tuple[Mark, ...]:
        end = _aligned(facts.num_tokens // sizes.block_size, facts.align_blocks)
        return _unstored(facts, [(end, Reason.PROMPT_END)])

    def at_output(self, facts: OutputFacts, sizes: Sizes) -> tuple[Mark, ...]:
        return _output_end(facts, sizes)

    def __str__(self) -> str:
        return "boundary"


# The last tokens of a prompt are the template's cue to answer; the next turn writes them differently, and a boundary
# that they touch is missed by the whole gap. Of 162 prompts in Claude Code traces that were at most 1 token longer than
# whole 64-token blocks, 157 were left one block early, of 5,160 others 53: two tokens change.
CUE_TOKENS = 2
# Sparse marks lie at end - 2048 * 4^k: requests leave a stored prefix near its end (another question on one document)
# more often than in its middle, so density falls with the distance from the end.
SPARSE_NEAREST_TOKENS = 2048
SPARSE_RATIO = 4


@dataclass(frozen=True, slots=True)
class Auto:
    """Boundaries, forks and sparse marks, within a byte budget (docs/WINDOW_STATE.md, "auto").

    budget_bytes: of checkpoints that the namespace may hold; None leaves it to the store.
    """

    budget_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.budget_bytes is not None and self.budget_bytes < 0:
            raise ConfigError(f"auto(budget=B) needs a budget of at least 0 bytes, is {self.budget_bytes}")

    def at_prompt(self, facts: PromptFacts, sizes: Sizes) -> tuple[Mark, ...]:
        end = _aligned(max(facts.num_tokens - CUE_TOKENS, 0) // sizes.block_size, facts.align_blocks)
        fork = _aligned(facts.num_stored_blocks, facts.align_blocks)
        marks = [(end, Reason.PROMPT_END)]
        # A hit that ends at no checkpoint is where a stored prefix was left (or a checkpoint lost): either way the next
        # request like this one resumes here, and state passes through on the way.
        if fork < end:
            marks.append((fork, Reason.FORK))
        if self._room(facts.budget, sizes):
            marks += [
                (block, Reason.SPARSE) for block in _sparse_blocks(max(fork, facts.resume_block), end, facts, sizes)
            ]
        return _unstored(facts, marks)

    def at_output(self, facts: OutputFacts, sizes: Sizes) -> tuple[Mark, ...]:
        return _output_end(facts, sizes)

    def _room(self, budget: BudgetState, sizes: Sizes) -> bool:
        """Sparse marks are the first to go: below a tenth of free budget, ends and forks only."""
        limits = [limit for limit in (self.budget_bytes, budget.limit_bytes) if limit is not None]
        return not limits or budget.used_bytes + sizes.checkpoint_bytes <= 0.9 * min(limits)

    def __str__(self) -> str:
        return "auto" if self.budget_bytes is None else f"auto(budget={self.budget_bytes})"


_CALL = re.compile(r"\s*(?P<name>[a-z]+)\s*(?:\(\s*(?P<args>[^()]*?)\s*\))?\s*")
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[kmgt]i?b?)?", re.IGNORECASE)
_UNITS: dict[str, int] = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY_UNITS: dict[str, int] = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def parse(text: str) -> Strategy:
    """`full`, `periodic(8192)`, `boundary`, `auto`, `auto(budget=20GiB)` or `zero`.

    Raises:  ConfigError: anything else; the message lists what is accepted.
    """
    match = _CALL.fullmatch(text)
    name, args = (match["name"], match["args"] or "") if match else ("", "")
    plain: dict[str, Strategy] = {"full": Full(), "boundary": Boundary(), "auto": Auto(), "zero": Zero()}
    if name in plain and not args:
        return plain[name]
    if name == "periodic" and args.isdecimal():
        return Periodic(int(args))
    if name == "auto" and args.startswith("budget="):
        return Auto(budget_bytes=_parse_bytes(args.removeprefix("budget=")))
    raise ConfigError(
        f"unknown window strategy {text!r}: use full, periodic(TOKENS), boundary, auto, auto(budget=BYTES) or zero"
    )


def _parse_bytes(text: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"not a number of bytes: {text!r} (use 1000000, 20GB or 20GiB)")
    unit = (match["unit"] or "").lower().removesuffix("b")
    scale = _BINARY_UNITS[unit[0]] if unit.endswith("i") else _UNITS[unit]
    return int(float(match["number"]) * scale)


class Strategies:
    """Which strategy each namespace uses now. `set` counts from the next request on; nothing stored is lost by it."""

    def __init__(self, default: Strategy | None = None) -> None:
        self._default: Strategy = default or Auto()
        self._by_namespace: dict[str, Strategy] = {}

    def of(self, namespace: str) -> Strategy:
        return self._by_namespace.get(namespace, self._default)

    def set(self, namespace: str, strategy: Strategy) -> None:
        self._by_namespace[namespace] = strategy

    def as_dict(self) -> dict[str, str]:
        """Namespace to strategy, "*" for the default: what an operator is shown."""
        return {"*": str(self._default)} | {name: str(value) for name, value in sorted(self._by_namespace.items())}


_TIER_OF: dict[Reason, tuple[Tier, float]] = {
    # Ends are reused within minutes or never: memory. What several requests come back to goes to disk.
    Reason.PROMPT_END: (Tier.POOL, POOL_TTL_S),
    Reason.OUTPUT_END: (Tier.POOL, POOL_TTL_S),
    Reason.FORK: (Tier.DISK, DISK_TTL_S),
    Reason.SPARSE: (Tier.DISK, DISK_TTL_S),
    Reason.PERIOD: (Tier.DISK, DISK_TTL_S),
    Reason.EVERY_BLOCK: (Tier.DISK, DISK_TTL_S),
}


def _mark(block: int, reason: Reason) -> Mark:
    tier, ttl_s = _TIER_OF[reason]
    return Mark(block=block, reason=reason, tier=tier, ttl_s=ttl_s)


def _aligned(block: int, align_blocks: int) -> int:
    return block // align_blocks * align_blocks


def _unstored(facts: PromptFacts, marks: list[tuple[int, Reason]]) -> tuple[Mark, ...]:
    """Ascending, each boundary once (first reason wins), none that is stored or that state does not pass through."""
    stored = set(facts.checkpoints)
    reasons: dict[int, Reason] = {}
    for block, reason in marks:
        if block > 0 and block >= facts.resume_block and block not in stored:
            reasons.setdefault(block, reason)
    return tuple(_mark(block, reason) for block, reason in sorted(reasons.items()))


def _multiples(facts: PromptFacts, sizes: Sizes, step: int, reason: Reason) -> tuple[Mark, ...]:
    end = facts.num_tokens // sizes.block_size
    first = -(-max(facts.resume_block, 1) // step) * step
    return _unstored(facts, [(block, reason) for block in range(first, end + 1, step)])


def _output_multiples(facts: OutputFacts, sizes: Sizes, step: int, reason: Reason) -> tuple[Mark, ...]:
    first = (facts.prompt_tokens // sizes.block_size // step + 1) * step
    return tuple(_mark(block, reason) for block in range(first, facts.num_tokens // sizes.block_size + 1, step))


def _output_end(facts: OutputFacts, sizes: Sizes) -> tuple[Mark, ...]:
    end = _aligned(facts.num_tokens // sizes.block_size, facts.align_blocks)
    # An output that closes no block ends where the prompt's checkpoint already is.
    return (_mark(end, Reason.OUTPUT_END),) if end > facts.prompt_tokens // sizes.block_size else ()


def _sparse_blocks(start: int, end: int, facts: PromptFacts, sizes: Sizes) -> list[int]:
    """Boundaries at growing distances before `end`, as long as each saves at least half its distance over `start`."""
    blocks = []
    distance = sizes.blocks_up(SPARSE_NEAREST_TOKENS)
    while end - distance > start + distance // 2:
        blocks.append(_aligned(end - distance, facts.align_blocks))
        distance *= SPARSE_RATIO
    return blocks

"""What a worker with empty memory would do with a prompt: the plans that it would weigh, and why the rest misses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from antefix.explain.evidence import BlockEvidence, State
from antefix.window import Decision, Plan, RestorePlanner, Sizes, StoredPrefix, Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """miss_reason: of the first whole block that is not hit; "" where only the prompt's last tokens are left."""

    num_tokens: int
    sizes: Sizes
    blocks: tuple[BlockEvidence, ...]
    decision: Decision
    miss_reason: str
    miss_detail: str

    @property
    def num_stored_blocks(self) -> int:
        return next((block.index for block in self.blocks if block.state is not State.STORED), len(self.blocks))

    @property
    def checkpoints(self) -> tuple[int, ...]:
        """Boundaries within the stored prefix that have a checkpoint, in blocks."""
        return tuple(block.index + 1 for block in self.blocks[: self.num_stored_blocks] if block.checkpoint is not None)

    @property
    def hit_tokens(self) -> int:
        return self.decision.plan.resume_block * self.sizes.block_size

    def as_dict(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.num_tokens,
            "block_size": self.sizes.block_size,
            "num_blocks": len(self.blocks),
            "stored_blocks": self.num_stored_blocks,
            "stored_tokens": self.num_stored_blocks * self.sizes.block_size,
            "checkpoints": [block * self.sizes.block_size for block in self.checkpoints],
            "hit_tokens": self.hit_tokens,
            "miss_tokens": self.num_tokens - self.hit_tokens,
            "miss_reason": self.miss_reason,
            "miss_detail": self.miss_detail,
            "plan": _plan(self.decision.plan, self.sizes),
            "plans": [_plan(plan, self.sizes) for plan in self.decision.plans],
            "blocks": [_block(block, self.sizes.block_size) for block in self.blocks],
        }


def explain(
    num_tokens: int, blocks: Sequence[BlockEvidence], planner: RestorePlanner, *, bounded_windows: int = 0
) -> Explanation:
    """Plan as a worker does. The planner's rates are the caller's: measured ones, or beliefs."""
    sizes = planner.sizes
    num_stored = next((block.index for block in blocks if block.state is not State.STORED), len(blocks))
    stored = StoredPrefix(
        num_tokens=num_tokens,
        num_blocks=num_stored,
        checkpoints={block.index + 1: Tier.DISK.value for block in blocks[:num_stored] if block.checkpoint is not None},
        blocks_tier=Tier.DISK.value,
        bounded_windows=bounded_windows,
    )
    decision = planner.plan(stored)
    reason, detail = _miss(num_tokens, blocks, decision, num_stored, sizes)
    return Explanation(
        num_tokens=num_tokens,
        sizes=sizes,
        blocks=tuple(blocks),
        decision=decision,
        miss_reason=reason,
        miss_detail=detail,
    )


def _miss(
    num_tokens: int, blocks: Sequence[BlockEvidence], decision: Decision, num_stored: int, sizes: Sizes
) -> tuple[str, str]:
    """The first missed block's reason, by the same rules as a worker's report."""
    hit, full = decision.plan.resume_block, (num_tokens - 1) // sizes.block_size
    if full == 0:
        return "below_minimum", f"a hit needs a whole block of {sizes.block_size} tokens and one token more"
    if hit >= full:
        return "", ""
    if hit >= num_stored:
        return blocks[hit].state.value, blocks[hit].detail
    nearest = max((block.index + 1 for block in blocks[:num_stored] if block.checkpoint is not None), default=0)
    if hit:
        detail = f"the last checkpoint is after {nearest * sizes.block_size} tokens, and prefilling from there is"
        return "window_missing", f"{detail} predicted faster than replaying {sizes.replay_tokens} tokens at the end"
    detail = f"no checkpoint within the stored prefix, and replaying {sizes.replay_tokens} tokens is predicted slower"
    return "window_missing", f"{detail} than starting cold" if not nearest else "starting cold is predicted fastest"


def _plan(plan: Plan, sizes: Sizes) -> dict[str, Any]:
    fields = asdict(plan)
    fields["kind"] = plan.kind.value
    fields["resume_tokens"] = plan.resume_block * sizes.block_size
    return fields


def _block(block: BlockEvidence, block_size: int) -> dict[str, Any]:
    return {
        "index": block.index,
        "tokens": [block.index * block_size, (block.index + 1) * block_size],
        "hash": block.hash.hex(),
        "state": block.state.value,
        "detail": block.detail,
        "place": None if block.place is None else asdict(block.place),
        "checkpoint": None if block.checkpoint is None else asdict(block.checkpoint),
    }

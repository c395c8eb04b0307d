"""What a worker with empty memory would do with a prompt: the restore plans it would compare, and why the rest of the
prompt misses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from antefix.miss_reason import MissReason
from antefix.window import Decision, Plan, PlanKind, RestorePlanner, Sizes, StoredPrefix, Tier
from antefix_console.explain.block_evidence import BlockEvidence, Holdings


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """miss_reason: of the first whole block that is not hit; NONE if only the prompt's last tokens are not hit.

    pooled: boundaries, in blocks, whose checkpoint is in the window pool; None if no pool was asked or none answered.
    pool_error: why the pool did not answer.
    prefill_tokens_per_s: the prefill rate used for the predictions.
    absent_from: other names under which the tokens were looked for and not found.
    """

    num_tokens: int
    sizes: Sizes
    blocks: tuple[BlockEvidence, ...]
    decision: Decision
    miss_reason: MissReason
    miss_detail: str
    prefill_tokens_per_s: float
    pooled: tuple[int, ...] | None = None
    pool_error: str = ""
    absent_from: tuple[str, ...] = ()

    @property
    def num_stored_blocks(self) -> int:
        return next((block.index for block in self.blocks if block.reason is not MissReason.NONE), len(self.blocks))

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
            "pool_error": self.pool_error,
            "checkpoints_in_pool": None if self.pooled is None else [b * self.sizes.block_size for b in self.pooled],
            "hit_tokens": self.hit_tokens,
            "miss_tokens": self.num_tokens - self.hit_tokens,
            "miss_reason": self.miss_reason.value,
            "miss_detail": self.miss_detail,
            "absent_from": list(self.absent_from),
            "prefill_tokens_per_s": self.prefill_tokens_per_s,
            "plan": _plan(self.decision.plan, self.sizes),
            "plans": [_plan(plan, self.sizes) for plan in self.decision.plans],
            "blocks": [_block(block, self.sizes.block_size) for block in self.blocks],
        }


def explain(
    num_tokens: int,
    blocks: Sequence[BlockEvidence],
    planner: RestorePlanner,
    *,
    bounded_windows: int = 0,
    pooled: tuple[int, ...] | None = None,
    pool_error: str = "",
    holdings: Holdings | None = None,
    asked: Sequence[str] = (),
) -> Explanation:
    """Plan as a worker does. The planner predicts with the rates that the caller gives: measured ones, or defaults.

    pooled: boundaries whose checkpoint a window pool has; None if no pool was asked.  holdings: explains why nothing of
    the prompt is stored.  asked: labels of other names that the user asked about.
    """
    sizes = planner.sizes
    num_stored = next((block.index for block in blocks if block.reason is not MissReason.NONE), len(blocks))
    on_disk = {block.index + 1: Tier.DISK.value for block in blocks[:num_stored] if block.checkpoint is not None}
    in_pool = {block: Tier.POOL.value for block in pooled or () if block <= num_stored}
    stored = StoredPrefix(
        num_tokens=num_tokens,
        num_blocks=num_stored,
        checkpoints=on_disk | in_pool,
        blocks_tier=Tier.DISK.value,
        bounded_windows=bounded_windows,
    )
    decision = planner.plan(stored)
    reason, detail = _miss(num_tokens, blocks, stored, decision, sizes)
    if reason is MissReason.FIRST_SEEN and num_stored == 0 and holdings is not None and not holdings.is_known:
        reason, detail = _stranger(holdings)
    return Explanation(
        num_tokens=num_tokens,
        sizes=sizes,
        blocks=tuple(blocks),
        decision=decision,
        miss_reason=reason,
        miss_detail=detail,
        prefill_tokens_per_s=planner.rates.prefill_tokens_per_s,
        pooled=pooled,
        pool_error=pool_error,
        absent_from=tuple(label for label in asked if not any(b.detail.endswith(f"under {label}") for b in blocks)),
    )


def _stranger(holdings: Holdings) -> tuple[MissReason, str]:
    """The reason if this store never had any record under the prompt's fingerprint."""
    if not holdings.num_others:
        return MissReason.FIRST_SEEN, "the store is empty"
    others = "another one is" if holdings.num_others == 1 else f"{holdings.num_others} others are"
    return MissReason.FINGERPRINT_DIFFERS, f"nothing in this store has this prompt's fingerprint, but {others} there"


def _miss(
    num_tokens: int, blocks: Sequence[BlockEvidence], stored: StoredPrefix, decision: Decision, sizes: Sizes
) -> tuple[MissReason, str]:
    """The reason why the first missed block misses, by the rules of a worker's report."""
    hit, full = decision.plan.resume_block, (num_tokens - 1) // sizes.block_size
    if full == 0:
        return MissReason.BELOW_MINIMUM, f"a hit needs a whole block of {sizes.block_size} tokens and one token more"
    if hit >= full:
        return MissReason.NONE, ""
    if hit >= stored.num_blocks:
        return blocks[hit].reason, blocks[hit].detail
    return MissReason.WINDOW_MISSING, _no_state(hit, stored, decision, sizes)


def _no_state(hit: int, stored: StoredPrefix, decision: Decision, sizes: Sizes) -> str:
    """Why stored blocks after `hit` are computed again: no window state near them allows a resume that is fast
    enough.
    """
    end, size = stored.num_blocks, sizes.block_size
    nearest = max(stored.checkpoints, default=0)
    replay = next((plan for plan in decision.plans if plan.replay_tokens), None)
    if decision.plan.kind is PlanKind.COLD:
        ways = [f"resuming after {nearest * size} tokens"] * bool(nearest) + ["a replay"] * bool(replay)
        return f"{end * size} tokens are stored, but {' or '.join(ways)} is predicted slower than starting cold"
    detail = f"{end * size} tokens are stored, the last checkpoint is after {nearest * size}"
    if replay is None or hit != nearest:
        return detail
    return (
        f"{detail}; prefilling from there ({decision.plan.predicted_s:.3f} s) is predicted faster than replaying"
        f" {replay.replay_tokens} tokens at the end ({replay.predicted_s:.3f} s)"
    )


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
        "state": block.state,
        "detail": block.detail,
        "place": None if block.place is None else asdict(block.place),
        "checkpoint": None if block.checkpoint is None else asdict(block.checkpoint),
        "checkpoint_lost": block.checkpoint_lost,
        "store": block.store,
        "cached": block.cached,
    }

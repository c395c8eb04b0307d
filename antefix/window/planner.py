"""The restore planner: chooses the fastest way to get a prompt's KV.

From what is stored of the prompt, the planner predicts the time of each way to restore it, by measured rates and real
sizes (docs/WINDOW_STATE.md):
    CHECKPOINT  load global KV of [0, Q) and the checkpoint at Q, prefill [Q, N)
    REPLAY      load global KV of [0, P), replay the last replay_tokens before P (window state only), prefill [P, N)
    BOUNDED     the same with k windows instead: approximate, only where the namespace opted in
    COLD        prefill [0, N)
Decisions are recorded with their outcome; the error that follows from that is stated with every later plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from antefix.errors import InternalError
from antefix.window.rates import Rates
from antefix.window.sizes import Sizes

# Stated error before anything was measured: the priors may be wrong by a factor of two.
ERROR_UNKNOWN = 1.0
# The stated error is a fading maximum, not a mean: after about 70 plans, a large error still counts half.
ERROR_MEMORY = 0.99
_MEAN_MEMORY = 0.95


class PlanKind(StrEnum):
    CHECKPOINT = "checkpoint"
    REPLAY = "replay"
    BOUNDED = "bounded"
    COLD = "cold"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPrefix:
    """What is stored of one prompt. All block counts are numbers of leading blocks; a checkpoint is named by the number
    of blocks before it.

    checkpoints: block boundary -> tier that holds it ("pool", "disk", ...; the names that Rates knows).
    block_tiers: where several tiers hold parts, the tier of each stretch, with the number of blocks at its end; what
        they do not cover is in `blocks_tier`.
    num_resident_blocks: leading blocks that are in the worker's memory already and need no load.
    resident_checkpoints: boundaries whose window state is in the worker's memory.
    replay: whether an exact replay may be planned.
    bounded_windows: k of an opted-in namespace; 0 forbids approximate plans.
    """

    num_tokens: int
    num_blocks: int
    checkpoints: Mapping[int, str] = field(default_factory=dict)
    blocks_tier: str = "disk"
    block_tiers: tuple[tuple[int, str], ...] = ()
    num_resident_blocks: int = 0
    resident_checkpoints: frozenset[int] = frozenset()
    replay: bool = True
    bounded_windows: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One way to restore a prompt, step by step: load blocks [0, resume_block), then run tokens.

    resume_block: boundary from which global KV is computed and written; blocks before it are only read.
    replay_from_block: where a replay starts; equal to resume_block where there is none.
    replay_tokens: from there to resume_block.  replay_work_tokens: tokens of prefill that it takes as long as.
    checkpoint_tier: where the checkpoint at resume_block is read from; "" for none.
    load_bytes: from stores, resident ones excluded.  error_s: how far predicted_s may be off, by experience.
    """

    kind: PlanKind
    resume_block: int
    replay_from_block: int
    checkpoint_tier: str
    load_bytes: int
    replay_tokens: int
    replay_work_tokens: int
    prefill_tokens: int
    predicted_s: float
    error_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The chosen plan and all considered plans, fastest first; the last one need not be COLD."""

    plan: Plan
    plans: tuple[Plan, ...]

    @property
    def cold(self) -> Plan:
        return next(plan for plan in self.plans if plan.kind is PlanKind.COLD)

    @property
    def error_s(self) -> float:
        """By how much the chosen plan may turn out slower than a cold run, since both predictions may be off, each by
        its own error.
        """
        return self.plan.error_s + self.cold.error_s


@dataclass(slots=True)
class KindRecord:
    """How accurately one kind of restore plan was predicted. Prediction errors are relative: |actual - predicted| /
    predicted.
    """

    num_plans: int = 0
    num_outcomes: int = 0
    mean_error: float = 0.0
    stated_error: float = ERROR_UNKNOWN
    predicted_s: float = 0.0
    actual_s: float = 0.0


class RestorePlanner:
    """Chooses restore plans by predicted seconds, and learns from their outcomes. There is one planner per worker and
    model; threads do not share it.

    align_tokens: in reproducible mode the prefill chunk, so that a hit resumes only where a cold run starts a chunk. A
        replay then makes the same calls as a cold run: every token through every layer.
    """

    def __init__(self, sizes: Sizes, rates: Rates, *, align_tokens: int = 1) -> None:
        if align_tokens < 1:
            raise InternalError(f"align_tokens must be positive, is {align_tokens}")
        self.sizes = sizes
        self.rates = rates
        self.records: dict[PlanKind, KindRecord] = {kind: KindRecord() for kind in PlanKind}
        self._is_whole = align_tokens > 1
        # Smallest number of blocks whose end is a multiple of align_tokens.
        self._step = 1
        while self._step * sizes.block_size % align_tokens:
            self._step += 1

    def plan(self, stored: StoredPrefix) -> Decision:
        """Predict the cost of every way and take the cheapest, which is counted; of two equal ways, the one that
        computes less is taken.

        Raises:  InternalError: as `weigh`.
        """
        decision = self.weigh(stored)
        self.records[decision.plan.kind].num_plans += 1
        return decision

    def weigh(self, stored: StoredPrefix) -> Decision:
        """As `plan`, but the choice is not counted: for plans that will not be carried out.

        Raises:  InternalError: an empty prompt, or counts that contradict each other.
        """
        # 1. A hit must leave at least one token to run: its logits are the answer to the prompt.
        usable = self._usable_blocks(stored)
        # 2. Cost each way.
        plans = [self._cold(stored.num_tokens)]
        if best := self._checkpoint(stored, usable):
            plans.append(best)
        if stored.replay:
            # Where a slower tier begins may be a better end than where all of them end.
            for end in self._ends(stored, usable):
                plans.append(self._replay(stored, end, PlanKind.REPLAY, self.sizes.replay_tokens))
        if usable and stored.bounded_windows:
            replayed = stored.bounded_windows * self.sizes.window_tokens
            plans.append(self._replay(stored, usable, PlanKind.BOUNDED, replayed))
        # 3. The least predicted time wins. Cold is among them, so the choice is never predicted slower than cold.
        plans.sort(key=lambda plan: (plan.predicted_s, plan.prefill_tokens + plan.replay_work_tokens))
        return Decision(plan=plans[0], plans=tuple(plans))

    def record(self, plan: Plan, actual_s: float) -> float:
        """Tell the planner that the plan took `actual_s` seconds, up to the first token. Returns the relative error of
        the prediction.
        """
        record = self.records[plan.kind]
        error = abs(actual_s - plan.predicted_s) / max(plan.predicted_s, 1e-9)
        weight = _MEAN_MEMORY if record.num_outcomes else 0.0
        record.mean_error = weight * record.mean_error + (1 - weight) * error
        record.stated_error = max(record.stated_error * ERROR_MEMORY, error)
        record.num_outcomes += 1
        record.predicted_s += plan.predicted_s
        record.actual_s += actual_s
        return error

    def _usable_blocks(self, stored: StoredPrefix) -> int:
        size = self.sizes.block_size
        if stored.num_tokens < 1 or stored.num_blocks < 0 or stored.bounded_windows < 0:
            raise InternalError(
                f"cannot plan a restore of {stored.num_tokens} tokens with {stored.num_blocks} stored blocks"
            )
        usable = min(stored.num_blocks, (stored.num_tokens - 1) // size)
        return usable // self._step * self._step

    def _ends(self, stored: StoredPrefix, usable: int) -> list[int]:
        ends = {usable, *(min(end, usable) // self._step * self._step for end, _ in stored.block_tiers)}
        return sorted((end for end in ends if end > 0), reverse=True)

    def _cold(self, num_tokens: int) -> Plan:
        seconds = self.rates.prefill_s(num_tokens, context=0)
        return self._stated(PlanKind.COLD, 0, 0, "", 0, 0, 0, num_tokens, seconds)

    def _checkpoint(self, stored: StoredPrefix, usable: int) -> Plan | None:
        """The fastest plan that resumes at a checkpoint. The fastest checkpoint is not always the last checkpoint: an
        earlier one may be in a faster tier, or loading may be slow.
        """
        groups: dict[tuple[str, bool], list[int]] = {}
        for block, tier in stored.checkpoints.items():
            if 0 < block <= usable and block % self._step == 0:
                groups.setdefault((tier, block in stored.resident_checkpoints), []).append(block)
        plans = [
            self._from_checkpoint(stored, block, tier)
            for (tier, _), blocks in groups.items()
            for block in _extremes(blocks, stored.num_resident_blocks)
        ]
        return min(plans, key=lambda plan: (plan.predicted_s, -plan.resume_block), default=None)

    def _from_checkpoint(self, stored: StoredPrefix, block: int, tier: str) -> Plan:
        context = block * self.sizes.block_size
        tokens = stored.num_tokens - context
        block_bytes = self._block_bytes(stored, block)
        window_bytes = 0 if block in stored.resident_checkpoints else self.sizes.checkpoint_bytes
        seconds = self.load_s(stored, block) + self.rates.load_s(tier, window_bytes)
        seconds += self.rates.prefill_s(tokens, context=context)
        return self._stated(PlanKind.CHECKPOINT, block, block, tier, block_bytes + window_bytes, 0, 0, tokens, seconds)

    def _replay(self, stored: StoredPrefix, block: int, kind: PlanKind, replay_tokens: int) -> Plan:
        start = max(block - self.sizes.blocks_up(replay_tokens), 0) // self._step * self._step
        context = block * self.sizes.block_size
        replayed = (block - start) * self.sizes.block_size
        work = replayed if self._is_whole else self.sizes.replay_work_tokens(replayed)
        tokens = stored.num_tokens - context
        block_bytes = self._block_bytes(stored, block)
        seconds = self.load_s(stored, block)
        seconds += self.rates.replay_s(work, context=start * self.sizes.block_size)
        seconds += self.rates.prefill_s(tokens, context=context)
        return self._stated(kind, block, start, "", block_bytes, replayed, work, tokens, seconds)

    def load_s(self, stored: StoredPrefix, num_blocks: int) -> float:
        """Predicted seconds to load the stored blocks before `num_blocks`. Tiers are read in parallel, so the slowest
        one decides.
        """
        nbytes: dict[str, int] = {}
        start = stored.num_resident_blocks
        for end, tier in (*stored.block_tiers, (num_blocks, stored.blocks_tier)):
            stop = min(end, num_blocks)
            if stop > start:
                nbytes[tier] = nbytes.get(tier, 0) + (stop - start) * self.sizes.block_bytes
                start = stop
        return max((self.rates.load_s(tier, size) for tier, size in nbytes.items()), default=0.0)

    def _block_bytes(self, stored: StoredPrefix, num_blocks: int) -> int:
        return max(num_blocks - stored.num_resident_blocks, 0) * self.sizes.block_bytes

    def _stated(
        self,
        kind: PlanKind,
        resume_block: int,
        replay_from_block: int,
        checkpoint_tier: str,
        load_bytes: int,
        replay_tokens: int,
        replay_work_tokens: int,
        prefill_tokens: int,
        predicted_s: float,
    ) -> Plan:
        return Plan(
            kind=kind,
            resume_block=resume_block,
            replay_from_block=replay_from_block,
            checkpoint_tier=checkpoint_tier,
            load_bytes=load_bytes,
            replay_tokens=replay_tokens,
            replay_work_tokens=replay_work_tokens,
            prefill_tokens=prefill_tokens,
            predicted_s=predicted_s,
            error_s=predicted_s * self.records[kind].stated_error,
        )


def _extremes(blocks: list[int], num_resident: int) -> set[int]:
    """Among checkpoints that differ only in position, the few positions where the cheapest one can be; the strategy
    `full` has thousands of checkpoints.

    Load time grows linearly and prefill time falls with position, the latter ever faster (later tokens cost more), so
    the sum is concave up to the last resident block and concave again after it: its minimum is at one of four ends.
    """
    inside = [block for block in blocks if block <= num_resident]
    beyond = [block for block in blocks if block > num_resident]
    return {end for part in (inside, beyond) if part for end in (min(part), max(part))}

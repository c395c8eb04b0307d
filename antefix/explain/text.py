"""An explanation for the engineer on call: what is there, what would be done with it, what to do about the rest."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from antefix.explain.answer import Explanation
from antefix.explain.evidence import BlockEvidence, State
from antefix.window import Plan, PlanKind

_ADVICE = {
    "below_minimum": "nothing is wrong: the prompt is too short to be cached.",
    "first_seen": "nothing is wrong if this text is new. Else compare tenant, user, namespace, model and the very text:"
    " one token that differs changes every block after it.",
    "evicted": "the store was too small for how long this was unused: raise its budget, or pin the prefix.",
    "expired": "it was unused for longer than its time to live: raise block_ttl_s, or pin the prefix.",
    "corrupt": "the disk returned other bytes than were written: look at the disk; `antefix fsck` checks the store.",
    "fingerprint_differs": "the KV was made under other settings: compare model files, kv_format, namespace and"
    " bounded_windows of those who wrote it with those who read.",
    "unreachable": "an earlier block is missing; see the first one.",
    "window_missing": "the KV is stored, but resuming needs window state: strategy `auto` leaves a checkpoint where"
    " prompts are seen to fork, `full` at every block.",
}


def lines(explanation: Explanation) -> Iterator[str]:
    """The answer first, then what it rests on."""
    size = explanation.sizes.block_size
    yield from _verdict(explanation)
    yield ""
    yield f"Blocks of {size} tokens:"
    for state, group in itertools.groupby(explanation.blocks, key=lambda block: block.state):
        yield from _group(state, list(group), size)
    rest = explanation.num_tokens - len(explanation.blocks) * size
    if rest:
        yield f"  the last {rest} tokens    no whole block: always computed"
    yield ""
    checkpoints = [block * size for block in explanation.checkpoints]
    shown = ", ".join(str(tokens) for tokens in checkpoints[-12:]) or "none"
    more = f" (and {len(checkpoints) - 12} before)" if len(checkpoints) > 12 else ""
    yield f"Checkpoints of window state, after so many tokens: {shown}{more}"
    yield ""
    yield "Ways to get there, fastest first, as predicted for a worker with empty memory:"
    for plan in explanation.decision.plans:
        yield f"  {'->' if plan is explanation.decision.plan else '  '} {_way(plan, size)}"
    if explanation.miss_reason:
        yield ""
        yield f"Why the rest misses: {explanation.miss_reason}. {explanation.miss_detail}".rstrip(". ") + "."
        yield f"What to do: {_ADVICE.get(explanation.miss_reason, 'see docs/OPERATIONS.md.')}"


def _verdict(explanation: Explanation) -> Iterator[str]:
    hit, num_tokens = explanation.hit_tokens, explanation.num_tokens
    plan, cold_s = explanation.decision.plan, explanation.decision.cold.predicted_s
    yield f"{hit} of {num_tokens} prompt tokens would be hits ({hit / num_tokens:.0%}), by {_kind(plan)}:"
    yield f"{plan.predicted_s:.3f} s predicted, {cold_s:.3f} s cold."
    yield f"{explanation.num_stored_blocks} of {len(explanation.blocks)} blocks can be used."


def _group(state: State, blocks: list[BlockEvidence], size: int) -> Iterator[str]:
    first, last = blocks[0], blocks[-1]
    span = f"{first.index}" if first is last else f"{first.index} to {last.index}"
    line = f"  {span:<12} tokens {first.index * size} to {(last.index + 1) * size - 1}: {state.value}"
    places = [block.place for block in blocks if block.place is not None]
    if places:
        stored, payload = sum(p.stored_bytes for p in places), sum(p.payload_bytes for p in places)
        segments = sorted({p.segment for p in places})
        named = f"segment {segments[0]}" if len(segments) == 1 else f"segments {segments[0]} to {segments[-1]}"
        line += f", {stored / 1e6:.2f} MB on disk ({payload / stored:.2f}x compressed) in {named}"
    yield line
    if blocks[0].detail:
        yield f"               {blocks[0].detail}"


def _kind(plan: Plan) -> str:
    return {
        PlanKind.CHECKPOINT: "resuming from a checkpoint",
        PlanKind.REPLAY: "exact replay",
        PlanKind.BOUNDED: "bounded (approximate) replay",
        PlanKind.COLD: "starting cold",
    }[plan.kind]


def _way(plan: Plan, size: int) -> str:
    steps = []
    if plan.load_bytes:
        steps.append(f"load {plan.load_bytes / 1e6:.2f} MB")
    if plan.replay_tokens:
        steps.append(f"replay {plan.replay_tokens} tokens from {plan.replay_from_block * size}")
    steps.append(f"prefill {plan.prefill_tokens} tokens from {plan.resume_block * size}")
    return f"{plan.kind.value:<11} {plan.predicted_s:8.3f} s (off by up to {plan.error_s:.3f} s): {', '.join(steps)}"

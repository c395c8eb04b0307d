"""The explanation as text for the engineer on call: what is stored, how it would be used, what to do about the rest."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Final

from antefix.miss_reason import MissReason
from antefix.window import Plan, PlanKind
from antefix_console.explain.answer import Explanation
from antefix_console.explain.block_evidence import BlockEvidence

ADVICE: Final = {
    MissReason.BELOW_MINIMUM: "nothing is wrong: the prompt is too short to be cached.",
    MissReason.FIRST_SEEN: "nothing is wrong if this text is new. Else compare tenant, user, secret and the exact"
    " text: one token that differs changes every block after it. --also-tenant NAME looks for the text elsewhere.",
    MissReason.EVICTED: "the store was too small for how long this was unused: raise its budget, or pin the prefix.",
    MissReason.EXPIRED: "it was unused for longer than its time to live: raise block_ttl_s, or pin the prefix.",
    MissReason.CORRUPT: "the disk returned other bytes than were written: look at the disk; `antefix fsck` checks the"
    " store.",
    MissReason.FINGERPRINT_DIFFERS: "compare tenant, model files, kv_format, namespace and bounded_windows of those who"
    " write here with those who read; --also-tenant NAME, --also-namespace NAME and --also-model DIR look there.",
    MissReason.ARITHMETIC_DIFFERS: "the same model computed it on a machine that gives other bits: give all workers"
    " processors, libraries and settings of one kind, or keep their prompts apart; `antefix doctor` shows what a"
    " machine has.",
    MissReason.UNREACHABLE: "an earlier block is missing; see the first one.",
    MissReason.WINDOW_MISSING: "the KV is stored, but resuming needs window state, and without a checkpoint here this"
    " plan is the fastest. If prompts often part here, strategy `auto` stores a checkpoint after the first of them;"
    " `antefix window` shows the strategy.",
    MissReason.STORE_UNAVAILABLE: "the worker got no answer from the store: see whether it runs, and the worker's log.",
    MissReason.STORE_LATE: "the store did not answer in its usual time, and the worker computed the KV sooner: see"
    " whether the store's process and disk are busy or hang.",
    MissReason.LOST_HIT: "the worker dropped the KV without saying so, its events are late, or it read another prompt"
    ' than the router: docs/FLEET.md, "Lost hits".',
    MissReason.OTHER_WORKER: "the worker that had the KV had too much to do; --compute-weight says how long to wait for"
    " such a worker.",
    MissReason.UNKNOWN: "a newer process gave this reason: read it with that process's version.",
}
# For workers that are other engines, some reasons mean something else.
FLEET_ADVICE: Final = {
    **ADVICE,
    MissReason.FIRST_SEEN: "nothing is wrong if this text is new. Else compare the exact text: one token that differs"
    " changes every block after it. What a worker dropped long ago, or before the router knew it, counts as new too.",
    MissReason.EVICTED: "the worker's cache was too small for how long this was unused: give it more memory, a slower"
    " medium behind it, or the fleet more workers.",
    MissReason.UNKNOWN: "no worker could tokenize the prompt, so nothing is known of its blocks: see whether the"
    " workers answer at /tokenize.",
}


def lines(explanation: Explanation) -> Iterator[str]:
    """The answer comes first, then the evidence for the answer."""
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
    yield from _window_state(explanation, size)
    yield ""
    yield (
        "Ways to get there, fastest first, as predicted for a worker with empty memory that prefills"
        f" {explanation.prefill_tokens_per_s:.0f} tokens/s:"
    )
    for plan in explanation.decision.plans:
        yield f"  {'->' if plan is explanation.decision.plan else '  '} {_way(plan, size)}"
    if explanation.miss_reason:
        yield ""
        yield f"Why the rest misses: {explanation.miss_reason}. {explanation.miss_detail}".rstrip(". ") + "."
        if explanation.absent_from:
            yield f"Nor are these tokens stored under {', '.join(explanation.absent_from)}."
        yield f"What to do: {ADVICE[explanation.miss_reason]}"


def _verdict(explanation: Explanation) -> Iterator[str]:
    hit, num_tokens = explanation.hit_tokens, explanation.num_tokens
    plan, cold_s = explanation.decision.plan, explanation.decision.cold.predicted_s
    yield f"{hit} of {num_tokens} prompt tokens would be hits ({hit / num_tokens:.0%}), by {_kind(plan)}:"
    yield f"{plan.predicted_s:.3f} s predicted, {cold_s:.3f} s cold."
    yield f"{explanation.num_stored_blocks} of {len(explanation.blocks)} blocks can be used."


def _window_state(explanation: Explanation, size: int) -> Iterator[str]:
    """At which positions a hit can resume, and at which other positions there could have been a checkpoint."""
    yield f"Checkpoints of window state on disk, after so many tokens: {_some(explanation.checkpoints, size)}"
    if explanation.pool_error:
        yield f"  the window pool does not answer, so workers do without it: {explanation.pool_error}"
    elif explanation.pooled is None:
        yield "  a window pool was not asked: give --window-pool as the workers have it"
    else:
        yield f"  in the window pool: {_some(explanation.pooled, size)}"
    for reason, group in itertools.groupby(
        (block for block in explanation.blocks if block.checkpoint_lost), key=lambda block: block.checkpoint_lost
    ):
        yield f"  after {_some([block.index + 1 for block in group], size)} tokens one {reason}"
    plan = explanation.decision.plan
    if plan.replay_tokens:
        exactness = "to the bit" if plan.kind is PlanKind.REPLAY else "approximately"
        yield (
            f"  none where this prompt leaves: {plan.replay_tokens} tokens are run again to rebuild window state"
            f" {exactness}, for {plan.replay_work_tokens} tokens' time; nothing is written"
        )


def _some(blocks: Sequence[int], size: int) -> str:
    shown = ", ".join(str(block * size) for block in blocks[-12:]) or "none"
    return shown + (f" (and {len(blocks) - 12} before)" if len(blocks) > 12 else "")


def _group(state: str, blocks: list[BlockEvidence], size: int) -> Iterator[str]:
    first, last = blocks[0], blocks[-1]
    span = f"{first.index}" if first is last else f"{first.index} to {last.index}"
    line = f"  {span:<12} tokens {first.index * size} to {(last.index + 1) * size - 1}: {state}"
    places = [block.place for block in blocks if block.place is not None]
    if places:
        stored, payload = sum(p.stored_bytes for p in places), sum(p.payload_bytes for p in places)
        segments = sorted({p.segment for p in places})
        named = f"segment {segments[0]}" if len(segments) == 1 else f"segments {segments[0]} to {segments[-1]}"
        line += f", {stored / 1e6:.2f} MB on disk ({payload / stored:.2f}x compressed) in {named}"
    if stores := sorted({block.store for block in blocks if block.store}):
        line += f", from {', '.join(stores)}"
    yield line
    if known := [block.cached for block in blocks if block.cached is not None]:
        yield f"               {sum(known)} of {len(known)} in this host's page cache now, by samples"
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
